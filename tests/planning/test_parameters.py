import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.build import model_config
from mtptrain.config import WeightFormat
from mtptrain.mtp.stack import MtpStack
from mtptrain.planning.parameters import active_parameters, backbone_parts, module_parts, total_weights
from tests.planning.presets import preset_shape


@pytest.mark.parametrize("name", ["tiny", "tiny12", "small", "v4_flash", "v4_pro"])
def test_parameters_are_those_of_the_real_modules(name: str) -> None:
    shape = preset_shape(name)
    config = model_config(shape)
    with torch.device("meta"):
        model, stack = DeepseekV4ForCausalLM(config), MtpStack(config, 1)
    assert total_weights(backbone_parts(shape)).total == sum(p.numel() for p in model.parameters())
    assert total_weights(module_parts(shape)).total == sum(p.numel() for p in stack.parameters())


# Totals and active parameters as published on the model cards, in billions; a module's from the released index.
PUBLISHED = {"v4_flash": (284, 13, 6.61, 0.168), "v4_pro": (1600, 49, 25.84, 0.473)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    shape = preset_shape(name)
    backbone, module = total_weights(backbone_parts(shape)), total_weights(module_parts(shape))
    total, active, one_module, without_experts = PUBLISHED[name]
    assert backbone.total / 1e9 == pytest.approx(total, rel=0.02)  # a card rounds 1573 to 1.6 T
    assert active_parameters(shape) / 1e9 == pytest.approx(active, rel=0.03)
    assert module.total / 1e9 == pytest.approx(one_module, abs=0.005)
    assert (module.total - module.expert) / 1e9 == pytest.approx(without_experts, abs=0.0005)


def test_a_narrower_format_never_takes_more_bytes() -> None:
    weights = total_weights(backbone_parts(preset_shape("v4_flash")))
    sizes = [weights.bytes(stored) for stored in WeightFormat]  # release, fp8, bf16, fp32
    assert sizes == sorted(sizes)
    assert sizes[-1] == 4 * weights.total
