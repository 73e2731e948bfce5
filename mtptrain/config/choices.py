"""Enumerations of the words that settings accept."""

from __future__ import annotations

from enum import Enum, StrEnum

from mtptrain.kernels.choices import Divergence


class Device(Enum):
    """Device of a run; `auto` is the GPU if torch sees one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Dtype of a run's matrices; `auto` is bf16 on a GPU and fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Placement(Enum):
    """Placement of the backbone's layers.

    `replicate`: all on the device of each process. `zero3`: partitioned over the processes, gathered layer by layer.
    `expert_parallel`: routed experts partitioned over the processes, tokens sent to them. `auto`: within one
    process, the layers are spread evenly over the GPUs of this machine.
    """

    replicate = "replicate"
    zero3 = "zero3"
    expert_parallel = "expert_parallel"
    auto = "auto"


PARTITIONED_PLACEMENTS = (Placement.zero3, Placement.expert_parallel)


class StoredWeights(Enum):
    """Storage of a release's FP8 and FP4 weights in memory.

    `keep` leaves them as they are, and a layer decodes its own when it runs; `dequantize` decodes them while they are
    read; `auto` keeps them on a GPU and decodes them on a CPU.
    """

    auto = "auto"
    keep = "keep"
    dequantize = "dequantize"


class ExportTarget(Enum):
    """Server or library that loads the exported folder."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama_cpp"
    hf = "hf"


class ExportForm(Enum):
    """`full`: a complete model folder. `draft`: the head alone, which vLLM loads beside the model."""

    full = "full"
    draft = "draft"


class ExportScheme(Enum):
    """Weight format of an exported head: that of the backbone's own layers, or unquantised."""

    target = "target"
    bf16 = "bf16"


class ExportCheck(Enum):
    """Check of an exported head: its tensors and its replayed acceptance, or its tensors alone."""

    replay = "replay"
    tensors = "tensors"


class ShardCopies(Enum):
    """How unchanged files are put into the export: hard link, symlink or copy."""

    hardlink = "hardlink"
    symlink = "symlink"
    copy = "copy"


class ReleaseVariant(Enum):
    """Which release a miniature imitates: FP4 experts, the FP8 experts of -Base, or DSpark blocks instead of MTP."""

    release = "release"
    base = "base"
    dspark = "dspark"


class ReleaseSize(Enum):
    """Sizes of a random miniature: those of backbone.shape, or multiples of 128 with the head widths of V4-Flash."""

    tiny = "tiny"
    servable = "servable"


class Show(Enum):
    """Form of a text on the screen while it is decoded.

    `colours` by origin of the tokens, on a terminal; `marks` for a screen without them; `text` alone. `auto` is colours
    on a terminal, marks on a terminal that cannot move its cursor, and text in a file or pipe.
    """

    auto = "auto"
    colours = "colours"
    marks = "marks"
    text = "text"


class EngineName(Enum):
    """Partitioning of the heads' training state: none, or a stage of DeepSpeed ZeRO.

    zero1 partitions the optimiser's state, zero2 also the gradients, zero3 also the parameters.
    """

    single = "single"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class HeadExperts(Enum):
    """Routed experts of a head in training: all on every process, or an equal share on each, with tokens sent to it."""

    replicate = "replicate"
    expert_parallel = "expert_parallel"


class OptimizerName(Enum):
    """Optimiser; `muon` trains matrices and stacks of them and leaves vectors to AdamW."""

    adamw = "adamw"
    muon = "muon"


class DataSource(Enum):
    """Source of documents.

    `streams`: a cache of the backbone's streams, written by `+recipe=collect`. `on_policy`: the backbone's own
    continuations of prompts.
    """

    stdlib = "stdlib"
    text = "text"
    streams = "streams"
    on_policy = "on_policy"


class DataFormat(Enum):
    """Form of a row; `auto` recognises it by its columns, row by row.

    `messages` is OpenAI's, `sharegpt` has `from` and `value`, `alpaca` has instruction, input and output.
    """

    auto = "auto"
    text = "text"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt_completion"
    alpaca = "alpaca"


class Turns(Enum):
    """Answers of a conversation that are targets: all in one row, the last, or each in a row of its own."""

    all = "all"
    last = "last"
    each = "each"


class OnBadRow(Enum):
    """Treatment of a row that cannot be used: end the run, or leave it out and count it."""

    error = "error"
    skip = "skip"


class StreamFormat(Enum):
    """Storage format of cached residual streams; `fp8` is e4m3 with one scale per token and stream."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class CollectEngine(Enum):
    """Program that runs the backbone for `+recipe=collect`: transformers in this process, or vLLM's offline engine."""

    transformers = "transformers"
    vllm = "vllm"


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
    """Token of a draft step at a temperature above 0: sampled from the head's distribution, or its most likely one."""

    sampled = "sampled"
    greedy = "greedy"


class PastDepth(Enum):
    """Draft steps beyond the depth of stacked modules; a head with one module repeats it in any case.

    `repeat_last`: the last module again, over its own keys. `wrap_around`: vLLM's rule, from the first module again,
    which overwrites its keys. `stop`: a draft ends with the last module.
    """

    repeat_last = "repeat_last"
    wrap_around = "wrap_around"
    stop = "stop"


class ServedAs(Enum):
    """Numerics of the MTP modules: `exact` as trained, or those of a server (docs/serving.md)."""

    exact = "exact"
    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama_cpp"


class PlanKind(Enum):
    """Subject of a plan."""

    decoding = "decoding"
    training = "training"


class WeightFormat(Enum):
    """Storage format of weights; `release` has experts in FP4 and other matrices in FP8, as DeepSeek ships them."""

    release = "release"
    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"


class CacheFormat(Enum):
    """Storage format of cached keys; with `fp8` the rotated channels stay in bf16."""

    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"
