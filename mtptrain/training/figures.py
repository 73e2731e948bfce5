"""The figures of a training's progress line."""

from __future__ import annotations

import math
from collections.abc import Mapping


def progress_figures(means: Mapping[str, float]) -> str:
    """Return the loss of the first step and, if measured, alpha of every step, from their means by name."""
    parts = [f"loss {_figure(means['loss/step_1'])}"] if "loss/step_1" in means else []
    alphas = [_figure(value) for name, value in means.items() if name.startswith("alpha/")]
    if alphas:
        parts.append("alpha " + "/".join(alphas))
    return "  ".join(parts)


def _figure(value: float) -> str:
    """Return a figure with three decimals, or `-` for the mean of nothing."""
    return "-" if math.isnan(value) else f"{value:.3f}"
