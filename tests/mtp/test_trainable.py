import pytest

from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import freeze_untrained
from tests.tiny import random_backbone, random_stack


def trained(stack: MtpStack, trainable: str) -> set[str]:
    freeze_untrained(stack, trainable)
    return {name for name, parameter in stack.named_parameters() if parameter.requires_grad}


@pytest.fixture
def stack() -> MtpStack:
    return random_stack(random_backbone(), depth=2)


def test_all_tensors_are_trained_unless_some_are_chosen(stack: MtpStack) -> None:
    assert trained(stack, "all") == {name for name, _ in stack.named_parameters()}


def test_no_experts_leaves_out_the_routed_experts_alone(stack: MtpStack) -> None:
    frozen = {name for name, _ in stack.named_parameters()} - trained(stack, "no_experts")
    experts = ["gate_up_proj", "down_proj"]
    assert frozen == {f"mtp.{depth}.layer.mlp.experts.{name}" for depth in range(2) for name in experts}


def test_patterns_choose_by_name_and_undo_an_earlier_choice(stack: MtpStack) -> None:
    assert trained(stack, "mtp.1.e_proj.*,*.hnorm.*") == {
        "mtp.0.hnorm.weight",
        "mtp.1.hnorm.weight",
        "mtp.1.e_proj.weight",
    }
    assert trained(stack, "*.enorm.*") == {"mtp.0.enorm.weight", "mtp.1.enorm.weight"}


def test_the_error_names_a_pattern_without_matches(stack: MtpStack) -> None:
    with pytest.raises(UserError, match=r"mtp.trainable=\*.norm.\*,lora: 'lora' fits no tensor of the head; use all"):
        freeze_untrained(stack, "*.norm.*,lora")
