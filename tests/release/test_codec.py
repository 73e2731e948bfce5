import math

import pytest
import torch
from torch import Tensor

from mtptrain.errors import UserError
from mtptrain.release.codec import (
    FP4_BLOCK,
    FP4_GRID,
    FP8_BLOCK,
    SCALE_DTYPES,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    powers,
    scale_shape,
    store_scales,
)
from mtptrain.release.encoding_error import encoding_error, rounding_error

SIZES = [(1, 2), (63, 64), (129, 130), (130, 258), (257, 34)]
FP8_BYTES = [code for code in range(256) if code & 0x7F != 0x7F]
# Half a step of the coarsest part of the grid, in units of the scale: 256..448 step 32, and 4..6 step 2.
FP8_BOUND, FP4_BOUND = 16.0, 1.0


def fp8_value(code: int) -> float:
    """The value of an e4m3 byte from its definition."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -magnitude if sign else magnitude


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return values of different magnitude in each row, with a zero block if there are several blocks."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randn(rows, 1, generator=generator)
    weight[:128, -32:] *= 0 if columns > 128 else 1
    return weight


def random_fp8(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.tensor(FP8_BYTES, dtype=torch.uint8)[torch.randint(254, (rows, columns), generator=generator)]
    scale = torch.randint(90, 140, scale_shape((rows, columns), FP8_BLOCK), generator=generator, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def random_fp4(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
    scale = torch.randint(90, 140, scale_shape((rows, columns), FP4_BLOCK), generator=generator, dtype=torch.uint8)
    return codes, scale.view(torch.float8_e8m0fnu)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def repeated(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """2^(b - 127) of every value, fp64."""
    power = 2.0 ** (scale.view(torch.uint8).double() - 127)
    return power.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def test_every_fp8_code_under_every_scale_decodes_to_its_definition_and_encodes_to_itself() -> None:
    codes = torch.tensor(FP8_BYTES, dtype=torch.uint8).repeat(128, 1)[:, :128].contiguous()
    codes[1:] = torch.tensor(FP8_BYTES, dtype=torch.uint8)[126:].repeat(127, 1)  # row 0 and row 1 hold all 254
    held = codes.view(torch.float8_e4m3fn)
    expected = torch.tensor([[fp8_value(int(code)) for code in row] for row in codes[:2]], dtype=torch.float64)
    for byte in range(247):  # 448 * 2^(247 - 127) is beyond fp32
        scale = torch.tensor([[byte]], dtype=torch.uint8)
        weight = decode_fp8(held, scale, torch.float32)
        assert torch.equal(weight[:2].double(), expected * 2.0 ** (byte - 127))
        assert same_bytes(encode_fp8(weight, scale)[0], held)


@pytest.mark.parametrize("byte", range(247, 255))
def test_fp8_scales_whose_largest_products_overflow_are_exact_for_the_codes_that_fit_and_refused_for_others(
    byte: int,
) -> None:
    fits = [code for code in FP8_BYTES if abs(fp8_value(code)) * 2.0 ** (byte - 127) < 2.0**128]
    codes = torch.tensor([fits], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.full(scale_shape((1, len(fits)), FP8_BLOCK), byte, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        weight = decode_fp8(codes, scale, dtype)
        assert weight.tolist() == [[fp8_value(code) * 2.0 ** (byte - 127) for code in fits]]
        assert same_bytes(encode_fp8(weight, scale)[0], codes)
    with pytest.raises(UserError, match="e_proj: a value overflows fp32"):
        decode_fp8(torch.full((1, 3), 448.0).to(torch.float8_e4m3fn), scale[:, :1], torch.float32, "e_proj")


def test_every_packed_fp4_byte_under_every_scale_decodes_to_its_definition_and_encodes_to_itself() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.int8).view(1, 256).repeat(252, 1)
    scale = torch.arange(252, dtype=torch.uint8).view(252, 1).repeat(1, 16)  # 6 * 2^(252 - 127) is beyond bf16
    grid = torch.tensor([*FP4_GRID, *(-value for value in FP4_GRID)], dtype=torch.float64)
    unsigned = codes.view(torch.uint8).long()
    expected = torch.stack([grid[unsigned & 15], grid[unsigned >> 4]], dim=-1).view(252, 512)  # low nibble first
    weight = decode_fp4(codes, scale, torch.float32)
    assert torch.equal(weight.double(), expected * repeated(scale, (252, 512), FP4_BLOCK))
    assert same_bytes(encode_fp4(weight, scale)[0], codes)


@pytest.mark.parametrize("byte", [252, 253, 254])
def test_fp4_under_the_largest_scales_is_exact_or_refused(byte: int) -> None:
    scale = torch.tensor([[byte]], dtype=torch.uint8)
    fits = [code for code in range(16) if FP4_GRID[code & 7] * 2.0 ** (byte - 127) < 2.0**128]
    codes = torch.tensor([[low | high << 4 for low, high in zip(fits, fits[::-1], strict=True)]], dtype=torch.int32)
    held = codes.to(torch.int8)
    weight = decode_fp4(held, scale, torch.float32)
    assert same_bytes(encode_fp4(weight, scale)[0], held)
    if len(fits) < 16:
        with pytest.raises(UserError, match="w1: a value overflows fp32"):
            decode_fp4(torch.tensor([[7]], dtype=torch.int8), scale, torch.float32, "w1")


def test_bf16_holds_every_product_but_those_below_its_last_bit_which_are_refused() -> None:
    codes = torch.tensor([[code for code in FP8_BYTES if code & 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    for byte in range(6):
        scale = torch.full(scale_shape((1, 252), FP8_BLOCK), byte, dtype=torch.uint8)
        exact = decode_fp8(codes, scale, torch.float32)
        if torch.equal(exact.bfloat16().float(), exact):
            assert torch.equal(decode_fp8(codes, scale).float(), exact)
        else:
            with pytest.raises(UserError, match=r"h_proj: torch.bfloat16 cannot hold .* decode to float32"):
                decode_fp8(codes, scale, name="h_proj")


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (1, 1), (129, 63), (130, 257)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_with_the_released_scales_gives_the_same_bytes(rows: int, columns: int, dtype: torch.dtype) -> None:
    codes, scale = random_fp8(rows, columns)
    weight = decode_fp8(codes, scale, dtype)
    assert torch.equal(weight.double(), codes.double() * repeated(scale, (rows, columns), FP8_BLOCK))
    again, same = encode_fp8(weight, scale)
    assert same_bytes(again, codes)
    assert same_bytes(same, scale)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_with_the_released_scales_gives_the_same_bytes(rows: int, columns: int, dtype: torch.dtype) -> None:
    codes, scale = random_fp4(rows, columns)
    again, same = encode_fp4(decode_fp4(codes, scale, dtype), scale)
    assert same_bytes(again, codes)
    assert same_bytes(same, scale)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_values_of_a_release_survive_scales_chosen_anew_and_bytes_where_the_scale_was_the_smallest(
    rows: int, columns: int
) -> None:
    for (codes, scale), decode, encode in (
        (random_fp8(rows, columns), decode_fp8, encode_fp8),
        (random_fp4(rows, columns), decode_fp4, encode_fp4),
    ):
        weight = decode(codes, scale)
        chosen, smallest = encode(weight)
        assert torch.equal(decode(chosen, smallest), weight)
        assert torch.equal(decode(chosen, smallest).signbit(), weight.signbit())
        again, same = encode(decode(chosen, smallest))
        assert same_bytes(again, chosen)
        assert same_bytes(same, smallest)


@pytest.mark.parametrize(("encode", "block", "largest"), [(encode_fp8, FP8_BLOCK, 448), (encode_fp4, FP4_BLOCK, 6)])
def test_the_chosen_scale_is_the_smallest_power_of_two_that_fits(
    encode: type[encode_fp8], block: tuple[int, int], largest: int
) -> None:
    tops = [1.0, 6.0, 6.0001, 448.0, 448.1, 3e38, 2.0**-126, 1e-40, 1e-45, 0.0]
    weight = torch.zeros(len(tops) * block[0], 2)
    weight[:: block[0], 1] = torch.tensor(tops)
    _, scale = encode(weight)
    for top, byte in zip(weight[:: block[0], 1].double().tolist(), scale.view(torch.uint8)[:, 0].tolist(), strict=True):
        assert byte == 127 if top == 0 else top <= largest * 2.0 ** (byte - 127)
        assert byte in (0, 127) or top > largest * 2.0 ** (byte - 128)


def nearest_even(values: Tensor, grid: list[float]) -> Tensor:
    """Return the nearest value of `grid` (ascending, even indices are even codes), ties to the even index."""
    distance = (values.double().abs()[:, None] - torch.tensor(grid, dtype=torch.float64)).abs()
    distance[:, 1::2] *= 1 + 1e-15  # breaks ties towards even indices, and changes nothing else at these magnitudes
    return torch.tensor(grid, dtype=torch.float64)[distance.argmin(-1)] * torch.where(values.signbit(), -1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_half_to_even_at_every_tie_and_beside_it(dtype: torch.dtype) -> None:
    one = torch.tensor([[127]], dtype=torch.uint8)
    fp8_grid = [fp8_value(code) for code in range(127)]
    for grid, encode, decode in ((list(FP4_GRID), encode_fp4, decode_fp4), (fp8_grid, encode_fp8, decode_fp8)):
        middle = (torch.tensor(grid[1:]) + torch.tensor(grid[:-1])).div(2).to(dtype)
        beside = [torch.nextafter(middle, torch.tensor(far, dtype=dtype)) for far in (0.0, 9999.0)]
        values = torch.cat([middle, *beside, torch.tensor(grid, dtype=dtype)])
        values = torch.cat([values, -values]).view(-1, 1).repeat(1, 2)
        scale = one.expand(scale_shape((len(values), 2), FP4_BLOCK if len(grid) == 8 else FP8_BLOCK))
        decoded = decode(encode(values, scale)[0], scale, torch.float32)
        assert torch.equal(decoded[:, 0].double(), nearest_even(values[:, 0], grid))
        assert torch.equal(decoded[:, 0], decoded[:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_error_of_a_trained_weight_is_bounded_in_units_of_its_scale(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = random_weight(rows, columns).to(dtype)
    for encode, decode, block, bound in (
        (encode_fp8, decode_fp8, FP8_BLOCK, FP8_BOUND),
        (encode_fp4, decode_fp4, FP4_BLOCK, FP4_BOUND),
    ):
        codes, scale = encode(weight)
        decoded = decode(codes, scale, torch.float32)
        error = encoding_error(weight, decoded, scale, block)
        gap = (weight.double() - decoded.double()).abs()
        assert error.absolute == float(gap.max()) > 0
        assert error.relative == float((gap / repeated(scale, (rows, columns), block)).max()) <= bound


def test_the_error_of_bf16_is_bounded_by_half_a_step() -> None:
    weight = random_weight(63, 129)
    assert 0 < rounding_error(weight, weight.bfloat16()).relative <= 2.0**-8
    assert rounding_error(weight.bfloat16(), weight.bfloat16()).absolute == 0
    assert rounding_error(torch.zeros(3), torch.zeros(3)).relative == 0


def test_pieces_of_rows_give_what_a_single_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(130, 258)
    whole = encode_fp4(weight)
    monkeypatch.setattr("mtptrain.release.codec.CHUNK", 1)
    assert all(same_bytes(a, b) for a, b in zip(encode_fp4(weight), whole, strict=True))
    assert torch.equal(decode_fp4(*encode_fp4(weight)), decode_fp4(*whole))


def test_encoding_leaves_the_weight_alone_and_takes_any_strides() -> None:
    weight = random_weight(130, 258)
    before = weight.clone()
    for encode in (encode_fp8, encode_fp4):
        expected = encode(weight)
        strided = encode(weight.t().contiguous().t())
        assert all(same_bytes(a, b) for a, b in zip(strided, expected, strict=True))
        assert same_bytes(weight, before)


@pytest.mark.parametrize("encode", [encode_fp8, encode_fp4])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_are_refused_by_name(encode: type[encode_fp8], value: float, dtype: torch.dtype) -> None:
    weight = random_weight(130, 258).to(dtype)
    weight[129, 257] = value
    with pytest.raises(UserError, match=r"mtp\.0\.e_proj: a value in rows .*129 is NaN or infinite"):
        encode(weight, None, "mtp.0.e_proj")


@pytest.mark.parametrize(("encode", "fits", "beyond"), [(encode_fp8, 464.0, 465.0), (encode_fp4, 6.9999995, 7.0)])
def test_a_value_nearer_to_the_next_power_than_to_the_grid_is_refused_under_a_given_scale(
    encode: type[encode_fp8], fits: float, beyond: float
) -> None:
    one = torch.tensor([[127]], dtype=torch.uint8)
    encode(torch.tensor([[fits, -fits]]), one)
    with pytest.raises(UserError, match=r"w2: a value in rows 0\.\.0 is too large for the scale"):
        encode(torch.tensor([[0.0, -beyond]]), one, "w2")


def test_damaged_or_mismatched_input_is_refused_by_name() -> None:
    codes, scale = random_fp8(129, 130)
    packed, groups = random_fp4(3, 64)
    for code in (0x7F, 0xFF):
        damaged = codes.view(torch.uint8).clone()
        damaged[128, 129] = code
        with pytest.raises(UserError, match="x: holds a NaN code"):
            decode_fp8(damaged.view(torch.float8_e4m3fn), scale, name="x")
    broken = scale.view(torch.uint8).clone()
    broken[1, 1] = 255
    for call in (lambda: decode_fp8(codes, broken, name="x"), lambda: encode_fp8(torch.ones(129, 130), broken, "x")):
        with pytest.raises(UserError, match="x: a scale is NaN"):
            call()
    with pytest.raises(UserError, match=r"x: its scale must have the shape \[2, 2\], has \[1, 2\]"):
        decode_fp8(codes, scale[:1], name="x")
    with pytest.raises(UserError, match=r"x: its scale must have the shape \[3, 2\], has \[3, 1\]"):
        decode_fp4(packed, groups[:, :1], name="x")
    with pytest.raises(UserError, match=r"x: its scale must be float8_e8m0fnu, uint8 or float32, is torch.bfloat16"):
        decode_fp8(codes, scale.bfloat16(), name="x")
    for wrong, shown in (
        (1.5, "1.5"),
        (0.0, "0"),
        (-2.0, "-2"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (1e-39, "1e-39"),
    ):
        floats = scale.float()
        floats[0, 1] = wrong
        with pytest.raises(UserError, match=f"x: a scale is {shown}, which is no power of two"):
            decode_fp8(codes, floats, name="x")
    with pytest.raises(UserError, match=r"x: must be torch.int8"):
        decode_fp4(packed.view(torch.uint8), groups, name="x")
    with pytest.raises(UserError, match=r"x: must be torch.float8_e4m3fn"):
        decode_fp8(packed, groups, name="x")
    with pytest.raises(UserError, match="x: FP4 packs two columns in a byte and cannot store 63"):
        encode_fp4(torch.ones(2, 63), None, "x")
    with pytest.raises(UserError, match="x: cannot be encoded"):
        encode_fp8(torch.ones(3), None, "x")
    with pytest.raises(ValueError, match="decoded to bfloat16 or float32"):
        decode_fp8(codes, scale, torch.float16)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_a_scale_has_the_same_value_in_every_dtype_that_files_use(dtype: torch.dtype) -> None:
    """All 255 powers, of which 2^-127 is a subnormal float32."""
    every = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    stored = store_scales(every, dtype)
    assert stored.dtype == dtype
    assert powers(stored, (255, 1), "x")[:, 0].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    codes, scale = random_fp8(129, 130)
    value, other = decode_fp8(codes, scale), store_scales(scale, dtype)
    assert same_bytes(decode_fp8(codes, other), value)
    assert all(map(same_bytes, encode_fp8(value, other), (codes, scale)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bytes_as_the_cpu() -> None:
    weight = random_weight(130, 258)
    for encode, decode in ((encode_fp8, decode_fp8), (encode_fp4, decode_fp4)):
        codes, scale = encode(weight)
        on_gpu = encode(weight.cuda())
        assert all(same_bytes(a.cpu(), b) for a, b in zip(on_gpu, (codes, scale), strict=True))
        assert torch.equal(decode(*on_gpu).cpu(), decode(codes, scale))
