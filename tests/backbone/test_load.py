from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

from mtptrain.backbone import frozen
from mtptrain.backbone.build import preset_config
from mtptrain.backbone.decode import decode_step
from mtptrain.backbone.load import SHIPPED, Backbone, backbone_folder, load_backbone, read_model_config
from mtptrain.backbone.placement import spread_layers
from mtptrain.backbone.streams import run_backbone
from mtptrain.config import BackboneConfig, Placement, ReleaseVariant, StoredWeights
from mtptrain.decoding.speculative import allocate_cache
from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import has_stock, stock_tensors
from mtptrain.release.backbone import iterate_backbone
from mtptrain.release.codec import decode_fp4, decode_fp8
from mtptrain.release.modules import from_release
from mtptrain.release.shards import Shards
from tests.conftest import save_release

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> Backbone:
    return load_backbone(BackboneConfig(path=str(folder), **settings), CPU, dtype)


def test_a_release_is_decoded_to_the_values_of_its_codes(release_folder: Path) -> None:
    backbone = load(release_folder)
    state, shards = backbone.model.state_dict(), backbone.shards
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    query = decode_fp8(shards["layers.1.attn.wq_b.weight"], shards["layers.1.attn.wq_b.scale"], torch.float32)
    assert torch.equal(state["model.layers.1.self_attn.q_b_proj.weight"], query)
    halves = [f"layers.2.ffn.experts.3.{part}" for part in ("w1", "w3")]
    gate, up = (decode_fp4(shards[f"{name}.weight"], shards[f"{name}.scale"], torch.float32) for name in halves)
    assert torch.equal(state["model.layers.2.mlp.experts.gate_up_proj"][3], torch.cat([gate, up]))
    assert torch.equal(state["model.norm.weight"], shards["norm.weight"].float())
    assert torch.equal(state["model.layers.0.mlp.gate.tid2eid"], shards["layers.0.ffn.gate.tid2eid"])


def test_every_tensor_of_a_backbone_is_written_once_under_its_released_name(release_folder: Path) -> None:
    backbone = load(release_folder)
    written = dict(iterate_backbone(backbone.model.state_dict(), backbone.config, "fp8_fp4"))
    assert set(written) == {name for name in backbone.shards if not name.startswith("mtp.")}
    for name, tensor in written.items():
        if not name.endswith((".weight", ".scale")) or tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, backbone.shards[name])


def test_the_head_of_a_release_is_the_stock_head(release_folder: Path) -> None:
    backbone = load(release_folder)
    expected = from_release(backbone.shards.only("mtp."), backbone.config, torch.float32)
    assert has_stock(backbone)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stock_tensors(backbone).items())


def test_experts_have_the_form_that_transformers_chooses(release_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = "_can_set_experts_implementation_cached_value"  # by class, from the first model of a process
    for kind in (DeepseekV4ForCausalLM, frozen.DeepseekV4ForCausalLM):
        monkeypatch.delattr(kind, remembered, raising=False)
    ours = load(release_folder).model.config._experts_implementation
    monkeypatch.delattr(DeepseekV4ForCausalLM, remembered, raising=False)
    config = read_model_config(release_folder)
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    theirs = DeepseekV4ForCausalLM.from_pretrained(release_folder, config=config).config._experts_implementation
    assert ours == theirs == "grouped_mm"


def test_bf16_keeps_the_fp32_tensors_of_v4_in_fp32(release_folder: Path) -> None:
    state = load(release_folder, torch.bfloat16).model.state_dict()
    assert state["model.layers.1.self_attn.q_b_proj.weight"].dtype == torch.bfloat16
    assert state["model.layers.1.attn_hc.fn"].dtype == torch.float32


def test_norms_with_fp32_weights_keep_bf16_inputs_in_bf16(release_folder: Path) -> None:
    model = load(release_folder, torch.bfloat16).model
    modules = [*model.modules(), *MtpStack(model.config, 1).modules()]
    norms = [module for module in modules if isinstance(module, DeepseekV4RMSNorm)]
    assert any(norm.weight.dtype == torch.float32 for norm in norms)
    for norm in norms:
        assert norm(torch.ones(3, len(norm.weight), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_can_be_placed_by_accelerate(release_folder: Path) -> None:
    spread, whole = load(release_folder, placement=Placement.auto).model, load(release_folder).model
    parts = spread_layers(len(whole.model.layers), num_devices=2)
    dispatch_model(spread, dict.fromkeys(parts, "cpu"), force_hooks=True)  # as for layers on several devices
    assert hasattr(spread.model.layers[1], "_hf_hook")
    tokens_BS = torch.arange(24).view(1, 24)
    for one, other in zip(run_backbone(spread, tokens_BS), run_backbone(whole, tokens_BS), strict=True):
        assert torch.equal(one, other)
    steps = [decode_step(model, allocate_cache(model, 1, 24, 3), tokens_BS) for model in (spread, whole)]
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one, other)


def test_spread_layers_stay_in_order_and_leave_what_drafts_use_on_the_first_gpu() -> None:
    parts = spread_layers(num_layers=43, num_devices=8)
    numbers = [parts[f"model.layers.{layer}"] for layer in range(43)]
    assert numbers == sorted(numbers)
    assert {numbers.count(gpu) for gpu in range(8)} == {5, 6}
    assert {parts["model.embed_tokens"], parts["model.norm"], parts["model.hc_head"], parts["lm_head"]} == {0}


@pytest.mark.parametrize("variant", [ReleaseVariant.release, ReleaseVariant.base])
def test_kept_weights_have_the_scales_of_the_files(variant: ReleaseVariant, tmp_path: Path) -> None:
    """A -Base release holds them as float32 and transformers as E8M0."""
    save_release(tmp_path / "R", variant)
    model = load(tmp_path / "R", torch.bfloat16, weights=StoredWeights.keep).model
    state, shards = model.state_dict(), Shards(tmp_path / "R", "R")
    query = state["model.layers.1.self_attn.q_b_proj.weight_scale_inv"]
    assert query.dtype == torch.float8_e8m0fnu
    assert torch.equal(query.float(), shards["layers.1.attn.wq_b.scale"].float())
    experts = state["model.layers.2.mlp.experts.down_proj_scale_inv"]
    assert torch.equal(experts[3].float(), shards["layers.2.ffn.experts.3.w2.scale"].float())


def test_kept_weights_cannot_be_partitioned_without_a_gpu(release_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"backbone\.weights=keep: leaves FP8 tensors, .* set backbone\.weights=dequant"
    ):
        load(release_folder, weights=StoredWeights.keep, placement=Placement.zero3)


def test_a_hub_id_without_a_network_ends_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^backbone\.path=nobody/nothing: is no folder here .*give the folder$"):
        backbone_folder(BackboneConfig(path="nobody/nothing"))


def test_a_shipped_backbone_needs_no_path() -> None:
    assert backbone_folder(BackboneConfig()) == SHIPPED / "tiny"
    assert backbone_folder(BackboneConfig(name="tiny12")) == SHIPPED / "tiny12"


@pytest.mark.parametrize("name", ["tiny", "tiny12"])
def test_a_shipped_backbone_has_the_shape_of_its_preset(name: str) -> None:
    config, preset = read_model_config(SHIPPED / name).to_dict(), preset_config(name).to_dict()
    sizes = [key for key in preset if not key.startswith(("dtype", "architectures", "transformers_version"))]
    assert {key: config[key] for key in sizes} == {key: preset[key] for key in sizes}


@pytest.mark.parametrize(("name", "layers", "billions"), [("v4_flash", 43, 284.3), ("v4_pro", 61, 1573.0)])
def test_a_preset_of_a_release_has_its_number_of_parameters(name: str, layers: int, billions: float) -> None:

    config = preset_config(name)
    assert config.num_hidden_layers == layers
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DeepseekV4ForCausalLM(config).parameters())
    assert round(parameters / 1e9, 1) == billions
