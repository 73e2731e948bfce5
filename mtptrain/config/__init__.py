"""What a run can be told: typed sections, each with its units, ranges and checks.

This package imports neither torch nor transformers, so that `--help` and `--cfg job` answer at once.
"""

from mtptrain.config.backbone import BackboneConfig, ShapeConfig
from mtptrain.config.choices import (
    DataSource,
    Device,
    DraftChoice,
    LossName,
    MtpMode,
    Precision,
    Task,
    Tracker,
    VerificationChoice,
)
from mtptrain.config.data import DataConfig
from mtptrain.config.measurement import DecodingConfig, EvaluationConfig
from mtptrain.config.rules import MAX_DRAFT_LENGTH, require
from mtptrain.config.run import RunConfig, register
from mtptrain.config.tracking import TrackingConfig
from mtptrain.config.training import LossConfig, MtpConfig, TrainConfig

__all__ = [
    "MAX_DRAFT_LENGTH",
    "BackboneConfig",
    "DataConfig",
    "DataSource",
    "DecodingConfig",
    "Device",
    "DraftChoice",
    "EvaluationConfig",
    "LossConfig",
    "LossName",
    "MtpConfig",
    "MtpMode",
    "Precision",
    "RunConfig",
    "ShapeConfig",
    "Task",
    "Tracker",
    "TrackingConfig",
    "TrainConfig",
    "VerificationChoice",
    "register",
    "require",
]
