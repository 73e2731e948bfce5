"""`attn_implementation="mtptrain"` against transformers' eager attention."""

from unittest.mock import Mock

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone import attention
from mtptrain.backbone.attention import NO_CACHE, use_linear_attention
from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import decode_step
from mtptrain.backbone.streams import run_backbone
from tests.tiny import random_backbone

# fp32 rounding through four layers whose activations are of order 10.
TOLERANCE = 2e-4


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def models() -> tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM]:
    """The same weights, eager and ours; window and rates divide neither the lengths nor each other."""
    rates = {"compressed_sparse_attention": 3, "heavily_compressed_attention": 7}
    eager, ours = (random_backbone(sliding_window=11, compress_rates=rates) for _ in range(2))
    use_linear_attention(ours)
    return eager, ours


@pytest.mark.parametrize("length", [1, 2, 8, 63, 129])
@torch.no_grad()
def test_it_equals_eager_attention(models: tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM], length: int) -> None:
    theirs, ours = (run_backbone(model, tokens(length)) for model in models)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_it_equals_eager_attention_through_triton(
    models: tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = run_backbone(models[0], tokens(7, rows=1))
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    rotated = Mock(wraps=attention.rotate_)
    monkeypatch.setattr(attention, "rotate_", rotated)
    ours = run_backbone(models[1], tokens(7, rows=1))
    assert rotated.call_count == 1  # the indexer's queries; outputs are rotated back by their attention
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(
    models: tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM],
) -> None:
    largest = []
    for length in (256, 512, 768):
        with Largest() as seen:
            run_backbone(models[1], tokens(length, rows=1))
        largest.append(seen.numel)
    # Quadratic growth would give 5 / 3. The number of closed windows is rounded down, hence 1.1.
    assert largest[2] - largest[1] <= 1.1 * (largest[1] - largest[0])


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_caches_padding_masks_and_unprepared_models_are_refused(
    models: tuple[DeepseekV4ForCausalLM, DeepseekV4ForCausalLM],
) -> None:
    _, ours = models
    with pytest.raises(ValueError, match="use_cache=False") as raised:
        ours(input_ids=tokens(9), use_cache=True)
    assert str(raised.value) == NO_CACHE
    with pytest.raises(ValueError, match="knows no padding mask"):
        ours(input_ids=tokens(9), use_cache=False, attention_mask=torch.arange(9).expand(2, 9) > 2)
    bare = random_backbone()
    bare.set_attn_implementation("mtptrain")
    with pytest.raises(ValueError, match="needs `use_linear_attention"):
        bare(input_ids=tokens(9), use_cache=False)


@torch.no_grad()
def test_verifying_through_triton_equals_the_full_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = random_backbone(), tokens(24)
    _, expected = run_backbone(model, text)
    cache = BackboneCache.allocate(model.config, batch=2, max_length=32, max_step=3)
    decode_step(model, cache, text[:, :20])
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    for part in (slice(20, 23), slice(23, 24)):
        _, hidden_BSD = decode_step(model, cache, text[:, part])
        torch.testing.assert_close(hidden_BSD, expected[:, part], atol=TOLERANCE, rtol=TOLERANCE)
