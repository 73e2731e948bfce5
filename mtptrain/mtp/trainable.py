"""Which tensors of a head are trained."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack

EXPERTS = "*.mlp.experts.*"  # the routed experts: all but a fortieth of V4-Flash's head


def freeze_untrained(stack: MtpStack, trainable: str) -> None:
    """Freeze what `mtp.trainable` leaves out: no gradient, no master, no state of the optimiser.

    Args:
        stack: the modules.
        trainable: `all`, `no_experts`, or patterns of names, separated by commas, as in `*.e_proj.*,*.h_proj.*`.

    Raises:
        UserError: a pattern fits no tensor.
    """
    names = [name for name, _ in stack.named_parameters()]
    if trainable == "no_experts":
        trained = {name for name in names if not fnmatchcase(name, EXPERTS)}
    else:
        trained = set()
        for pattern in ["*"] if trainable == "all" else trainable.split(","):
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise UserError(
                    f"mtp.trainable={trainable}: {pattern!r} fits no tensor of the head; use all, no_experts, or "
                    f"patterns of names such as {names[0]}"
                )
            trained |= found
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name in trained)
