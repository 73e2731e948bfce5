"""The rounding noise of a backbone, measured: how much logits move if every module rounds differently.

Two correct computations of the same logits differ by their rounding. How much depends on the model, its dtype and the
text; in bf16, a router that chooses another expert moves single logits by far more than the rounding itself. So the
noise is measured in every evaluation: transformers' own forward runs with the output of every module moved by up to one
unit in the last place, many times, and the logits are compared with those of the undisturbed forward.
"""

# R rows, S slots, N emitted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.backbone.upstream import upstream_modules
from mtptrain.evaluation.certificate_result import NoiseLevel, RoundingNoise, SizeLevel
from mtptrain.run.progress import counted

COPIES = 12  # disturbed computations of each text
QUANTILE = 0.75  # of the differences along a text: robust to single positions, sensitive to most of them
TOLERANCE = 4.0  # measured: decoding differs from transformers' forward by 0.5 to 1.1 times the noise, fp32 and bf16


@dataclass(frozen=True, slots=True)
class Logits:
    """What the logits of a text say about its emitted tokens; float64 [N] each.

    Attributes:
        gap_N: difference of the two largest logits before each token.
        log_p_N: logarithm of each token's probability at temperature 1.
    """

    gap_N: np.ndarray
    log_p_N: np.ndarray


def read_logits(logits_NV: Tensor, tokens: Sequence[int]) -> Logits:
    """Return the gaps and log-probabilities of tokens from the logits before them."""
    logits_NV = logits_NV.float()
    top_N2 = logits_NV.topk(2, dim=-1).values
    token_N1 = torch.tensor(tokens, device=logits_NV.device).unsqueeze(1)
    log_p_N = logits_NV.log_softmax(-1).gather(1, token_N1).squeeze(1)
    return Logits((top_N2[:, 0] - top_N2[:, 1]).double().cpu().numpy(), log_p_N.double().cpu().numpy())


@torch.inference_mode()
def upstream_logits(model: DeepseekV4ForCausalLM, prompts: list[list[int]], texts: list[list[int]]) -> list[Logits]:
    """Return the logits of texts after their prompts, from one forward of transformers' own modules."""
    rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows))
    tokens_RS = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.lm_head.weight.device)
    with upstream_modules(model):
        _, hidden_RSD = run_backbone(model, tokens_RS)
    return [
        read_logits(model.lm_head(hidden_RSD[number, len(prompt) - 1 : len(prompt) + len(text) - 1]), text)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


@contextmanager
def disturbed(modules: Sequence[nn.Module], dtype: torch.dtype, seed: int = 0) -> Iterator[None]:
    """Move every output of the modules' leaves by up to one unit in the last place, inside the block."""
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not torch.is_tensor(output) or not output.is_floating_point():
            return None
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(seed))
        shift = torch.rand(output.shape, generator=generator, device=output.device).mul_(2).sub_(1)
        return (output.float() * (1 + shift * torch.finfo(dtype).eps)).to(output.dtype)

    leaves = {child for module in modules for child in module.modules() if not any(True for _ in child.children())}
    handles = [leaf.register_forward_hook(disturb) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def typical(difference_N: np.ndarray) -> float:
    """Return the typical size of the differences along one text."""
    return float(np.quantile(np.abs(difference_N), QUANTILE)) if len(difference_N) else 0.0


def largest(difference_N: np.ndarray) -> float:
    """Return the largest difference along one text."""
    return float(np.abs(difference_N).max(initial=0.0))


def measure_noise(
    compute: Callable[[], list[Logits]], modules: Sequence[nn.Module], dtype: torch.dtype
) -> RoundingNoise:
    """Return the rounding noise of a computation of logits.

    Args:
        compute: returns the logits of some texts.
        modules: their leaves are disturbed.
        dtype: of the arithmetic.
    """
    exact = compute()
    gaps: list[np.ndarray] = []
    log_ps: list[np.ndarray] = []
    for copy in counted("certificate: measuring the rounding noise", range(COPIES)):
        with disturbed(modules, dtype, copy):
            for one, other in zip(exact, compute(), strict=True):
                gaps.append(other.gap_N - one.gap_N)
                log_ps.append(other.log_p_N - one.log_p_N)
    return RoundingNoise(texts=len(gaps), gap=_level(gaps), log_probability=_level(log_ps))


def _level(differences: list[np.ndarray]) -> NoiseLevel:
    """Return the level of the differences of many texts."""
    return NoiseLevel(
        typical=_size_level([typical(one) for one in differences]),
        largest=_size_level([largest(one) for one in differences]),
        extreme=largest(np.concatenate(differences)),
    )


def _size_level(sizes: list[float]) -> SizeLevel:
    median = float(np.median(sizes))
    bound = TOLERANCE * median
    return SizeLevel(median, bound, sum(size > bound for size in sizes))
