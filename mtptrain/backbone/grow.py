"""Begin a deeper backbone with the weights of a shallower one: the new layers change nothing at first.

Source: Net2Net (Chen et al. 2016, arXiv:1511.05641) and the block expansion of LLaMA Pro (Wu et al. 2024,
arXiv:2401.02415, section 3.1), carried over to hyper-connections: a new layer adds zero to the streams, and mixes them
by the identity.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.errors import UserError

# Logit of a stream's weight on itself. After the softmax a new layer keeps 0.99966 of each of two streams.
KEEP_STREAM = 8.0


def layer_positions(old: DeepseekV4Config, new: DeepseekV4Config) -> list[int]:
    """Return the position of every old layer among the new ones: the first of its kind after the layer before it.

    Raises:
        UserError: the old layers are no subsequence of the new ones, or the two differ in another size.
    """
    setting = "backbone.grow_from"
    ours, theirs = new.to_dict(), old.to_dict()
    free = {
        "layer_types",
        "mlp_layer_types",
        "num_hidden_layers",
        "transformers_version",
        "architectures",
        "dtype",
        "_name_or_path",
    }
    differing = sorted(name for name in ours.keys() - free if ours[name] != theirs.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{setting}: the smaller backbone has {name}={theirs.get(name)}, backbone.shape has {ours[name]}; only the "
            "layers may differ"
        )
    kinds = iter(enumerate(zip(new.layer_types, new.mlp_layer_types, strict=True)))
    positions = []
    for kind in zip(old.layer_types, old.mlp_layer_types, strict=True):
        position = next((index for index, other in kinds if other == kind), None)
        if position is None:
            raise UserError(
                f"backbone.shape.layer_types={new.layer_types}: must contain the smaller backbone's layers in their "
                f"order: {old.layer_types}, of which {old.mlp_layer_types.count('hash_moe')} choose experts by token"
            )
        positions.append(position)
    return positions


@torch.no_grad()
def grow(model: DeepseekV4ForCausalLM, smaller: DeepseekV4ForCausalLM) -> None:
    """Give a fresh backbone the weights of a smaller one, and let its other layers begin as the identity.

    Args:
        model: changed in place.
        smaller: the same sizes, and some of the layers.

    Raises:
        UserError: as `layer_positions`.
    """
    positions = layer_positions(smaller.config, model.config)
    for index, layer in enumerate(model.model.layers):
        if index not in positions:
            _make_identity(layer)
    state = {}
    for name, tensor in smaller.state_dict().items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(positions[int(parts[2])])
        state[".".join(parts)] = tensor
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys


def _make_identity(layer: nn.Module) -> None:
    for zeroed in (
        layer.self_attn.o_b_proj.weight,
        layer.mlp.experts.down_proj,
        layer.mlp.shared_experts.down_proj.weight,
    ):
        zeroed.zero_()
    for connection in (layer.attn_hc, layer.ffn_hc):
        streams = connection.hc_mult
        connection.base[2 * streams :] = KEEP_STREAM * torch.eye(streams).flatten().to(connection.base)
