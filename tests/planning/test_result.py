import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mtptrain.config import BackboneConfig, HardwareConfig, PlanConfig, PlanKind
from mtptrain.errors import UserError
from mtptrain.planning.decoding import plan_decoding
from mtptrain.planning.result import SCHEMA, DecodingPlan, Profile, TrainingPlan, read_plan, write_plan
from mtptrain.planning.tables import print_plan
from mtptrain.planning.training import plan_training
from mtptrain.planning.training_load import TrainingLoad
from tests.planning.presets import PROVENANCE, preset_shape

MODEL = BackboneConfig(name="v4_flash", shape=preset_shape("v4_flash"))
HARDWARE = HardwareConfig(
    num_gpus=8, memory=141e9, bandwidth=4.8e12, fp8_flops=2e15, bf16_flops=1e15, fp32_flops=5e14, interconnect=450e9
)


def real_plan(what: PlanKind) -> DecodingPlan | TrainingPlan:
    """Return the plan of V4-Flash on eight GPUs."""
    settings = PlanConfig(what=what, acceptance=[0.79, 0.61])
    if what is PlanKind.training:
        return plan_training(MODEL, HARDWARE, settings, TrainingLoad(zero_stage=2, offload=True), 10, PROVENANCE)
    return plan_decoding(MODEL, HARDWARE, settings, Profile(settings.acceptance, "assumed"), PROVENANCE)


@pytest.mark.parametrize("what", PlanKind)
def test_a_plan_is_read_as_it_was_written(what: PlanKind, tmp_path: Path) -> None:
    plan = real_plan(what)
    write_plan(tmp_path / "plan.json", plan)
    assert plan.what is what
    assert read_plan(tmp_path / "plan.json") == plan


def test_bytes_that_gpus_send_are_those_of_communication() -> None:
    plan = real_plan(PlanKind.decoding)
    assert isinstance(plan, DecodingPlan)
    parts = plan.draft_lengths[1].verify.parts
    assert {name for name, part in parts.items() if part.sent} == {"communication"}
    assert parts["communication"].seconds == parts["communication"].sent / HARDWARE.interconnect


@pytest.mark.parametrize("what", PlanKind)
def test_rates_and_tokens_are_written_out(what: PlanKind) -> None:
    stream = io.StringIO()
    print_plan(real_plan(what), Console(file=stream, width=100))
    assert "e+0" not in stream.getvalue()
    assert re.search(r"[0-9],[0-9]{3} tokens/s", stream.getvalue())
    if what is PlanKind.training:
        assert f" {10 * TrainingLoad().tokens / 1e6:,.0f} M tokens take " in stream.getvalue()


def refused(path: Path) -> str:
    """Return the message of the error that `read_plan` raises."""
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", PlanKind)
@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_another_schema_is_refused_in_one_line(what: PlanKind, schema: int, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_plan(file, real_plan(what))
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "schema": schema}), encoding="utf-8")
    assert refused(file) == f"{file}: has schema {schema}, this version reads schema {SCHEMA}; run +recipe=plan again"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a plan.json"),
        ("[]", "has schema None"),
        (f'{{"schema": {SCHEMA}}}', "None is not a valid PlanKind"),
        (f'{{"schema": {SCHEMA}, "what": "training"}}', "provenance: missing field of TrainingPlan"),
        (f'{{"schema": {SCHEMA}, "what": "decoding", "pace": 1}}', "pace: unknown field of DecodingPlan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    assert reason in refused(tmp_path / "plan.json")


def test_an_absent_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.json").startswith(f"{tmp_path}/absent.json: cannot be read")
