from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtptrain.backbone.build import build_model
from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import decode_step, prefill
from mtptrain.config import CacheFormat, PlanConfig, ShapeConfig, WeightFormat
from mtptrain.planning.work import attended_keys, backbone_pass, expected_experts, module_pass
from tests.planning.presets import preset_shape


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(8, 2, 1), (8, 2, 5), (256, 6, 3), (384, 6, 96)])
def test_the_expected_union_of_experts_is_that_of_random_routing(experts: int, chosen: int, tokens: int) -> None:
    shape = replace(ShapeConfig(), num_experts=experts, experts_per_token=chosen)
    draws = 1000
    picked = torch.rand(draws, tokens, experts, generator=torch.Generator().manual_seed(0)).topk(chosen).indices
    touched = torch.zeros(draws, experts).scatter_(1, picked.flatten(1), 1.0).sum(1)
    error = float(touched.std()) / draws**0.5
    assert expected_experts(shape, tokens) == pytest.approx(float(touched.mean()), abs=4 * error + 1e-6)


@pytest.mark.parametrize(("batch", "per_row"), [(1, 1), (2, 3)])
def test_flops_of_a_pass_are_those_that_a_decode_step_computes(batch: int, per_row: int) -> None:
    shape, context = ShapeConfig(), 64
    model = build_model(shape, seed=0, device=torch.device("cpu")).eval()
    model.set_experts_implementation("eager")  # the counter does not know grouped products
    cache = BackboneCache.allocate(model.config, batch, context + per_row, per_row)
    tokens = torch.randint(shape.vocab_size, (batch, context + per_row))
    with torch.inference_mode():
        list(prefill(model, cache, tokens, [context] * batch))
        with FlopCounterMode(display=False) as counter:
            model.lm_head(decode_step(model, cache, tokens[:, context:])[1])
    work = backbone_pass(shape, per_row, PlanConfig(batch=batch, context=context))
    # The engine's masks cover slots that a query cannot see, it skips an indexer that has nothing to discard, and the
    # plan counts norms and biases as if they were multiplied: a few per cent of the whole, either way.
    assert sum(part.flops for part in work.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_query_sees_no_more_keys_than_there_are() -> None:
    shape = preset_shape("v4_flash")
    assert attended_keys(shape, "sliding", 10) == 11
    assert attended_keys(shape, "csa", 1000) == 128 + 250
    assert attended_keys(shape, "csa", 100_000) == 128 + 512
    assert attended_keys(shape, "hca", 100_000) == 128 + 781


@pytest.mark.parametrize("changed", [{"batch": 4}, {"context": 65536}, {"weights": WeightFormat.bf16}])
def test_more_load_moves_more_bytes(changed: dict[str, object]) -> None:
    shape, plan = preset_shape("v4_flash"), PlanConfig(cache=CacheFormat.fp8)
    larger = replace(plan, **changed)  # type: ignore[arg-type]
    for count in (backbone_pass, module_pass):
        more, less = (sum(part.bytes for part in count(shape, 2, load).values()) for load in (larger, plan))
        if count is backbone_pass or "context" not in changed:  # the module sees its window only
            assert more > less
        else:
            assert more == less


def test_a_verify_pass_of_one_token_is_a_plain_pass_and_longer_ones_cost_more() -> None:
    shape, plan = preset_shape("v4_pro"), PlanConfig()
    costs = [sum(part.bytes for part in backbone_pass(shape, per_row, plan).values()) for per_row in range(1, 10)]
    assert costs == sorted(costs)
    assert costs[1] < 2 * costs[0]  # or a draft could not pay
