"""Run the random backbone with and without its cache, and read the part of a cache that later steps may use."""

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache, CompressorState, SlidingRing
from mtptrain.backbone.decode import decode_step
from mtptrain.backbone.decode import prefill as prefill_parts

# B rows, S tokens, s of them in a step, N residual streams, D hidden size, R slots of a ring, C channels

LENGTH = 76  # tokens of the reference: nine windows of 8, nineteen of 4, and five turns of the ring of 13 slots
MAX_LENGTH = 90
MAX_STEP = 5


def random_tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def transformers_forward(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    streams: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: streams.append(output))
    with torch.no_grad():
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    hook.remove()
    return streams[0], hidden_BSD


def empty_cache(model: DeepseekV4ForCausalLM, batch: int, max_length: int = MAX_LENGTH) -> BackboneCache:
    return BackboneCache.allocate(model.config, batch, max_length, MAX_STEP)


def prefill(
    model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Return streams and hidden states of prompts of one length."""
    batch, length = tokens_BS.shape
    parts = list(prefill_parts(model, cache, tokens_BS, [length] * batch, chunk))
    return torch.cat([part.streams_BSND for part in parts], 1), torch.cat([part.hidden_BSD for part in parts], 1)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    # Four layers of fp32 sums in another order: some tens of ulps of the largest value (at most 25 observed).
    largest = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = 64 * torch.finfo(torch.float32).eps * max(1.0, largest)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def decode_in_steps(
    model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    parts = [decode_step(model, cache, tokens_Bs) for tokens_Bs in tokens_BS.split(sizes, dim=1)]
    streams, hidden = zip(*parts, strict=True)
    return torch.cat(streams, dim=1), torch.cat(hidden, dim=1)


def step_sizes(total: int, pattern: list[int]) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(pattern[len(sizes) % len(pattern)], total - sum(sizes)))
    return sizes


def defined_state(cache: BackboneCache, length: int) -> list[Tensor]:
    """Return every part of a one-row cache that decoding from `length` on may read, in order of position."""

    def newest(ring: SlidingRing, start: int) -> Tensor:
        return ring.values_BRC[0, torch.arange(max(start, 0), length) % ring.size]

    def compressor(state: CompressorState) -> list[Tensor]:
        open_window = length // state.rate
        raw = newest(state.raw, (open_window - state.span + 1) * state.rate)
        return [raw, state.entries_BWC[0, :open_window]]

    parts: list[Tensor] = []
    for layer in cache.layers:
        parts.append(newest(layer.ring, length - cache.window + 1))
        parts += [part for state in (layer.compressor, layer.indexer) if state for part in compressor(state)]
    return parts
