import pytest
import torch

from mtptrain.config import StreamFormat
from mtptrain.hidden_cache.format import bytes_a_token, decode_streams, encode_streams

# T tokens, N residual streams, D model width

# Half a unit in the last place, relative: 24, 8 and 4 bits of significand.
ROUNDING = {StreamFormat.fp32: 0.0, StreamFormat.bf16: 2**-8, StreamFormat.fp8: 2**-4}


def random_streams(T: int, N: int, D: int) -> torch.Tensor:
    """Return streams of T tokens whose magnitudes span six orders."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, N, D, generator=generator) * torch.logspace(-3, 3, T).view(T, 1, 1)


@pytest.mark.parametrize("stored_as", StreamFormat)
def test_stored_streams_come_back_to_the_rounding_of_their_format(stored_as: StreamFormat) -> None:
    streams_TND = random_streams(63, 3, 129)
    decoded_TND = decode_streams(encode_streams(streams_TND, stored_as), torch.float32)
    # Below 2^-6 of the scale e4m3 is subnormal: there its step is 2^-9, against the largest value of 448.
    floor_TN1 = streams_TND.abs().amax(-1, keepdim=True) * (2**-10 / 448 if stored_as is StreamFormat.fp8 else 0)
    allowed_TND = streams_TND.abs() * ROUNDING[stored_as] * (1 + 1e-6) + floor_TN1
    assert ((decoded_TND - streams_TND).abs() <= allowed_TND).all()


def test_a_stream_of_zeros_stays_zero() -> None:
    stored = encode_streams(torch.zeros(2, 1, 5), StreamFormat.fp8)
    assert torch.equal(decode_streams(stored, torch.float32), torch.zeros(2, 1, 5))


@pytest.mark.parametrize("stored_as", StreamFormat)
def test_a_token_takes_the_bytes_that_are_planned(stored_as: StreamFormat) -> None:
    stored = encode_streams(random_streams(7, 3, 129), stored_as)
    assert sum(tensor.nbytes for tensor in stored.values()) == 7 * bytes_a_token(stored_as, 3, 129)


def test_a_token_of_v4_flash_takes_32_kib_in_bf16() -> None:
    assert bytes_a_token(StreamFormat.bf16, 4, 4096) == 32 * 1024
