"""The words that a setting can take."""

from __future__ import annotations

from enum import Enum, StrEnum

from mtptrain.kernels.choices import Divergence


class Device(Enum):
    """Where a run computes; `auto` takes the GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Arithmetic of a run; `auto` is bf16 on a GPU and fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Placement(Enum):
    """Where the backbone's layers go.

    `replicate`: all on the device of each process. `zero3`: shared out over the processes, gathered a layer at a time.
    `expert_parallel`: the routed experts shared out, tokens sent to them. Within one process, accelerate spreads layers
    over the GPUs of this machine, and what does not fit over its CPU: `auto` and `balanced` evenly, `sequential` one
    GPU after the other.
    """

    replicate = "replicate"
    zero3 = "zero3"
    expert_parallel = "expert_parallel"
    auto = "auto"
    balanced = "balanced"
    sequential = "sequential"


SHARED_PLACEMENTS = (Placement.zero3, Placement.expert_parallel)
SPREAD_PLACEMENTS = (Placement.auto, Placement.balanced, Placement.sequential)


class StoredWeights(Enum):
    """How the FP8 and FP4 weights of a release are held.

    `keep` computes on them as transformers does, which needs a GPU; `dequantize` decodes them while loading; `auto`
    keeps them where there is a GPU.
    """

    auto = "auto"
    keep = "keep"
    dequantize = "dequantize"


class ExportTarget(Enum):
    """What shall load the exported folder."""

    vllm = "vllm"
    sglang = "sglang"
    hf = "hf"


class ExportForm(Enum):
    """`full`: a whole model folder. `draft`: the head with embedding and lm_head, which vLLM loads beside the model."""

    full = "full"
    draft = "draft"


class ExportScheme(Enum):
    """How an exported head is stored: as the backbone stores its own layers, or unquantised."""

    target = "target"
    bf16 = "bf16"


class ShardCopies(Enum):
    """How files that an export leaves as they are come into its folder."""

    hardlink = "hardlink"
    symlink = "symlink"
    copy = "copy"


class ReleaseVariant(Enum):
    """Which release a miniature imitates: FP4 experts, the FP8 experts of -Base, or DSpark blocks instead of MTP."""

    release = "release"
    base = "base"
    dspark = "dspark"


class EngineName(Enum):
    """What a process holds of the heads' training: all of it, or its share by a stage of DeepSpeed ZeRO.

    zero1 shares the optimiser's state, zero2 the gradients too, zero3 the parameters too.
    """

    single = "single"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class OptimizerName(Enum):
    """`muon` takes the matrices; what is no matrix stays with AdamW."""

    adamw = "adamw"
    muon = "muon"


class DataSource(Enum):
    """Where documents come from.

    `streams`: a cache that `+recipe=collect` made, with the backbone's streams. `on_policy`: the backbone's own
    continuations of prompts.
    """

    stdlib = "stdlib"
    text = "text"
    streams = "streams"
    on_policy = "on_policy"


class StreamFormat(Enum):
    """How a cached residual stream is stored; `fp8` is e4m3 with a scale for every token and stream."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class MtpMode(Enum):
    """`shared`: one module drafts every step. `stacked`: module d drafts step d."""

    shared = "shared"
    stacked = "stacked"


class LossName(StrEnum):
    """Training losses: every divergence, and `chain`, the expected accepted length of a whole rollout."""

    _ignore_ = "loss"
    for loss in (*Divergence, "chain"):  # a new divergence is a loss at once
        vars()[str(loss)] = str(loss)

    @property
    def is_chain(self) -> bool:
        """Return whether the loss is of a whole rollout instead of a mean over tokens."""
        return self.value == "chain"

    @property
    def per_token(self) -> Divergence:
        """Return the divergence of one token; `chain` multiplies 1 - tv along the rollout."""
        return Divergence.tv if self.is_chain else Divergence(self)


class DraftChoice(Enum):
    """Which token a draft step takes at a temperature above 0: drawn from the head's distribution, or its likeliest."""

    sampled = "sampled"
    greedy = "greedy"


class PlanKind(Enum):
    """What `plan` is asked for."""

    decoding = "decoding"
    training = "training"


class WeightFormat(Enum):
    """How weights are stored; `release` keeps experts in FP4 and other matrices in FP8, as DeepSeek ships them."""

    release = "release"
    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"


class CacheFormat(Enum):
    """How cached keys are stored; with `fp8` the rotated channels stay in bf16."""

    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"
