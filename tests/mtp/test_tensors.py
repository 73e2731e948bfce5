"""A process reads and holds its share of a head's experts, and beside it one tensor or one expert at a time."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack, Share, fresh_stack
from mtptrain.mtp.start import stack_from_backbone
from mtptrain.mtp.tensors import EXPERTS, HeadTensors, HeldTensors, build_stack
from mtptrain.release.modules import ReleasedModules, from_release, to_release
from tests.planning.live import LiveBytes, total_bytes
from tests.tiny import random_backbone, random_stack

SHARE = Share(1, 4)
EXPERT = 3 * 128 * 64  # values of one; an FP4 value takes up to 11 bytes beside its result while it is decoded
BACKBONE = random_backbone(n_routed_experts=16, moe_intermediate_size=128)
WHOLE = random_stack(BACKBONE).state_dict()


def built(tensors: HeadTensors, depth: int = 1, dtype: torch.dtype = torch.float32) -> MtpStack:
    return build_stack(BACKBONE.config, depth, tensors, "here", torch.empty(0, dtype=dtype), SHARE)


def own(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `SHARE`."""
    return {name: one.chunk(SHARE.count)[SHARE.number] if EXPERTS in name else one for name, one in whole.items()}


def peak_beside(stack: MtpStack, live: LiveBytes, before: int) -> int:
    """Return the largest number of bytes that were alive beside a stack while it was built."""
    held = total_bytes([*stack.parameters(), *stack.buffers()])
    assert held < len(stack.mtp) * total_bytes([*WHOLE.values()]) / 2
    return live.peak - before - held


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8", "bf16"])
def test_a_released_head_is_decoded_one_expert_at_a_time(scheme: str) -> None:
    released = to_release(WHOLE, BACKBONE.config, scheme)  # type: ignore[arg-type]
    expected = own(from_release(released, BACKBONE.config, torch.float32))
    live = LiveBytes("meta")
    for tensor in released.values():
        live.add(tensor)
    before = live.now
    with live:
        stack = built(ReleasedModules(released, BACKBONE.config))
    assert peak_beside(stack, live, before) < 16 * EXPERT
    torch.testing.assert_close(dict(stack.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_stored_tensors_are_copied_one_at_a_time(depth: int) -> None:
    live = LiveBytes("meta")
    for tensor in WHOLE.values():
        live.add(tensor)
    before = live.now
    with live:
        stack = built(HeldTensors(WHOLE), depth)
    assert peak_beside(stack, live, before) < 4 * EXPERT
    for block in stack.mtp:
        expected = {name.removeprefix("mtp.0."): value for name, value in own(WHOLE).items()}
        torch.testing.assert_close(dict(block.state_dict()), expected, rtol=0, atol=0)


def test_new_weights_are_drawn_some_experts_at_a_time() -> None:
    whole, state = fresh_stack(BACKBONE, 2, 5).state_dict(), torch.get_rng_state()
    live = LiveBytes("meta")
    with live:
        stack = fresh_stack(BACKBONE, 2, 5, SHARE)
    assert peak_beside(stack, live, 0) <= 4 * EXPERT
    torch.testing.assert_close(dict(stack.state_dict()), own(whole), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_new_weights_are_those_of_a_whole_head_if_an_expert_has_an_odd_size() -> None:
    """torch draws normal numbers in groups of 16."""
    model = random_backbone(n_routed_experts=12, moe_intermediate_size=3, hidden_size=34)
    whole = fresh_stack(model, 1, 5).state_dict()
    torch.testing.assert_close(dict(fresh_stack(model, 1, 5, SHARE).state_dict()), own(whole), rtol=0, atol=0)


def test_a_layer_of_the_backbone_is_copied_one_tensor_at_a_time() -> None:
    live = LiveBytes("meta", BACKBONE)
    before = live.now
    with live:
        stack = stack_from_backbone(BACKBONE, 1, SHARE)
    assert peak_beside(stack, live, before) < 4 * EXPERT
    whole = stack_from_backbone(BACKBONE, 1).state_dict()
    torch.testing.assert_close(dict(stack.state_dict()), own(whole), rtol=0, atol=0)


def test_matrices_get_the_dtype_of_the_backbone_and_strict_tensors_stay_fp32() -> None:
    dtypes = {name: one.dtype for name, one in built(HeldTensors(WHOLE), dtype=torch.bfloat16).state_dict().items()}
    assert dtypes["mtp.0.layer.mlp.experts.down_proj"] == torch.bfloat16
    assert dtypes["mtp.0.norm.weight"] == dtypes["mtp.0.layer.attn_hc.fn"] == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"mtp.0.norm.weight": None},
            r"here: its MTP tensors do not fit this backbone: 1 missing, e\.g\. mtp\.0\.norm",
        ),
        ({"mtp.0.more": torch.ones(1)}, r"do not fit this backbone: 1 unexpected, e\.g\. mtp\.0\.more"),
        ({"mtp.2.norm.weight": torch.ones(64)}, r"mtp\.depth=3: here holds MTP modules \[0, 2\]"),
        ({"mtp.0.norm.weight": torch.ones(7)}, r"belongs to another backbone: its mtp\.0\.norm\.weight is \[7\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_any_is_read(change: dict[str, Tensor], reason: str) -> None:
    tensors = {name: one for name, one in (WHOLE | change).items() if one is not None}
    with pytest.raises(UserError, match=reason):
        built(HeldTensors(tensors), depth=3)
