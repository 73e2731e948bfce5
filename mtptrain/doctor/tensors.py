"""Faults of a head's tensors, detected before any computation with them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.doctor.result import TensorFaults
from mtptrain.release.names import our_shapes
from mtptrain.release.problems import Problems


def expected_shapes(config: DeepseekV4Config, depth: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `depth` modules by our names `mtp.{d}.*`."""
    return {f"mtp.{d}.{name}": shape for d in range(depth) for name, shape in our_shapes(config).items()}


def examine_tensors(
    tensors: Mapping[str, Tensor],
    config: DeepseekV4Config,
    depth: int,
    stock: Mapping[str, Tensor] | None = None,
    stored: Problems | None = None,
) -> TensorFaults:
    """Return the faults of a head's tensors.

    Args:
        tensors: our `mtp.{d}.*`; of a release, the readable ones.
        config: the backbone's.
        depth: modules that the head should have.
        stock: tensors of the stock head, to detect untrained ones; None if there is none, or if it is the head itself.
        stored: problems of a release's stored tensors; if there are any, they are reported instead of the problems
            that they cause under our names.
    """
    shapes = expected_shapes(config, depth)
    known = {name: tensor for name, tensor in tensors.items() if name in shapes}
    # As float32, because isfinite is not implemented for float8.
    finite = {name: tensor for name, tensor in known.items() if bool(tensor.float().isfinite().all())}
    # Vectors may be all zero at the start (biases) or all one (norms); a matrix of zeros cuts the network in two.
    zero = [name for name, tensor in finite.items() if tensor.ndim > 1 and not bool(tensor.any())]
    derived = Problems(
        missing=[name for name in shapes if name not in tensors],
        unexpected=sorted(set(tensors) - set(shapes)),
        misshaped=[
            f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            for name, tensor in known.items()
            if tuple(tensor.shape) != shapes[name]
        ],
        damaged=[name for name in known if name not in finite],
        expected=len(shapes),
    )
    problems = stored if stored is not None and stored.any() else derived
    errors = (problems.missing, problems.unexpected, problems.misshaped, problems.damaged, zero)
    return TensorFaults(
        expected=problems.expected,
        missing=problems.missing,
        unexpected=problems.unexpected,
        misshaped=problems.misshaped,
        non_finite=problems.damaged,
        zero=zero,
        constant=[name for name, t in finite.items() if t.numel() > 1 and name not in zero and _is_constant(t)],
        same_as_stock=[name for name, tensor in finite.items() if _same(tensor, (stock or {}).get(name))],
        same_as_depth_before=[name for name, t in finite.items() if _same(t, known.get(_depth_before(name)))],
        is_dspark=stored is not None and stored.is_dspark,
        errors=sum(map(len, errors)),
    )


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and bool((tensor == other.to(tensor.dtype)).all())


def _depth_before(name: str) -> str:
    """Return the name of the same tensor one module before."""
    _, depth, rest = name.split(".", 2)
    return f"mtp.{int(depth) - 1}.{rest}"
