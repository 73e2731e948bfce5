"""Load balancing of routed experts, and metrics of their load."""

# E experts, R routes of all tokens

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtptrain.run.distributed import sum_over_processes


class RouterBalancer:
    """Auxiliary-loss-free load balancing: an expert's selection bias rises when it is chosen too rarely.

    b_e += rate * sign(mean load - load_e) after every optimiser step, with loads summed over all processes.
    Source: arXiv 2412.19437, section 2.1.2.

    Args:
        module: contains top-k routers: modules with `e_score_correction_bias` whose forward returns (_, _, indices).
        rate: size of one correction; 0 leaves the biases unchanged and only measures the loads.
    """

    def __init__(self, module: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = [m for m in module.modules() if hasattr(m, "e_score_correction_bias")]
        self.biases: list[Tensor] = [router.get_buffer("e_score_correction_bias") for router in self.routers]
        self.loads = [torch.zeros_like(bias_E, dtype=torch.int64) for bias_E in self.biases]
        self.seen = [load_E.clone() for load_E in self.loads]  # since the last call of `figures`
        for number, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(number))

    def _counter(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Tensor, Tensor, Tensor]], None]:
        def count(_module: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            if torch.is_grad_enabled():
                expert_R = output[2].flatten()  # torch.bincount would wait for a GPU
                self.loads[number].scatter_add_(0, expert_R, torch.ones_like(expert_R))

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Correct every bias once, using the loads since the last call."""
        if not self.routers:
            return
        parts = sum_over_processes(torch.cat(self.loads)).split([load_E.numel() for load_E in self.loads])
        for bias_E, load_E, seen_E, part_E in zip(self.biases, self.loads, self.seen, parts, strict=True):
            if self.rate > 0:
                load = part_E.to(bias_E.dtype)
                bias_E.add_(self.rate * torch.sign(load.mean() - load))
            seen_E += part_E
            load_E.zero_()

    def figures(self) -> dict[str, float]:
        """Return, for every router, the busiest expert's load over the mean and the number of dead experts.

        Both cover the time since the last call; a dead expert received no token in it.
        """
        figures: dict[str, float] = {}
        for number, seen_E in enumerate(self.seen):
            if seen_E.any():
                figures[f"experts/largest_load_{number}"] = (seen_E.max() / seen_E.double().mean()).item()
                figures[f"experts/dead_{number}"] = float((seen_E == 0).sum())
            seen_E.zero_()
        return figures
