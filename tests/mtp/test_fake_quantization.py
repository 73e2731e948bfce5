import pytest
import torch
from transformers import DeepseekV4Config

from mtptrain.config import LossConfig
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.fake_quantization import as_stored, rows_by_tensor, stored_value, straight_through
from mtptrain.mtp.stack import stack_from_tensors
from mtptrain.release.modules import from_release, to_release
from mtptrain.release.names import Scheme
from tests.tiny import TINY, random_backbone, random_batch, random_stack

CONFIG = DeepseekV4Config(**TINY)
SCHEMES: list[Scheme] = ["fp8_fp4", "fp8", "bf16"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_value_equals_an_export_read_back(scheme: Scheme, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in random_stack(random_backbone()).state_dict().items()}
    read = from_release(to_release(state, CONFIG, scheme), CONFIG, torch.float32)
    for name, rows in rows_by_tensor(CONFIG, scheme).items():
        value = stored_value(state[f"mtp.0.{name}"], rows)
        assert value.dtype == dtype
        assert torch.equal(value.float(), read[f"mtp.0.{name}"].to(dtype).float())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_share_of_the_experts_is_rounded_as_in_the_whole(scheme: Scheme, name: str) -> None:
    whole = random_stack(random_backbone()).state_dict()[f"mtp.0.layer.mlp.experts.{name}"]
    rows = rows_by_tensor(CONFIG, scheme)[f"layer.mlp.experts.{name}"]
    shares = [stored_value(share, rows) for share in whole.chunk(2)]
    assert torch.equal(torch.cat(shares), stored_value(whole, rows))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_that_of_the_weight_itself(scheme: Scheme) -> None:
    rows = rows_by_tensor(CONFIG, scheme)
    for name in ("e_proj.weight", "layer.mlp.experts.gate_up_proj", "norm.weight", "hc_head.hc_fn"):
        weight = dict(random_stack(random_backbone()).named_parameters())[f"mtp.0.{name}"]
        weights = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        (straight_through(weight, rows[name]) * weights).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, weights)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_sees_the_loss_and_gradients_of_the_exported_head(scheme: Scheme) -> None:
    model = random_backbone()
    stack = random_stack(model, depth=2)
    batch = random_batch(97, [[9, 7], [16]], 16)
    objective = RolloutObjective(model, stack, LossConfig(), 3, stored=rows_by_tensor(CONFIG, scheme))
    counts_K = objective.counts(batch)
    loss = objective(batch, counts_K).loss
    loss.backward()
    read = from_release(to_release(stack.state_dict(), CONFIG, scheme), CONFIG, torch.float32)
    exported = stack_from_tensors(CONFIG, 2, read, "here")
    expected = RolloutObjective(model, exported, LossConfig(), 3)(batch, counts_K).loss
    expected.backward()
    assert torch.equal(loss, expected)
    for name, parameter in exported.named_parameters():
        gradient = dict(stack.named_parameters())[name].grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:  # steps add up in another order: fp32 rounding of the largest entry
            assert torch.allclose(gradient, parameter.grad, rtol=0, atol=1e-5 * float(parameter.grad.abs().max()))


def test_the_parameters_are_restored_even_after_an_error() -> None:
    stack = random_stack(random_backbone(), depth=2)
    before = list(stack.named_parameters())

    def fail() -> None:
        with as_stored(stack, rows_by_tensor(CONFIG, "fp8_fp4")):
            assert list(stack.named_parameters()) == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after = list(stack.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
