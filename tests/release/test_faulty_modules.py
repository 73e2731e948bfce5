"""Heads that lack tensors, have others, or hold damaged values are refused by name."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack
from mtptrain.release.modules import from_release, iterate_release, read_release, to_release
from mtptrain.release.problems import is_dspark
from tests.release.test_modules import CONFIG, SCHEMES
from tests.tiny import TINY


def test_missing_and_unexpected_tensors_are_listed(released: dict[str, Tensor]) -> None:
    tensors = dict(released)
    tensors["mtp.0.markov_head.weight"] = tensors.pop("mtp.0.e_proj.scale")
    tensors["layers.0.attn_norm.weight"] = tensors.pop("mtp.1.norm.weight")
    with pytest.raises(UserError) as caught:
        from_release(tensors, CONFIG)
    assert "2 missing: mtp.0.e_proj.scale, mtp.1.norm.weight" in str(caught.value)
    assert "2 unexpected: layers.0.attn_norm.weight, mtp.0.markov_head.weight" in str(caught.value)


def test_a_gap_between_modules_is_seen(released: dict[str, Tensor]) -> None:
    tensors = {name.replace("mtp.1.", "mtp.2."): tensor for name, tensor in released.items()}
    with pytest.raises(UserError, match=r"missing: mtp\.1\.enorm\.weight.*and \d+ more; .* unexpected: mtp\.2\."):
        from_release(tensors, CONFIG)
    with pytest.raises(UserError, match=r"41 missing: mtp\.0\.enorm"):
        from_release({}, CONFIG)


def test_every_wrong_shape_and_dtype_is_listed(released: dict[str, Tensor]) -> None:
    tensors = dict(released)
    tensors["mtp.0.norm.weight"] = tensors["mtp.0.norm.weight"][1:]
    tensors["mtp.0.hc_attn_scale"] = tensors["mtp.0.hc_attn_scale"].bfloat16()
    tensors["mtp.1.e_proj.scale"] = tensors["mtp.1.e_proj.scale"].view(torch.uint8).repeat(2, 1)
    tensors["mtp.1.ffn.experts.3.w2.weight"] = tensors["mtp.1.ffn.experts.3.w2.weight"].float()
    with pytest.raises(UserError) as caught:
        from_release(tensors, CONFIG)
    for line in (
        "4 of another shape or dtype",
        "mtp.0.norm.weight bfloat16 [63] instead of bfloat16 [64]",
        "mtp.0.hc_attn_scale bfloat16 [3] instead of float32 [3]",
        "mtp.1.e_proj.scale uint8 [2, 1] instead of float8_e8m0fnu [1, 1]",
        "mtp.1.ffn.experts.3.w2.weight float32 [64, 16] instead of int8 [64, 16]",
    ):
        assert line in str(caught.value)


def test_damaged_values_are_refused_by_name(released: dict[str, Tensor]) -> None:
    for name in ("mtp.0.enorm.weight", "mtp.1.hc_head_base"):
        with pytest.raises(UserError, match=f"{name}: holds NaN or infinity".replace(".", r"\.")):
            from_release({**released, name: torch.full_like(released[name], torch.nan)}, CONFIG)
    scale = torch.full_like(released["mtp.1.h_proj.scale"].view(torch.uint8), 255)
    with pytest.raises(UserError, match=r"mtp\.1\.h_proj\.weight: a scale is NaN"):
        from_release({**released, "mtp.1.h_proj.scale": scale}, CONFIG)


def test_the_sound_tensors_of_a_faulty_release_are_read(released: dict[str, Tensor]) -> None:
    """Each kind of fault leaves out one of our tensors, and no other."""
    tensors = dict(released)
    del tensors["mtp.0.ffn.experts.2.w3.weight"]
    tensors["mtp.0.unknown.weight"] = torch.ones(1)
    tensors["mtp.0.norm.weight"] = tensors["mtp.0.norm.weight"][1:]
    tensors["mtp.1.e_proj.scale"] = torch.full_like(tensors["mtp.1.e_proj.scale"].view(torch.uint8), 255)
    state, problems = read_release(tensors, CONFIG, torch.float32)
    assert problems.missing == ["mtp.0.ffn.experts.2.w3.weight"]
    assert problems.unexpected == ["mtp.0.unknown.weight"]
    assert problems.misshaped == ["mtp.0.norm.weight bfloat16 [63] instead of bfloat16 [64]"]
    assert [line.split(":")[0] for line in problems.damaged] == ["mtp.1.e_proj.weight"]
    assert problems.expected == len(released)
    sound = from_release(released, CONFIG, torch.float32)
    left_out = {"mtp.0.layer.mlp.experts.gate_up_proj", "mtp.0.norm.weight", "mtp.1.e_proj.weight"}
    assert set(sound) - set(state) == left_out
    assert all(torch.equal(tensor, sound[name]) for name, tensor in state.items())


def test_a_head_that_cannot_be_stored_is_refused_by_name(stack: MtpStack) -> None:
    state = dict(stack.state_dict())
    for name, stored in (
        ("mtp.0.e_proj.weight", "mtp.0.e_proj.weight"),
        ("mtp.1.layer.mlp.experts.gate_up_proj", "mtp.1.ffn.experts.0.w1.weight"),
        ("mtp.1.norm.weight", "mtp.1.norm.weight"),
        ("mtp.0.layer.self_attn.sinks", "mtp.0.attn.attn_sink"),
    ):
        for scheme in SCHEMES:
            with pytest.raises(UserError, match=f"^{stored}: ".replace(".", r"\.")):
                to_release({**state, name: torch.full_like(state[name], torch.inf)}, CONFIG, scheme)
    too_large = torch.full_like(state["mtp.1.norm.weight"], 3.4e38)  # bf16 ends at 3.39e38
    with pytest.raises(UserError, match=r"mtp\.1\.norm\.weight: a value is NaN, infinite or too large for"):
        to_release({**state, "mtp.1.norm.weight": too_large}, CONFIG, "bf16")


def test_a_state_that_is_no_head_is_refused_before_anything_is_written(stack: MtpStack) -> None:
    state = dict(stack.state_dict())
    state["mtp.0.norm.bias"] = state.pop("mtp.0.norm.weight")
    state["mtp.1.e_proj.weight"] = state["mtp.1.e_proj.weight"][:, :63]
    with pytest.raises(UserError) as caught:
        next(iterate_release(state, CONFIG, "fp8_fp4"))
    for line in (
        "1 missing: mtp.0.norm.weight",
        "1 unexpected: mtp.0.norm.bias",
        "mtp.1.e_proj.weight [64, 63] instead of [64, 64]",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("part", ["enorm.weight", "hnorm.weight", "e_proj.weight", "norm.weight"])
def test_a_head_that_lacks_a_tensor_is_not_taken_for_dspark(part: str, released: dict[str, Tensor]) -> None:
    tensors = {name: tensor for name, tensor in released.items() if not name.endswith(f".0.{part}")}
    assert not is_dspark(tensors.keys(), CONFIG)
    with pytest.raises(UserError, match=rf"1 missing: mtp\.0\.{part}"):
        from_release(tensors, CONFIG)


def test_dspark_blocks_are_recognised_and_explained(released: dict[str, Tensor]) -> None:
    blocks = ["mtp.0.markov_head.weight", "mtp.0.confidence_head.weight", "mtp.0.main_proj.weight"]
    marked = DeepseekV4Config(**TINY, dspark_block_size=4)
    assert is_dspark(blocks, CONFIG)
    assert is_dspark(released.keys(), marked)
    assert not is_dspark(released.keys(), CONFIG)
    assert not is_dspark(["layers.0.attn_norm.weight"], marked)
    for tensors, config in ((dict.fromkeys(blocks, torch.zeros(1)), CONFIG), (released, marked)):
        with pytest.raises(UserError, match=r"DSpark blocks.*mtp\.init=fresh"):
            from_release(tensors, config)
