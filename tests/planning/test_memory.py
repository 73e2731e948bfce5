"""The memory of a plan against tensors that are alive while the real modules and engines run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as fx_config
import transformers.models.deepseek_v4.modeling_deepseek_v4 as upstream
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.attention import use_linear_attention
from mtptrain.backbone.build import model_config
from mtptrain.backbone.kept import decode
from mtptrain.backbone.modules import FrozenHyperConnection, replace_connections, replace_experts, replace_norms
from mtptrain.batch import Batch
from mtptrain.config import Placement, WeightFormat
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import place
from mtptrain.planning.head_memory import (
    BUCKET,
    MUON_BATCH,
    backward_bytes,
    held_bytes,
    reduction_bytes,
    update_bytes,
)
from mtptrain.planning.training_load import TrainingLoad
from mtptrain.planning.training_memory import activation_bytes, forward_bytes, host_bytes
from mtptrain.training.muon import BATCH
from tests.planning.engine_memory import ACCUMULATION, CASES, SHAPE, optimizer_of
from tests.planning.live import LiveBytes, total_bytes
from tests.planning.presets import preset_shape
from tests.warm import run_in_two

META = torch.device("meta")
FLASH = preset_shape("v4_flash")
LOAD = TrainingLoad(rows=1, row_length=1024, placement=Placement.expert_parallel, backbone=WeightFormat.bf16)


@pytest.fixture(autouse=True)
def counted_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let routing and masks, which look at values, run without any."""
    empty = torch.empty(0, dtype=torch.int64, device=META)
    monkeypatch.setattr(upstream, "create_sliding_window_causal_mask", lambda *_, **__: empty)
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def tokens(count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.int64, device=META)


def flash_stack() -> tuple[MtpStack, torch.nn.Embedding]:
    """Return V4-Flash's head in bf16 and an embedding, without values; the experts are frozen."""
    config = model_config(FLASH)
    config._experts_implementation = "grouped_mm"  # what transformers chooses when it loads a model
    with META:
        stack = MtpStack(config, 1)
        embedding = torch.nn.Embedding(FLASH.vocab_size, FLASH.hidden_size, dtype=torch.bfloat16)
    place(stack, SimpleNamespace(model=SimpleNamespace(lm_head=embedding)))  # type: ignore[arg-type]
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    return stack, embedding.requires_grad_(False)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rollout_at_the_widths_of_v4_flash_takes_the_planned_bytes(recompute: bool) -> None:
    stack, embedding = flash_stack()
    load = replace(LOAD, row_length=4096, steps=3, recompute=recompute)
    live = LiveBytes("cpu", stack, embedding)
    weights = live.now
    with live, META:
        ids = tokens(load.row_length)
        batch = Batch(ids, ids + 1, ids)
        shape = (1, load.row_length, FLASH.hc_mult, FLASH.hidden_size)
        hidden = rollout(stack, embedding, torch.empty(shape, dtype=torch.bfloat16), batch, 3, recompute=recompute)
        torch.stack(hidden).float().sum().backward()
    gradients = total_bytes([p.grad for p in stack.parameters() if p.grad is not None])
    planned = activation_bytes(FLASH, load)
    activations = planned["rollout activations"] + planned["streams"]
    assert activations == pytest.approx(live.peak - weights - gradients, rel=0.1)


def test_the_forward_of_layers_of_v4_flash_takes_the_planned_bytes() -> None:
    few = replace(FLASH, layer_types=["sliding", "csa", "hca"], num_hash_layers=0, num_experts=32)
    with META:
        model = DeepseekV4ForCausalLM(model_config(few)).bfloat16().requires_grad_(False)
    use_linear_attention(model)
    replace_connections(model, FrozenHyperConnection)
    replace_norms(model)
    replace_experts(model)
    live = LiveBytes("cpu", model)
    weights = live.now
    with torch.no_grad(), live, META:
        model.model(input_ids=tokens(LOAD.row_length), use_cache=False)
    assert forward_bytes(few, LOAD)["backbone forward"] == pytest.approx(live.peak - weights, rel=0.1)


def test_decoding_the_experts_of_a_layer_takes_the_planned_bytes() -> None:
    """As `KeptExperts` decodes: gate, up, then down."""
    experts, inner, width = FLASH.num_experts // 8, FLASH.expert_size, FLASH.hidden_size
    live = LiveBytes("cpu")
    with torch.no_grad(), META:
        codes = torch.empty(experts, inner, width // 2, dtype=torch.int8)
        scale = torch.empty(experts, inner, width // 32)
        turned = codes.view(experts, width, -1), scale.view(experts, width, -1)
        with live:
            both = torch.cat([decode(codes, scale, torch.bfloat16) for _ in range(2)], dim=-2)
            down = decode(*turned, torch.bfloat16)
    planned = forward_bytes(FLASH, replace(LOAD, backbone=WeightFormat.release))["weights decoded for a layer"]
    assert planned == pytest.approx(live.peak, rel=0.02)
    assert both.numel() == 2 * down.numel()


def test_new_modules_take_the_planned_bytes_of_a_process_that_shares_their_experts() -> None:
    with META:
        stack = MtpStack(model_config(FLASH), 2, num_shares=8)
    load = replace(LOAD, modules=2, share_experts=True, train_experts=False)
    planned = host_bytes(FLASH, load, {})["head in fp32, at the start"]
    assert planned == pytest.approx(total_bytes(list(stack.parameters())), rel=1e-6)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """Bytes of every case of `engine_memory` in two processes."""
    ended = run_in_two("tests.planning.engine_memory")
    assert ended.codes == (0, 0), ended.errors[-4000:]
    results: dict[str, dict[str, int]] = json.loads(ended.output.splitlines()[-1])
    return results


@pytest.mark.parametrize("case", CASES)
def test_an_engine_holds_the_planned_bytes_and_peaks_at_them(case: str, measured: dict[str, Any]) -> None:
    engine, mtp = CASES[case]
    load = TrainingLoad(
        num_gpus=2,
        zero_stage=int(engine.value[-1]) if engine.value != "single" else 0,
        optimizer=optimizer_of(case),
        train_experts="trainable" not in mtp,
        share_experts="experts" in mtp,
        micro_batches=ACCUMULATION,
    )
    held = sum(held_bytes(SHAPE, load).values())
    reduction = reduction_bytes(SHAPE, load)
    reduction.pop("DeepSpeed's bucket", BUCKET)  # the measurement sets a small one
    moments = [backward_bytes(SHAPE, load), reduction, update_bytes(SHAPE, load)]
    assert held == pytest.approx(measured[case]["held"], rel=0.001)
    peak = max(measured[case]["reduction"], measured[case]["update"])
    assert held + max(sum(kinds.values()) for kinds in moments) == pytest.approx(peak, rel=0.05)


def test_the_plan_counts_muons_batches() -> None:
    assert MUON_BATCH == BATCH
