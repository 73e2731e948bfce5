"""What a run can be told: typed sections, each with its units, ranges and checks.

This package imports neither torch nor transformers, so that `--help` and `--cfg job` answer at once.
"""

from mtptrain.config.backbone import BackboneConfig, ShapeConfig
from mtptrain.config.choices import (
    SHARED_PLACEMENTS,
    SPREAD_PLACEMENTS,
    CacheFormat,
    DataSource,
    Device,
    DraftChoice,
    EngineName,
    ExportForm,
    ExportScheme,
    ExportTarget,
    LossName,
    MtpMode,
    OptimizerName,
    Placement,
    PlanKind,
    Precision,
    ReleaseVariant,
    ShardCopies,
    StoredWeights,
    StreamFormat,
    Tracker,
    VerificationChoice,
    WeightFormat,
)
from mtptrain.config.collect import CollectConfig
from mtptrain.config.data import DataConfig, MixtureConfig
from mtptrain.config.export import ExportConfig
from mtptrain.config.measurement import DecodingConfig, EvaluationConfig
from mtptrain.config.on_policy import OnPolicyConfig
from mtptrain.config.planning import HardwareConfig, PlanConfig
from mtptrain.config.release import ReleaseConfig
from mtptrain.config.rules import HELDOUT, MAX_DRAFT_LENGTH, TRAINING, require
from mtptrain.config.run import ONE_DTYPE, RunConfig, register
from mtptrain.config.tracking import TrackingConfig
from mtptrain.config.training import LossConfig, MtpConfig, TrainConfig

__all__ = [
    "HELDOUT",
    "MAX_DRAFT_LENGTH",
    "ONE_DTYPE",
    "SHARED_PLACEMENTS",
    "SPREAD_PLACEMENTS",
    "TRAINING",
    "BackboneConfig",
    "CacheFormat",
    "CollectConfig",
    "DataConfig",
    "DataSource",
    "DecodingConfig",
    "Device",
    "DraftChoice",
    "EngineName",
    "EvaluationConfig",
    "ExportConfig",
    "ExportForm",
    "ExportScheme",
    "ExportTarget",
    "HardwareConfig",
    "LossConfig",
    "LossName",
    "MixtureConfig",
    "MtpConfig",
    "MtpMode",
    "OnPolicyConfig",
    "OptimizerName",
    "Placement",
    "PlanConfig",
    "PlanKind",
    "Precision",
    "ReleaseConfig",
    "ReleaseVariant",
    "RunConfig",
    "ShapeConfig",
    "ShardCopies",
    "StoredWeights",
    "StreamFormat",
    "Tracker",
    "TrackingConfig",
    "TrainConfig",
    "VerificationChoice",
    "WeightFormat",
    "register",
    "require",
]
