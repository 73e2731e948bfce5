"""What is wrong with the tensors of a head before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.mtp.release_names import our_shapes
from mtptrain.mtp.release_problems import Problems


def expected_shapes(config: DeepseekV4Config, depth: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `depth` modules by our names `mtp.{d}.*`."""
    return {f"mtp.{d}.{name}": shape for d in range(depth) for name, shape in our_shapes(config).items()}


def examine_tensors(
    tensors: Mapping[str, Tensor],
    config: DeepseekV4Config,
    depth: int,
    stock: Mapping[str, Tensor] | None = None,
    stored: Problems | None = None,
) -> dict[str, Any]:
    """What is wrong with a head: tensors by the kind of fault.

    Args:
        tensors: our `mtp.{d}.*`; of a release, those that could be read.
        config: the backbone's.
        depth: modules that the head should have.
        stock: those of the stock head, to tell what was never trained; None where they are the same or there is none.
        stored: what is wrong with a release's own tensors, which then stands in place of what that makes wrong here.

    Returns:
        `expected`, a count; `is_dspark`, whether they look like blocks of that kind; `missing`, `unexpected`,
        `misshaped`, `non_finite` and `zero` (errors; names, of some with what is wrong); `constant`, `same_as_stock`
        and `same_as_depth_before` (to know, since they may be meant); `errors`, how many of those five kinds.
    """
    shapes = expected_shapes(config, depth)
    found = {name: tensor for name, tensor in tensors.items() if name in shapes}
    # torch does not say which one-byte floats are finite.
    sound = {name: tensor for name, tensor in found.items() if bool(tensor.float().isfinite().all())}
    # Vectors may be all zero at the start (biases) or all one (norms); a matrix of zeros cuts the network in two.
    zero = [name for name, tensor in sound.items() if tensor.ndim > 1 and not bool(tensor.any())]
    report: dict[str, Any] = {
        "expected": len(shapes),
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": sorted(set(tensors) - set(shapes)),
        "misshaped": [
            f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            for name, tensor in found.items()
            if tuple(tensor.shape) != shapes[name]
        ],
        "non_finite": [name for name in found if name not in sound],
        "zero": zero,
        "constant": [name for name, t in sound.items() if t.numel() > 1 and name not in zero and _is_constant(t)],
        "same_as_stock": [name for name, tensor in sound.items() if _same(tensor, (stock or {}).get(name))],
        "same_as_depth_before": [name for name, t in sound.items() if _same(t, found.get(_depth_before(name)))],
    }
    if stored is not None and stored.any():
        report |= {
            "expected": stored.expected,
            "missing": stored.missing,
            "unexpected": stored.unexpected,
            "misshaped": stored.misshaped,
            "non_finite": stored.damaged,
        }
    report["is_dspark"] = stored is not None and stored.is_dspark
    report["errors"] = sum(len(report[kind]) for kind in ("missing", "unexpected", "misshaped", "non_finite", "zero"))
    return report


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and bool((tensor == other.to(tensor.dtype)).all())


def _depth_before(name: str) -> str:
    _, depth, rest = name.split(".", 2)
    return f"mtp.{int(depth) - 1}.{rest}"
