"""The card of an export, and exported heads as checkpoints, from a folder and from the hub."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from transformers import DeepseekV4Config

from mtptrain.config import DraftChoice, ExportTarget, PastDepth
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.head_result import ChosenOn, Gain
from mtptrain.export.card import further_figures, other_drafts, verdict
from mtptrain.export.record import Measured, drawn
from mtptrain.mtp.stack import head_digest
from mtptrain.release.names import release_table
from mtptrain.training.checkpoint import EXPORT_MANIFEST, find_checkpoint
from tests.command import run_main
from tests.export.exporting import export, read_record
from tests.hub import stand_in
from tests.light import certified


def test_the_record_and_the_card_hold_the_origin_of_the_head(exported: Path, settings: list[str]) -> None:
    record = read_record(exported)
    assert (record["mode"], record["depth"], record["steps"], record["scheme"]) == ("shared", 1, 3, "fp8_fp4")
    assert record["origin"]["training"]["command"][:3] == ["python", "-m", "mtptrain"]
    assert record["head_files"] == ["model-00007-of-00007.safetensors"]
    assert record["start"]["init"] == "stock"
    assert record["changed"][0] > 0
    table = release_table(DeepseekV4Config.from_pretrained(exported))
    assert record["errors"].keys() == {f"mtp.0.{row.released}" for row in table if not row.is_scale}
    card = (exported / "README.md").read_text()
    for fact in ("shared, 1 module", "3 draft step(s)", "fp8_fp4", record["backbone"], "| K | before | after | gain |"):
        assert fact in card
    assert "source text, path " in record["origin"]["data"]
    assert record["origin"]["data"].endswith(" tokens")
    command = (
        '"num_speculative_tokens": 3, "draft_sample_method": "probabilistic"'  # no evaluation and no plan: mtp.steps
    )
    assert f'"method": "mtp", {command}' in card


def test_the_card_shows_both_kinds_of_draft() -> None:
    lengths = {1: 1.5, 2: 1.9, 3: 2.0}
    sampled = Measured(8, "temperature 1, sampled drafts", lengths, lengths, [0.5, 0.4, 0.3], None)
    both = replace(sampled, other=("temperature 1, greedy drafts", {1: 1.25, 2: None, 3: 1.3}))
    assert other_drafts(both, [1, 2]) == "The same head at temperature 1, greedy drafts: K=1 1.250, K=2 -."
    assert other_drafts(sampled, [1, 2]) == ""


def test_the_card_shows_what_serving_changes() -> None:
    lengths = {1: 1.5, 2: None}
    measured = Measured(8, "temperature 0", lengths, lengths, [0.5, 0.4], None, served={1: 1.4985, 2: None})
    line = "As vLLM computes (embedding at position 0 zeroed, keys and activations in FP8): K=1 1.498 (-0.0015), K=2 -."
    assert further_figures(ExportTarget.vllm, measured, [1, 2]) == [line]
    assert further_figures(ExportTarget.hf, replace(measured, served=None), [1, 2]) == []
    chosen = replace(measured, served=None, chosen_on=ChosenOn(prompts=8, shared=5, by="replay/expected_length_2"))
    (line,) = further_figures(ExportTarget.hf, chosen, [1, 2])
    assert line.startswith("This head was chosen as the best of its run on 5 of these 8 prompts, so its figure is too")


def test_the_card_states_every_setting_of_the_policy_that_changes_a_figure() -> None:
    assert drawn(Policy()) == "temperature 0"
    assert drawn(Policy(past_depth=PastDepth.wrap_around)) == "temperature 0, past_depth wrap_around"
    assert drawn(Policy(temperature=1, top_p=0.9)) == "temperature 1, sampled drafts, top_p 0.9"
    penalised = Policy(temperature=0.5, draft=DraftChoice.greedy, penalties=Penalties(repetition=1.1))
    assert drawn(penalised) == "temperature 0.5, greedy drafts, repetition_penalty 1.1"


def test_a_clear_loss_names_its_draft_length() -> None:
    lost = Measured(8, "temperature 0", {1: 1.5}, {1: 1.4}, [0.4], {1: Gain(-0.1, (-0.2, -0.05), 0.1)})
    assert verdict(lost, 4).startswith(
        "NOT BETTER THAN THE MODEL'S OWN HEAD on these prompts: this head accepts 0.10 fewer"
    )
    assert verdict(lost, 4).endswith("(0.05 to 0.20) at K=1")


def test_llama_cpp_s_numerics_are_compared_with_greedy_drafts() -> None:
    """It drafts greedily at any temperature, so that is how `replay_stored` counts its drafts."""
    lengths, served = {1: 1.5}, {1: 1.26}
    sampled = Measured(8, "temperature 1, sampled drafts", lengths, lengths, [0.5], None, served=served)
    both = replace(sampled, other=("temperature 1, greedy drafts", {1: 1.25}))
    line = "As llama.cpp computes (one more key before the first; greedy drafts): K=1 1.260 (+0.0100)."
    assert further_figures(ExportTarget.llama_cpp, both, [1])[-1] == line
    greedy = replace(sampled, samples=False, other=("temperature 1, sampled drafts", {1: 1.7}), after={1: 1.25})
    line = "As llama.cpp computes (one more key before the first): K=1 1.260 (+0.0100)."
    assert further_figures(ExportTarget.llama_cpp, greedy, [1])[-1] == line
    assert further_figures(ExportTarget.vllm, both, [1])[-1].endswith("in FP8): K=1 1.260 (-0.2400).")


def test_the_card_has_metadata_that_the_hub_reads(exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data
    lengths = read_record(exported)["acceptance"]["after"]
    assert data.tags == ["multi-token-prediction", "speculative-decoding", "deepseek_v4"]
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("acceptance_length", pytest.approx(length, abs=1e-4)) for length in lengths.values()
    ]


def test_the_command_prints_how_to_serve_and_a_head_without_a_gain_gets_a_loud_line(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(settings, tmp_path / "X", "target=sglang")
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("NOT BETTER THAN THE MODEL'S OWN HEAD") for line in lines)
    assert any("--speculative-use-rejection-sampling" in line for line in lines[-6:])
    assert "--speculative-num-steps 3" in "".join(lines[-3:])
    assert "NOT BETTER THAN THE MODEL'S OWN HEAD" in (tmp_path / "X" / "README.md").read_text()


def test_training_starts_from_an_exported_head(exported: Path, settings: list[str], tmp_path: Path) -> None:
    arguments = [f"mtp.init={exported}", "train.steps=1", "evaluate_at_end=false", f"output_dir={tmp_path}/run"]
    assert run_main("+recipe=distill", *settings, *arguments) == 0
    start = find_checkpoint(tmp_path / "run").head_identity(read_record(exported)["backbone"]).start
    assert start["sha256"] == head_digest(find_checkpoint(exported).tensors())


@pytest.mark.parametrize("form", ["full", "draft"])
def test_an_export_on_the_hub_is_a_checkpoint(
    form: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the head's files come back, not the model's; the figures are those of the export."""
    with stand_in(monkeypatch, tmp_path / "cache") as hub:
        pushed = ["target=vllm", f"export.form={form}", "export.push_to_hub=someone/head"]
        record = export(settings, tmp_path / "X", *pushed)
        assert hub.models["someone/head"].keys() == {path.name for path in (tmp_path / "X").iterdir()}
        again = [
            *settings,
            "checkpoint=hf://someone/head",
            "evaluation.include_stock=false",
            f"output_dir={tmp_path}/E",
        ]
        with certified():
            assert run_main("+recipe=evaluate", *again) == 0
    assert set(hub.fetched) == {EXPORT_MANIFEST, "config.json", *record["head_files"]}
    evaluation = json.loads((tmp_path / "E" / "evaluation.json").read_text())
    lengths = {k: figures["acceptance_length"] for k, figures in evaluation["heads"][0]["replay"].items()}
    assert lengths == pytest.approx(record["acceptance"]["after"])
    command = (tmp_path / "X" / "README.md").read_text()
    assert ("vllm serve someone/head " in command) == (form == "full")
    assert ('"model": "someone/head"' in command) == (form == "draft")


def test_without_the_hub_nothing_is_exported_for_it(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = ["target=vllm", "export.push_to_hub=someone/head", f"output_dir={tmp_path}/X"]
    assert run_main("+recipe=export", *settings, *arguments) == 2
    assert re.search(
        r"^mtptrain: export\.push_to_hub=.* is switched off by HF_HUB_OFFLINE", capfd.readouterr().err, re.M
    )
    assert not (tmp_path / "X").exists()
