"""DeepSeek-V4's attention: the definitions, the blocked paths and the Triton functions themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.norm_rotate.reference import rotate_reference
from mtptrain.kernels.sink_attention import rollout_attention
from mtptrain.kernels.sink_attention.blocked import cached_attention_blocked, rollout_attention_blocked
from mtptrain.kernels.sink_attention.kernel import cached_attention_triton, rollout_attention_triton
from mtptrain.kernels.sink_attention.reference import (
    Cached,
    cached_attention_reference,
    document_starts,
    rollout_attention_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Inputs = dict[str, Tensor | None]

# B rows, S anchors, H heads, C head width, L chain keys, r rotated channel pairs


def turns(*shape: int) -> Tensor:
    """Return rotations by random angles, [B, S, r]."""
    angle = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 6
    return torch.polar(torch.ones_like(angle), angle)


def random_rollout(
    B: int, S: int, H: int, C: int, L: int, dtype: torch.dtype = torch.float32, size: float = 1.0, seed: int = 0
) -> Inputs:
    """Return inputs of `rollout_attention`; a long row holds three documents, and C - 2 channels are rotated."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype).to(DEVICE)

    segment_BS = (torch.arange(S) * 3 // max(S - 1, 1)).expand(B, S) + 1
    return {
        "query_BHSC": values(B, S, H, C).transpose(1, 2),
        "context_BSC": values(B, S, C),
        "chain_BSLC": values(B, S, L, C) if L else None,
        "sinks_H": values(H).float(),
        "start_BS": document_starts(segment_BS).to(DEVICE),
        "turn_BSr": turns(B, S, C // 2 - 1),
    }


def run(op: Callable[..., Tensor], inputs: Inputs, window: int) -> list[Tensor]:
    """Return the output, and every gradient of a random scalar of it."""
    leaves = [
        value.detach().requires_grad_(value.is_floating_point()) if value is not None else None
        for value in inputs.values()
    ]
    out_BHSC = op(*leaves, window=window, scale=0.3)
    weights = torch.randn(out_BHSC.shape, generator=torch.Generator().manual_seed(1)).to(out_BHSC)
    (out_BHSC * weights).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [out_BHSC.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


def assert_close(actual: list[Tensor], expected: list[Tensor], ulps: int) -> None:
    """Compare up to `ulps` roundings of the output's dtype, relative to each tensor's largest value."""
    assert len(actual) == len(expected)
    eps = torch.finfo(expected[0].dtype).eps
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        atol = ulps * eps * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("B", "S", "H", "C", "L", "window"),
    [(1, 1, 1, 8, 0, 1), (2, 63, 3, 16, 0, 7), (1, 129, 2, 8, 2, 64), (1, 130, 2, 8, 3, 3), (1, 200, 1, 8, 1, 300)],
)
def test_blocks_equal_the_definition(B: int, S: int, H: int, C: int, L: int, window: int) -> None:
    inputs = random_rollout(B, S, H, C, L)
    # A few sums of up to `window` terms of order 1, in another order.
    assert_close(
        run(rollout_attention_blocked, inputs, window), run(rollout_attention_reference, inputs, window), ulps=64
    )


@pytest.mark.parametrize(
    ("B", "S", "H", "C", "L", "window"),
    [(1, 1, 1, 16, 0, 1), (1, 1, 2, 16, 1, 1), (2, 9, 3, 20, 0, 5), (1, 63, 1, 16, 1, 6), (1, 5, 33, 16, 1, 40)],
)
@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_equals_the_definition(B: int, S: int, H: int, C: int, L: int, window: int) -> None:
    inputs = random_rollout(B, S, H, C, L)
    assert_close(
        run(rollout_attention_triton, inputs, window), run(rollout_attention_reference, inputs, window), ulps=64
    )


@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_equals_the_definition_in_bfloat16() -> None:
    inputs = random_rollout(1, 13, 4, 32, 2, torch.bfloat16)
    expected = run(rollout_attention_reference, inputs, 8)
    # Weights and dz are rounded to bf16 before their products, as tensor cores want them.
    assert_close(run(rollout_attention_triton, inputs, 8), expected, ulps=4)


@pytest.mark.usefixtures("_poisoned_memory")
def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    inputs = random_rollout(1, 11, 2, 16, 2, size=30.0)
    expected = run(rollout_attention_reference, inputs, 6)
    for op in (rollout_attention_blocked, rollout_attention_triton):
        actual = run(op, inputs, 6)
        assert all(value.isfinite().all() for value in actual)
        # The scores reach 1e4, where one ulp of a score already moves a weight by 1e-3.
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("op", [rollout_attention_blocked, rollout_attention_triton])
def test_a_sink_of_minus_infinity_takes_nothing(op: Callable[..., Tensor]) -> None:
    inputs = random_rollout(1, 9, 2, 16, 1)
    without = inputs | {"sinks_H": torch.full((2,), float("-inf"), device=DEVICE)}
    assert_close(run(op, without, 5)[:4], run(rollout_attention_reference, without, 5)[:4], ulps=64)


@pytest.mark.parametrize("op", [rollout_attention_blocked, rollout_attention_triton])
def test_equal_keys_share_the_weight_equally(op: Callable[..., Tensor]) -> None:
    inputs = random_rollout(1, 7, 1, 16, 0)
    ones = inputs | {"context_BSC": torch.ones(1, 7, 16, device=DEVICE), "sinks_H": torch.zeros(1, device=DEVICE)}
    ones["query_BHSC"] = torch.zeros_like(inputs["query_BHSC"])
    ones["start_BS"] = torch.zeros(1, 7, dtype=torch.int64, device=DEVICE)
    ones["turn_BSr"] = torch.ones_like(inputs["turn_BSr"])
    out_S = op(*ones.values(), window=4, scale=1.0)[0, 0, :, 0]
    seen_S = torch.tensor([1, 2, 3, 4, 4, 4, 4], device=DEVICE)
    torch.testing.assert_close(out_S, seen_S / (seen_S + 1))


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    kept = []
    for S in (128, 256, 384):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            inputs = random_rollout(1, S, 2, 8, 2)
            inputs["query_BHSC"].requires_grad_()
            rollout_attention(*inputs.values(), window=16, scale=0.3)
        kept.append(sum(sizes))
    assert kept[2] - kept[1] == kept[1] - kept[0]


def random_layer(B: int, S: int, R: int, W: int, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Cached]:
    """Return queries of two heads after a ring of R keys, and T chosen ones of W entries; 0 means none."""
    generator = torch.Generator().manual_seed(S)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    length_B = torch.randint(3 * R + 1, (B,), generator=generator) if R else torch.zeros(B, dtype=torch.int64)
    chosen_BST = torch.rand(B, S, max(W, 1), generator=generator).topk(max(T, 1)).indices
    chosen_BST[:, ::2, -1] = -1
    # Entries lie in a larger buffer; its last one is scratch.
    entries_BWC = values(B, W + 1, 16)[:, :-1] if W else None
    cached = Cached(values(B, R + S, 16), entries_BWC, chosen_BST.to(DEVICE) if T else None, length_B.to(DEVICE))
    return values(B, S, 2, 16).transpose(1, 2), cached


@pytest.mark.parametrize(
    ("op", "B", "S", "R", "W", "T"),
    [
        (cached_attention_blocked, 2, 129, 0, 43, 0),
        (cached_attention_blocked, 1, 63, 0, 21, 5),
        (cached_attention_blocked, 2, 70, 12, 40, 7),
        (cached_attention_triton, 1, 9, 0, 0, 0),
        (cached_attention_triton, 1, 19, 0, 6, 0),
        (cached_attention_triton, 1, 9, 0, 3, 2),
        (cached_attention_triton, 3, 5, 12, 0, 0),
        (cached_attention_triton, 3, 1, 12, 19, 0),
        (cached_attention_triton, 3, 5, 12, 19, 17),
    ],
)
@pytest.mark.usefixtures("_poisoned_memory")
def test_a_layer_of_the_backbone_equals_its_definition(
    op: Callable[..., Tensor], B: int, S: int, R: int, W: int, T: int
) -> None:
    query_BHSC, cached = random_layer(B, S, R, W, T)
    settings = {"sinks_H": torch.tensor([0.5, -1.0], device=DEVICE), "window": 7, "rate": 3, "scale": 0.3}
    settings["turn_BSr"] = turns(1, S, 8 if W else 3)  # one row for all
    expected = cached_attention_reference(query_BHSC, cached, **settings)
    assert_close([op(query_BHSC, cached, **settings)], [expected], ulps=16)


@pytest.mark.parametrize("op", [cached_attention_blocked, cached_attention_triton])
def test_a_layer_without_rotations_gives_the_plain_output(op: Callable[..., Tensor]) -> None:
    query_BHSC, cached = random_layer(1, 2, 12, 0, 0)
    settings = {"sinks_H": torch.zeros(2, device=DEVICE), "window": 7, "rate": 3, "scale": 0.3}
    plain = cached_attention_reference(query_BHSC, cached, **settings)
    assert_close([op(query_BHSC, cached, **settings)], [plain], ulps=16)
    turn_BSr = turns(1, 2, 5)
    rotated = rotate_reference(plain, turn_BSr.conj().unsqueeze(1))
    assert_close([op(query_BHSC, cached, turn_BSr=turn_BSr, **settings)], [rotated], ulps=16)


def test_a_layer_of_the_backbone_in_bfloat16_equals_its_definition() -> None:
    query_BHSC, cached = random_layer(2, 4, 12, 19, 6, torch.bfloat16)
    settings = {
        "sinks_H": torch.zeros(2, device=DEVICE),
        "window": 7,
        "rate": 3,
        "scale": 0.3,
        "turn_BSr": turns(2, 4, 4),
    }
    expected = cached_attention_reference(query_BHSC, cached, **settings)
    assert_close([cached_attention_triton(query_BHSC, cached, **settings)], [expected], ulps=4)


def test_wrong_shapes_are_named() -> None:
    inputs = random_rollout(1, 5, 2, 8, 2)
    for name, value, message in [
        ("context_BSC", torch.zeros(1, 4, 8), "one key per slot"),
        ("chain_BSLC", torch.zeros(1, 4, 2, 8), "L keys per slot"),
        ("start_BS", torch.zeros(1, 4), "see document_starts"),
        ("turn_BSr", turns(1, 4, 2), r"must be \(1 or 1, 5, up to 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            rollout_attention(*(inputs | {name: value}).values(), window=4, scale=1.0)
    with pytest.raises(ValueError, match="must hold the chain's 2 keys"):
        rollout_attention(*inputs.values(), window=1, scale=1.0)
