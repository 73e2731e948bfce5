"""Write a trained backbone in half the bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV4ForCausalLM


@torch.no_grad()
def save_bf16(model: DeepseekV4ForCausalLM, folder: Path) -> None:
    """Write a float32 backbone with its matrices in bf16, as releases store them; the model is rounded in place.

    Vectors (norms, sinks, biases, bases and scales of the hyper-connections) and routing tables keep their dtype, and
    so does config.json: the arithmetic of the folder stays float32.

    Args:
        model: float32; its matrices hold bf16 values afterwards.
        folder: where model.safetensors and config.json go.
    """
    stored = {}
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.is_floating_point() and tensor.dim() > 1
        stored[name] = tensor.to(torch.bfloat16) if is_matrix else tensor
        tensor.copy_(stored[name])
    model.save_pretrained(folder, state_dict=stored)
