"""The Triton functions of `acceptance` themselves: compiled where a GPU is, interpreted elsewhere."""

import pytest
import torch

from mtptrain.kernels.acceptance import Stream
from mtptrain.kernels.acceptance.draws import uniforms_reference
from mtptrain.kernels.acceptance.kernel import uniforms_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# B rows, N draws.


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("rows", "num_draws"), [(1, 1), (63, 5), (3, 129), (3, 0), (0, 4)])
def test_draws_equal_the_reference_bit_by_bit(rows: int, num_draws: int, stream: Stream) -> None:
    generator = torch.Generator().manual_seed(rows)
    seed_B = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    position_B = torch.randint(2**40, (rows,), generator=generator)
    found_BN = uniforms_triton(seed_B.to(DEVICE), position_B.to(DEVICE), stream, num_draws)
    assert torch.equal(found_BN.cpu(), uniforms_reference(seed_B, position_B, stream, num_draws))
