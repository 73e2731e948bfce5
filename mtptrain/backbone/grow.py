"""Begin a deeper backbone with the weights of a shallower one: the new layers change nothing at first.

Source: Net2Net (Chen et al. 2016, arXiv:1511.05641) and the block expansion of LLaMA Pro (Wu et al. 2024,
arXiv:2401.02415, section 3.1), carried over to hyper-connections: a new layer adds zero to the streams, and mixes them
by the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.errors import UserError

# Logit of a stream's weight on itself. After the softmax a new layer keeps 0.99966 of each of two streams.
KEEP_STREAM = 8.0
# Fields of a config that depend on the layers, or say nothing about the sizes.
FREE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "layer_types",
    "mlp_layer_types",
    "num_hidden_layers",
    "transformers_version",
}


def layer_positions(smaller: DeepseekV4Config, config: DeepseekV4Config) -> list[int]:
    """Return the position of each smaller layer among the new ones: the first of its kind after the layer before it.

    Args:
        smaller: config of the backbone with fewer layers.
        config: config of the backbone that begins with its weights.

    Raises:
        UserError: the smaller backbone's layers are no subsequence of the new ones, or another size differs.
    """
    old, new = smaller.to_dict(), config.to_dict()
    for name in sorted(new.keys() - FREE):
        if new[name] != old.get(name):
            raise UserError(
                f"backbone.shape: gives {name}={new[name]}, backbone.grow_from has {old.get(name)}; only the layers "
                "may differ"
            )
    kinds = enumerate(_kinds(config))
    positions = []
    for kind in _kinds(smaller):
        position = next((index for index, other in kinds if other == kind), None)
        if position is None:
            raise UserError(
                f"backbone.shape.layer_types: must contain the layers of backbone.grow_from in their order, which are "
                f"{', '.join(' with '.join(kind) for kind in _kinds(smaller))}"
            )
        positions.append(position)
    return positions


def _kinds(config: DeepseekV4Config) -> list[tuple[str, str]]:
    return list(zip(config.layer_types or [], config.mlp_layer_types or [], strict=True))


@torch.no_grad()
def grow(model: DeepseekV4ForCausalLM, smaller: DeepseekV4ForCausalLM) -> None:
    """Give a fresh backbone the weights of a smaller one, and let its other layers begin as the identity.

    Args:
        model: changed in place.
        smaller: has the same sizes, and some of the layers.

    Raises:
        UserError: see `layer_positions`.
    """
    positions = layer_positions(smaller.config, model.config)
    for index, layer in enumerate(model.model.layers):
        if index not in positions:
            _make_identity(layer)
    weights = {}
    for name, tensor in smaller.state_dict().items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(positions[int(parts[2])])
        weights[".".join(parts)] = tensor
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected


def _make_identity(layer: Any) -> None:
    experts = layer.mlp.experts.down_proj, layer.mlp.shared_experts.down_proj.weight
    for weight in (layer.self_attn.o_b_proj.weight, *experts):
        weight.zero_()
    for connection in (layer.attn_hc, layer.ffn_hc):
        streams = connection.hc_mult
        connection.base[2 * streams :] = KEEP_STREAM * torch.eye(streams).flatten().to(connection.base)
