"""transformers' own modules in place of this package's, for a while: the reference that decoding is held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mtptrain.backbone.attention import NAME, REPLACED
from mtptrain.backbone.modules import FrozenHyperConnection

UPSTREAM: dict[type[nn.Module], type[nn.Module]] = {own: upstream for upstream, own in REPLACED.items()}


@contextmanager
def upstream_modules(model: DeepseekV4ForCausalLM) -> Iterator[None]:
    """Run transformers' attention, compressors, indexers and hyper-connections inside the block.

    Two replacements stay: norms keep the dtype of their input, and indexers break ties at a score of exactly 0 by
    position (`decode.break_zero_ties`), without which transformers' forward is not causal.
    """
    upstream = {**UPSTREAM, FrozenHyperConnection: DeepseekV4HyperConnection}
    replaced = [(child, type(child)) for child in model.modules() if type(child) in upstream]
    has_own_attention = any(kind in UPSTREAM for _, kind in replaced)
    for child, kind in replaced:
        _become(child, upstream[kind])
    if has_own_attention:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for child, kind in replaced:
            _become(child, kind)
        if has_own_attention:
            model.set_attn_implementation(NAME)


def _become(module: Any, kind: type[nn.Module]) -> None:
    """Change the class of a module, also for accelerate's hook, which keeps the forward of the class before."""
    module.__class__ = kind
    if hasattr(module, "_old_forward"):
        module._old_forward = MethodType(kind.forward, module)
