"""Attention of the MTP rollout, with sinks; see `reference.py`."""

from mtptrain.kernels.sink_attention.reference import context_mask, rollout_attention_reference

__all__ = ["context_mask", "rollout_attention_reference"]
