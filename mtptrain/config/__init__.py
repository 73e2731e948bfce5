"""Settings of a run: typed sections, each with its units, ranges and checks.

This package imports neither torch nor transformers, so that `--help` and `--cfg job` answer at once.
"""

from mtptrain.config.backbone import BackboneConfig, ExportConfig, ReleaseConfig, ShapeConfig
from mtptrain.config.choices import (
    PARTITIONED_PLACEMENTS,
    CacheFormat,
    DataFormat,
    DataSource,
    Device,
    DraftChoice,
    EngineName,
    ExportForm,
    ExportScheme,
    ExportTarget,
    LossName,
    MtpMode,
    OnBadRow,
    OptimizerName,
    Placement,
    PlanKind,
    Precision,
    ReleaseVariant,
    ShardCopies,
    StoredWeights,
    StreamFormat,
    Turns,
    WeightFormat,
)
from mtptrain.config.data import CollectConfig, DataConfig, MixtureConfig, OnPolicyConfig
from mtptrain.config.measurement import DecodingConfig, EvaluationConfig, WatchConfig
from mtptrain.config.planning import HardwareConfig, PlanConfig
from mtptrain.config.rules import HELDOUT, MAX_DRAFT_LENGTH, TRAINING, did_you_mean, require
from mtptrain.config.run import ONE_DTYPE, RunConfig, TrackingConfig, register
from mtptrain.config.training import LossConfig, MtpConfig, StockHeadConfig, TrainConfig
from mtptrain.kernels.choices import Verification

__all__ = [
    "HELDOUT",
    "MAX_DRAFT_LENGTH",
    "ONE_DTYPE",
    "PARTITIONED_PLACEMENTS",
    "TRAINING",
    "BackboneConfig",
    "CacheFormat",
    "CollectConfig",
    "DataConfig",
    "DataFormat",
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
    "OnBadRow",
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
    "StockHeadConfig",
    "StoredWeights",
    "StreamFormat",
    "TrackingConfig",
    "TrainConfig",
    "Turns",
    "Verification",
    "WatchConfig",
    "WeightFormat",
    "did_you_mean",
    "register",
    "require",
]
