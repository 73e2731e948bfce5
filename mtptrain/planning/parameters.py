"""Parameters of a DeepSeek-V4 backbone and of an MTP module, by part and by storage format in a release."""

# D model width, H heads, C channels of a head, N residual streams, E experts, I inner width of an expert, V vocabulary

from __future__ import annotations

from dataclasses import astuple, dataclass

from mtptrain.config import BackboneConfig, ShapeConfig, WeightFormat
from mtptrain.planning.result import ModelSizes

FP8 = 1 + 1 / 128**2  # bytes: one byte per value, one scale per 128 x 128 block
FP4 = 1 / 2 + 1 / 32  # bytes: two values a byte, one scale for 32 values
# Bytes per parameter of (expert, matrix, plain, strict); see `Weights`.
BYTES = {
    WeightFormat.release: (FP4, FP8, 2, 4),
    WeightFormat.fp8: (FP8, FP8, 2, 4),
    WeightFormat.bf16: (2, 2, 2, 4),
    WeightFormat.fp32: (4, 4, 4, 4),
}


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of parameters by the four storage formats of a release.

    Attributes:
        expert: routed experts, FP4 in a release.
        matrix: other large matrices, FP8 in a release.
        plain: embedding, lm_head, router and compressors, bf16 in a release.
        strict: hyper-connections, sinks, position biases and norms; always held in fp32.
    """

    expert: int = 0
    matrix: int = 0
    plain: int = 0
    strict: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(astuple(self))

    def bytes(self, stored: WeightFormat) -> float:
        """Return the bytes of all parameters, including scales."""
        return sum(count * size for count, size in zip(astuple(self), BYTES[stored], strict=True))


Parts = dict[str, Weights]  # by name of the part


def add_parts(*many: Parts) -> Parts:
    """Return the sum of each part."""
    total: Parts = {}
    for parts in many:
        for name, weights in parts.items():
            total[name] = total.get(name, Weights()) + weights
    return total


def total_weights(parts: Parts) -> Weights:
    """Return the sum over all parts."""
    return sum(parts.values(), Weights())


def attention_weights(shape: ShapeConfig) -> Weights:
    """Return projections, norms and sinks of sliding attention, including the norm before it."""
    width, head, latent = shape.hidden_size, shape.head_dim, shape.q_lora_rank
    query = width * latent + latent * shape.num_attention_heads * head
    output = shape.num_attention_heads * head * shape.o_lora_rank + shape.o_groups * shape.o_lora_rank * width
    return Weights(
        matrix=query + width * head + output,
        strict=latent + head + width + shape.num_attention_heads,
    )


def compressor_weights(shape: ShapeConfig, channels: int, rate: int, span: int) -> Weights:
    """Return a compressor that pools windows of `rate` tokens; with span 2 each window covers the one before it too."""
    wide = span * channels
    return Weights(plain=2 * shape.hidden_size * wide, strict=rate * wide + channels)


def compression_weights(shape: ShapeConfig, kind: str) -> Weights:
    """Return the weights that a layer (`sliding`, `csa`, `hca`) adds to sliding attention, including CSA's indexer."""
    if kind == "sliding":
        return Weights()
    if kind == "hca":
        return compressor_weights(shape, shape.head_dim, shape.hca_rate, span=1)
    indexer = Weights(
        matrix=shape.q_lora_rank * shape.index_heads * shape.index_head_dim,
        plain=shape.hidden_size * shape.index_heads,
    )
    keys = compressor_weights(shape, shape.head_dim, shape.csa_rate, span=2)
    return keys + indexer + compressor_weights(shape, shape.index_head_dim, shape.csa_rate, span=2)


def expert_weights(shape: ShapeConfig) -> int:
    """Return the number of parameters of one expert."""
    return 3 * shape.hidden_size * shape.expert_size


def connection_matrices(shape: ShapeConfig) -> int:
    """Return the matrix parameters of a layer's two hyper-connections and of `hc_head`, without their vectors."""
    outputs = 2 * (2 + shape.hc_mult) * shape.hc_mult + shape.hc_mult
    return outputs * shape.hc_mult * shape.hidden_size


def connection_weights(shape: ShapeConfig) -> Weights:
    """Return one hyper-connection: projection, bias and three scales. A layer has two."""
    mixed = (2 + shape.hc_mult) * shape.hc_mult
    return Weights(strict=mixed * shape.hc_mult * shape.hidden_size + mixed + 3)


def collapse_weights(shape: ShapeConfig) -> Weights:
    """Return `hc_head`, which merges the streams into one vector, and the norm after it."""
    return Weights(strict=shape.hc_mult * shape.hc_mult * shape.hidden_size + shape.hc_mult + 1 + shape.hidden_size)


def layer_parts(shape: ShapeConfig, kind: str) -> Parts:
    """Return one decoder layer. Routing tables and selection biases are buffers and are not counted."""
    width = shape.hidden_size
    return {
        "attention": attention_weights(shape),
        "compression": compression_weights(shape, kind),
        "router": Weights(plain=shape.num_experts * width, strict=width),
        "routed experts": Weights(expert=shape.num_experts * expert_weights(shape)),
        "shared expert": Weights(matrix=expert_weights(shape)),
        "hyper-connections": connection_weights(shape) + connection_weights(shape),
    }


def head_weights(shape: ShapeConfig) -> Weights:
    """Return the lm_head. Embedding and lm_head are not tied and have the same size."""
    return Weights(plain=shape.vocab_size * shape.hidden_size)


def backbone_parts(shape: ShapeConfig) -> Parts:
    """Return the whole backbone."""
    layers = [layer_parts(shape, kind) for kind in shape.layer_types]
    outside = {
        "embedding": head_weights(shape),
        "hyper-connections": collapse_weights(shape),
        "lm_head": head_weights(shape),
    }
    return add_parts(*layers, outside)


def module_parts(shape: ShapeConfig) -> Parts:
    """Return one MTP module. It shares embedding and lm_head with the backbone."""
    width = shape.hidden_size
    combine = {"combine": Weights(matrix=2 * width * width, strict=2 * width)}
    return add_parts(combine, layer_parts(shape, "sliding"), {"hyper-connections": collapse_weights(shape)})


def active_parameters(shape: ShapeConfig) -> int:
    """Return the parameters that one token uses: all except idle experts and the other rows of the embedding."""
    idle = (shape.num_experts - shape.experts_per_token) * expert_weights(shape) * len(shape.layer_types)
    return total_weights(backbone_parts(shape)).total - idle - head_weights(shape).total


def model_sizes(model: BackboneConfig) -> ModelSizes:
    """Return the numbers of parameters of a model and of one MTP module."""
    module = total_weights(module_parts(model.shape))
    return ModelSizes(
        name=model.name,
        parameters=total_weights(backbone_parts(model.shape)).total,
        active_parameters=active_parameters(model.shape),
        module_parameters=module.total,
        module_parameters_without_routed_experts=module.total - module.expert,
        layers={kind: model.shape.layer_types.count(kind) for kind in ("sliding", "csa", "hca")},
    )
