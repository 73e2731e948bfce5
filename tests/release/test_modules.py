"""Names, shapes and stored values of heads in the release format."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.backbone.build import preset_config
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.release.codec import SCALE_DTYPES
from mtptrain.release.encoding_error import EncodingError
from mtptrain.release.modules import from_release, to_release
from mtptrain.release.names import ENTRIES, EXPERT_ENTRIES, Scheme, our_shapes, release_table
from tests.scripts import load_script
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
CONFIG = DeepseekV4Config(**TINY)
SCHEMES: list[Scheme] = ["fp8_fp4", "fp8", "bf16"]
# Relative to the scale of the block, or to the leading power of two without scales; see test_codec.py.
BOUNDS = {torch.int8: 1.0, torch.float8_e4m3fn: 16.0, torch.bfloat16: 2.0**-8}

# Every tensor of `mtp.0.` in the index of DeepSeek-V4-Flash: name, shape, dtype, shape of `.scale`; E is 0..255.
F32, BF16, E4M3, PACKED = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8
FLASH: list[tuple[str, list[int], torch.dtype, list[int] | None]] = [
    ("attn.attn_sink", [64], F32, None),
    ("attn.q_norm.weight", [1024], BF16, None),
    ("attn.kv_norm.weight", [512], BF16, None),
    ("attn.wq_a.weight", [1024, 4096], E4M3, [8, 32]),
    ("attn.wq_b.weight", [32768, 1024], E4M3, [256, 8]),
    ("attn.wkv.weight", [512, 4096], E4M3, [4, 32]),
    ("attn.wo_a.weight", [8192, 4096], E4M3, [64, 32]),
    ("attn.wo_b.weight", [4096, 8192], E4M3, [32, 64]),
    ("attn_norm.weight", [4096], BF16, None),
    ("ffn_norm.weight", [4096], BF16, None),
    ("enorm.weight", [4096], BF16, None),
    ("hnorm.weight", [4096], BF16, None),
    ("norm.weight", [4096], BF16, None),
    ("e_proj.weight", [4096, 4096], E4M3, [32, 32]),
    ("h_proj.weight", [4096, 4096], E4M3, [32, 32]),
    ("ffn.gate.weight", [256, 4096], BF16, None),
    ("ffn.gate.bias", [256], F32, None),
    ("ffn.experts.E.w1.weight", [2048, 2048], PACKED, [2048, 128]),
    ("ffn.experts.E.w3.weight", [2048, 2048], PACKED, [2048, 128]),
    ("ffn.experts.E.w2.weight", [4096, 1024], PACKED, [4096, 64]),
    ("ffn.shared_experts.w1.weight", [2048, 4096], E4M3, [16, 32]),
    ("ffn.shared_experts.w3.weight", [2048, 4096], E4M3, [16, 32]),
    ("ffn.shared_experts.w2.weight", [4096, 2048], E4M3, [32, 16]),
    ("hc_attn_fn", [24, 16384], F32, None),
    ("hc_attn_base", [24], F32, None),
    ("hc_attn_scale", [3], F32, None),
    ("hc_ffn_fn", [24, 16384], F32, None),
    ("hc_ffn_base", [24], F32, None),
    ("hc_ffn_scale", [3], F32, None),
    ("hc_head_fn", [4, 16384], F32, None),
    ("hc_head_base", [4], F32, None),
    ("hc_head_scale", [1], F32, None),
]
# Shapes that differ in DeepSeek-V4-Pro: D 7168, 128 heads, query rank 1536, 16 output groups, 384 experts of 3072.
PRO_SOME = {
    "attn.attn_sink": [128],
    "attn.wq_a.weight": [1536, 7168],
    "attn.wq_b.weight": [65536, 1536],
    "attn.wo_a.weight": [16384, 4096],
    "attn.wo_b.weight": [7168, 16384],
    "ffn.gate.weight": [384, 7168],
    "ffn.experts.383.w1.weight": [3072, 3584],
    "ffn.experts.383.w1.scale": [3072, 224],
    "ffn.experts.383.w2.weight": [7168, 1536],
    "ffn.shared_experts.w2.weight": [7168, 3072],
    "hc_attn_fn": [24, 28672],
}


class OneByOne(Mapping[str, Tensor]):
    """A mapping that counts how often each tensor is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, Counter[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)


def test_the_table_of_flash_equals_its_index() -> None:
    expected = {}
    for name, shape, dtype, scale in FLASH:
        for expert in range(256) if ".E." in name else range(1):
            full = name.replace(".E.", f".{expert}.")
            expected[full] = (shape, dtype)
            if scale is not None:
                expected[full.removesuffix("weight") + "scale"] = (scale, torch.float8_e8m0fnu)
    table = release_table(preset_config("v4_flash"))
    assert len(table) == len(expected) == 39 + 256 * 6 == 1575
    assert {row.released: (list(row.shape), row.dtype) for row in table} == expected


def test_the_table_of_pro_has_the_sizes_of_pro() -> None:
    table = {row.released: list(row.shape) for row in release_table(preset_config("v4_pro"))}
    assert len(table) == 39 + 384 * 6 == 2343
    assert {name: table[name] for name in PRO_SOME} == PRO_SOME


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_name_of_ours_is_filled_exactly_once(stack: MtpStack, scheme: Scheme) -> None:
    """Counts values, not names: an expert's three matrices fill parts of two tensors."""
    filled: Counter[str] = Counter()
    for row in release_table(CONFIG, scheme):
        if not row.is_scale:
            filled[f"mtp.0.{row.ours}"] += torch.Size(row.value_shape).numel()
    ours = {name: tensor.numel() for name, tensor in stack.state_dict().items() if name.startswith("mtp.0.")}
    assert filled == ours
    assert {f"mtp.0.{name}": torch.Size(shape).numel() for name, shape in our_shapes(CONFIG).items()} == ours


def test_no_name_stands_in_the_table_twice() -> None:
    for side in ("released", "ours"):
        names = [getattr(entry, side) for entry in ENTRIES]
        assert len(set(names)) == len(names)
    assert len({entry.released for entry in EXPERT_ENTRIES}) == 3


def test_docs_release_is_the_output_of_its_script() -> None:
    script = load_script("release_document")
    page = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    assert page == script.document()
    assert "1575 tensors" in page
    assert "2343 tensors" in page


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_comes_back_within_the_bound_of_its_scheme(
    stack: MtpStack, scheme: Scheme, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in stack.state_dict().items()}
    errors: dict[str, EncodingError] = {}
    stored = to_release(state, CONFIG, scheme, errors)
    table = {f"mtp.{d}.{row.released}": row for d in range(2) for row in release_table(CONFIG, scheme)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (row.shape, row.dtype) for name, row in table.items()
    }
    back = from_release(stored, CONFIG, torch.float32)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in state.items()}
    assert set(errors) == {name for name, row in table.items() if row.dtype in BOUNDS}
    for name, error in errors.items():
        assert error.relative <= BOUNDS[stored[name].dtype]
    largest: dict[str, float] = {}
    for name, row in table.items():
        ours = f"{name[:6]}{row.ours}"
        largest[ours] = max(largest.get(ours, 0.0), errors[name].absolute if name in errors else 0.0)
    for name, tensor in state.items():
        assert float((back[name] - tensor.float()).abs().max()) == largest[name]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_released_head_is_stored_again_without_a_change_of_value(
    stack: MtpStack, scheme: Scheme, dtype: torch.dtype
) -> None:
    first = to_release(stack.state_dict(), CONFIG, scheme)
    value = from_release(first, CONFIG, dtype)
    second = to_release(value, CONFIG, scheme)
    assert list(second) == list(first)
    for name, tensor in from_release(second, CONFIG, dtype).items():
        assert torch.equal(tensor.view(torch.uint8), value[name].view(torch.uint8)), name
    # A block whose largest value was rounded down may fit a smaller scale; values on the grid stay.
    third = to_release(from_release(second, CONFIG, dtype), CONFIG, scheme)
    assert all(torch.equal(third[name].view(torch.uint8), t.view(torch.uint8)) for name, t in second.items())


def test_each_expert_fills_its_part_of_the_tensors(stack: MtpStack) -> None:
    state = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    gate_up, down = (state[f"mtp.1.layer.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    stored = to_release(state, CONFIG, "bf16")
    for expert in range(4):
        prefix = f"mtp.1.ffn.experts.{expert}"
        assert torch.equal(stored[f"{prefix}.w1.weight"], gate_up[expert, :32].bfloat16())
        assert torch.equal(stored[f"{prefix}.w3.weight"], gate_up[expert, 32:].bfloat16())
        assert torch.equal(stored[f"{prefix}.w2.weight"], down[expert].bfloat16())
    assert torch.equal(stored["mtp.1.norm.weight"], state["mtp.1.norm.weight"].bfloat16())
    assert torch.equal(stored["mtp.1.attn.kv_norm.weight"], state["mtp.1.layer.self_attn.kv_norm.weight"].bfloat16())


def test_a_decoded_head_loads_into_a_stack(released: dict[str, Tensor]) -> None:
    state = from_release(released, CONFIG, torch.float32)
    loaded = stack_from_tensors(CONFIG, 2, state, "here").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_tensors_are_read_one_by_one_and_once(released: dict[str, Tensor]) -> None:
    tensors = OneByOne(released)
    from_release(tensors, CONFIG)
    assert set(tensors.reads) == set(released)
    assert {name for name, count in tensors.reads.items() if count > 1} == {"mtp.0.ffn.experts.0.w1.weight"}


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_scales_are_written_and_read_in_every_dtype(stack: MtpStack, scheme: Scheme, dtype: torch.dtype) -> None:
    usual = to_release(stack.state_dict(), CONFIG, scheme)
    other = to_release(stack.state_dict(), CONFIG, scheme, scale_dtype=dtype)
    assert {tensor.dtype for name, tensor in other.items() if name.endswith(".scale")} == {dtype}
    expected = from_release(usual, CONFIG)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in from_release(other, CONFIG).items())


def test_a_base_release_holds_its_scales_as_float32(stack: MtpStack) -> None:
    """As in the header of DeepSeek-V4-Flash-Base that NVIDIA-NeMo/Automodel#2034 quotes; vLLM needs it so."""
    stored = to_release(stack.state_dict(), CONFIG, "fp8")
    scales = [tensor for name, tensor in stored.items() if name.endswith(".scale")]
    assert {tensor.dtype for tensor in scales} == {torch.float32}
    assert all(bool((torch.frexp(tensor).mantissa == 0.5).all()) for tensor in scales)
