"""A user's mistake ends with one line that names the way out, exit code 2, and nothing half-written."""

import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

import mtptrain
from mtptrain import cli, config
from mtptrain.cli import PATIENCE_SECONDS
from mtptrain.config import LossName
from mtptrain.errors import CHECK_FAILED, INTERRUPTED, PREEMPTED, USER_MISTAKE
from mtptrain.help import field_notes
from tests.command import ROOT, Refused, run_main, run_process

MISTAKES = [
    # arguments; pattern of the line, with setting, value, rule and way out
    (["mtp.depth=0"], "mtp.depth=0: must be at least 1"),
    (["mtp.depth=2"], "mtp.depth=2: mtp.mode=shared has one module .* set mtp.mode=stacked"),
    (["mtp.mode=stacked", "mtp.depth=3", "mtp.steps=2"], "mtp.steps=2: must be at least mtp.depth=3"),
    (["mtp.steps=9"], "mtp.steps=9: must be at most 8"),
    (["mtp.steps=3", "data.sequence_length=4"], r"data.sequence_length=4: .*depth 3.* use at least 5"),
    (["decoding.draft_length=9"], "decoding.draft_length=9: must lie between 1 and 8"),
    (["loss.divergence=ce"], r"loss.divergence=ce: .*use \+recipe=pretrain"),
    (["resume=sometimes"], "resume=sometimes: must be never or auto"),
    (["resume=auto", "output_dir=null"], "resume=auto: .*set output_dir"),
    (["data.path=null"], "data.path=null: data=text and data=chat need"),
    (["train.steps=0"], "train.steps=0: must be at least 1"),
    (["train.learning_rate=nan"], "train.learning_rate=nan: must be above 0"),
    (["train.beta1=1"], r"train.beta1=1.0: must lie in \[0, 1\)"),
    (["train.weight_decay=-1"], "train.weight_decay=-1.0: must not be negative"),
    (["evaluation.num_prompts=0"], "evaluation.num_prompts=0: must be at least 1"),
    (["path=my.jsonl"], r"path=my.jsonl: belongs to \+recipe=report, and \+recipe=distill does not .*; data.path"),
    (["on_policy.stop_strings=[a]"], r"on_policy.stop_strings: .*; did you mean decoding.stop_strings\?$"),
    (["data.learning_rate=1"], r"data.learning_rate: .*; did you mean (train|stock_head).*learning_rate.*\?$"),
    (["trian.steps=2"], r"trian.steps: there is no such setting; did you mean train.steps\?$"),
    (["+trian.steps=2"], r"trian: there is no such setting; did you mean train\?$"),
    (["+train.stps=2"], r"train.stps: there is no such setting; did you mean train.steps\?$"),
    (["train.step=2"], r"train.step: there is no such setting; did you mean train.steps\?$"),
    (["++train.step=2"], r"train.step: there is no such setting; did you mean train.steps\?$"),
    (["~mtp.depht"], r"mtp.depht: there is no such setting; did you mean mtp.depth\?$"),
    (["steps=2"], r"steps: there is no such setting; did you mean mtp.steps, stock_head.steps or train.steps\?$"),
    (["xyzzy=2"], "xyzzy: there is no such setting; `--cfg job` lists all of them$"),
    (["data.mixture=[{pth:a.txt}]"], r"data.mixture: its parts have no pth; did you mean path\? They have name, "),
    (["decoding.stop_below=0.4"], "decoding.stop_below: there is no .* is now called decoding.min_confidence$"),
    (["+decoding.stop_below=0.4"], "decoding.stop_below: there is no .* is now called decoding.min_confidence$"),
    (["stock_head.steps=0"], "stock_head.steps=0: must be at least 1"),
    (["train.learning_rate=inf"], "train.learning_rate=inf: must be finite"),
    (["train.steps=many"], "train.steps=many: must be a whole number$"),
    (["train.steps=2.5"], "train.steps=2.5: must be a whole number$"),
    (["train.learning_rate=fast"], "train.learning_rate=fast: must be a number$"),
    (["data.streaming=maybe"], "data.streaming=maybe: must be true or false$"),
    (["evaluation.batch_sizes=2"], r"evaluation.batch_sizes=2: must be a list of whole numbers, such as .*=\[A,B\]$"),
    (["train=5"], "train=5: train is a section; give one of its settings, such as train.steps=VALUE$"),
    (["loss.divergence=foo"], "loss.divergence=foo: must be ce, kl, .* or chain$"),
    (["loss.divergence=reversekl"], r"loss.divergence=reversekl: must be .*; did you mean reverse_kl\?$"),
    (["engine=zero4"], r"engine=zero4: must be single, zero1, zero2 or zero3; did you mean zero3\?$"),
    (["++engine=zero4"], r"engine=zero4: must be single, zero1, zero2 or zero3; did you mean zero3\?$"),
    (["offload=true"], "offload=true: needs engine=zero1, zero2 or zero3"),
    (["engine=zero1", "train.optimizer=muon"], "train.optimizer=muon: needs whole matrices .*; set engine=single"),
    (["engine=zero3", "precision=bf16"], "precision=bf16: DeepSpeed's stage 3 holds .*; set engine=zero2"),
    (["engine=zero2"], "engine=zero2: shares tensors out .* was started alone; start it with scripts/launch_"),
    (["mtp.experts=expert_parallel"], "mtp.experts=expert_parallel: shares tensors out .* was started alone"),
    (["mtp.experts=expert_parallel", "engine=zero3"], "mtp.experts=expert_parallel: .*; set engine=zero1 or zero2"),
    (["deepspeed.config=absent.json"], r"deepspeed=\[config\]: tunes DeepSpeed; set engine=zero1, zero2 or zero3"),
    (["engine=zero2", "deepspeed.bf16.enabled=true"], "deepspeed.bf16=.*; set precision=bf16"),
    (["backbone.placement=zero3"], "backbone.placement=zero3: shares tensors out .* was started alone"),
    (["device=tpu"], "device=tpu: must be auto, cpu or cuda"),
    (["data=csv"], "data=csv: there is no such choice of data; there are chat, .*, stdlib, streams, text$"),
    (["data=txt"], r"data=txt: there is no such choice of data; did you mean text\? There are "),
    (
        ["tracking=[wandb,tensorbord]"],
        r"tracking=tensorbord: there is no such .*; did you mean tensorboard\? There are",
    ),
    (["+model=v4flash"], r"\+model=v4flash: there is no such choice of model; did you mean v4_flash\? There are"),
    (["model=v4_flash"], r"model: is not chosen yet; write it with a plus: \+model=v4_flash$"),
    (["+data=stdlib"], r"\+data: there is a choice of data already; write data=NAME without the plus to change it$"),
    (["task=distil"], r"task=distil: there is no such program; did you mean distill\?; leave it to \+recipe=NAME"),
    (["seed=${nowhere}"], "seed: .*'nowhere' not found; write a value"),
    (["train.steps=???"], r"train.steps=\?\?\?: write a value"),
    (["data.mixture=${prompts}"], "data.mixture=heldout: must be a list of sections, such as data.mixture="),
    (["data.path=/a (b).txt"], r"data.path=/a \(b\).txt: is not setting=value; .*'setting=\"value\"'"),
    (["distill"], "distill: is not setting=value"),
    (["plan.batch=2"], "plan.batch=2: this recipe has no plan and does not read it; leave it out"),
    (
        ["data.mixture=[a.txt]"],
        r"data.mixture=a.txt: must be a list of sections, such as .*\[{path:A,weight:2},{path:B}",
    ),
    (["train.steps=1,2"], r"train.steps=1,2: several values are jobs of a sweep, .* -m; .* train.steps=\[1,2\], and"),
    (["output_dir="], "output_dir=: is empty; give a path"),
    (["deepspeed=null"], "deepspeed=null: must be a mapping, such as deepspeed={A:B}$"),
    (["backbone=null"], "backbone=null: must be one of small, tiny, tiny12, v4_flash, "),
    (
        ["backbone=[tiny,tiny12]"],
        r"backbone=\[tiny,tiny12\]: takes one choice; to run each, begin with -m and leave out",
    ),
    (["data.mixture=[{path:a,source:txt}]"], "data.mixture: source=txt: must be stdlib, text, .*; did you mean text"),
    (["data.mixture=[{path:a},{path:b,weight:x}]"], "data.mixture: weight=x: must be a number$"),
    (["data.mixture={path:a}"], "data.mixture={path:a}: must be a list of sections, such as data.mixture="),
    (["train={stepz:4}"], r"train.stepz: there is no such setting; did you mean train.steps\?$"),
    (["backbone={shape:{hiden_size:4}}"], r"backbone.shape.hiden_size: .*; did you mean backbone.shape.hidden_size\?$"),
    (["+train={stepz:4}"], r"train.stepz: there is no such setting; did you mean train.steps\?$"),
    (["data.mixture.path=a"], r"data.mixture.path=a: data.mixture is a list; write the whole list, data.mixture=\["),
    (["tracking.trackers.wandbb=true"], "tracking.trackers.wandbb: unknown tracker; choose from mlflow"),
    (["prompts=heldot"], r"prompts=heldot: datasets cannot load it .*; did you mean heldout\?$"),
    (["resume=atuo"], r"resume=atuo: must be never or auto; did you mean auto\?$"),
    (["mtp.init=fersh"], r"mtp.init=fersh: .*; did you mean fresh\?"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_wrong_setting_is_named_with_its_rule(arguments: list[str], line: str, refused: Refused) -> None:
    assert re.match(rf".*{line}", refused(*arguments))


def test_an_unknown_recipe_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    code, output, errors = run_process("+recipe=distil", folder=tmp_path)
    assert (code, output) == (2, "")
    known = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")))
    line = f"+recipe=distil: there is no such recipe; did you mean distill? There are {known}"
    assert errors == f"mtptrain: {line}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_command_without_a_recipe_points_to_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("train.steps=2") == 2
    assert re.fullmatch(r"mtptrain: no recipe is chosen; add \+recipe=distill .*\n", capfd.readouterr().err)


def test_an_option_may_stand_behind_a_setting(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("+recipe=distill", "--cfg", "job", "train.steps=2") == 0
    assert "  steps: 2\n" in capfd.readouterr().out


def test_an_unknown_option_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("+recipe=distill", "--plain", "train.steps=2") == 2
    line = "mtptrain: unrecognized arguments: --plain; a setting is written name=value, without dashes; see --help\n"
    assert capfd.readouterr().err == line


def test_a_mistyped_recipe_is_answered_with_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("distil", "train.steps=2") == 2
    line = r"mtptrain: distil: there is no such recipe; did you mean distill\? There are backbone, .*\n"
    assert re.fullmatch(line, capfd.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(refused: Refused) -> None:
    assert re.match(r"device=cuda: torch sees no GPU here; use device=cpu", refused("device=cuda"))


def test_evaluate_needs_a_checkpoint(refused: Refused) -> None:
    assert re.match("checkpoint=null: evaluate needs a head; give .*stock", refused(recipe="evaluate"))


@pytest.mark.parametrize("recipe", ["distill", "evaluate"])
def test_too_many_prompts_are_refused_before_any_training(recipe: str, refused: Refused) -> None:
    head = ["checkpoint=stock"] if recipe == "evaluate" else []
    line = refused("evaluation.num_prompts=5000", *head, recipe=recipe)
    assert re.match(r"evaluation.num_prompts=5000: .* has \d+ prompts of evaluation.prompt_tokens=12; lower", line)


# The output folder


@pytest.mark.parametrize("below", ["", "/run", "/deep/run"])
def test_an_output_folder_that_cannot_be_made_is_refused(below: str, corpus_file: Path, refused: Refused) -> None:
    line = refused(f"output_dir={corpus_file}{below}")
    assert line == f"output_dir={corpus_file}{below}: {corpus_file} is not a folder; choose another one"


def test_the_folder_of_a_sweep_that_cannot_be_made_is_named(
    corpus_file: Path, light: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("-m", "+recipe=distill", *light, "train.steps=1,2", f"output_dir={corpus_file}/sweep") == 2
    assert re.fullmatch(rf"mtptrain: \w+Error: .*'{corpus_file}/sweep'; see --help\n", capfd.readouterr().err)


def test_a_sweep_lists_the_jobs_that_failed(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("-m", "+recipe=distill", *light, "mtp.steps=9,10", f"output_dir={tmp_path}") == 2
    output, errors = capfd.readouterr()
    assert errors.splitlines() == [
        f"job 0: {tmp_path}/mtp.steps-9",
        "mtptrain: mtp.steps=9: must be at most 8",
        f"job 1: {tmp_path}/mtp.steps-10",
        "mtptrain: mtp.steps=10: must be at most 8",
        f"wrote {tmp_path}/sweep.json and {tmp_path}/sweep.html",
    ]
    assert output.startswith("0 of 2 jobs done\n")
    assert output.count("FAILED") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["multirun.yaml", "sweep.html", "sweep.json"]


def test_a_sweep_over_its_own_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("-m", "+recipe=distill", f"output_dir={tmp_path}/a,{tmp_path}/b") == 2
    assert capfd.readouterr().err.startswith("mtptrain: output_dir: a sweep needs one folder")
    assert list(tmp_path.iterdir()) == []


# Commands that answer at once


@pytest.fixture(params=[40, 120])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def fits(output: str, columns: int) -> bool:
    """Return whether lines end within the columns; a setting with its value is not cut."""
    return all(len(line) <= columns or len(line.split()) == 1 for line in output.splitlines())


def test_help_lists_every_recipe(columns: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("--help") == 0
    output = capfd.readouterr().out
    for path in (ROOT / "conf" / "recipe").glob("*.yaml"):
        assert re.search(rf"^  {path.stem} +[A-Z](.*\n    )*.*[.?]$", output, re.MULTILINE)
    assert fits(output, columns)


def test_a_long_option_goes_on_below_its_text(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert run_main("--help") == 0
    assert f" table and\n{' ' * 26}sweep.html\n" in capfd.readouterr().out


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_word(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "print_recipe_help", close)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert run_main("distill", "--help") == 1
    assert capfd.readouterr().err == ""


def test_a_command_of_no_words_prints_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main() == 0
    alone = capfd.readouterr().out
    assert run_main("-h") == 0
    assert capfd.readouterr().out == alone
    codes = {int(code) for code in re.findall(r"^  (\d+) +\S", alone.partition("Exit codes:")[2], re.MULTILINE)}
    assert codes == {0, 1, USER_MISTAKE, CHECK_FAILED, PREEMPTED, INTERRUPTED}


def test_the_help_of_a_recipe_lists_what_it_reads(columns: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("distill", "data=stdlib", "--help", "train.steps=7") == 0
    output = capfd.readouterr().out
    assert output.startswith("Train a head on the backbone's own")
    assert "\n  train.steps=7" in output
    assert "\n  data=chat|on_policy|stdlib|streams|text\n" in output
    text = " ".join(output.split())
    assert "engine=single single|zero1|zero2|zero3" in text
    assert "data.max_documents=null" in text
    assert "threads=null CPU threads of torch; null = 1 for a backbone with a hidden_size below 256" in text
    assert "plan." not in output
    assert "data.path" not in output  # of data=text
    assert fits(output, columns)


def test_no_setting_loses_its_comment_to_a_line_break() -> None:
    """The help reads the lines above a field and the end of its own, not those of a default in brackets."""
    schemas = [one for one in vars(config).values() if is_dataclass(one)]
    assert config.DataConfig in schemas
    assert not [line for one in schemas for line in re.findall(r"\n    \w+: .* = \(\n", inspect.getsource(one))]
    assert field_notes(config.DataConfig)["chat_template"].startswith("A jinja file")


@pytest.mark.parametrize("choice", ["distill data=text", "distill data=chat", "distill data=streams", "flash_2nodes"])
def test_the_help_of_a_choice_needs_no_file(choice: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(*choice.split(), "--help") == 0
    assert "\n  data.path=PATH" in capfd.readouterr().out


def test_the_version_is_that_of_this_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("--version") == 0
    assert capfd.readouterr().out == f"mtptrain {mtptrain.__version__}\n"


def test_help_lists_every_loss_and_tracker(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run_main("--help") == 0
    output = capfd.readouterr().out
    assert f"loss.divergence={'|'.join(LossName)}\n" in output
    trackers = sorted(path.stem for path in (ROOT / "conf" / "tracking").glob("*.yaml"))
    assert f"tracking={'|'.join(trackers)} or " in output


def test_showing_a_configuration_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['mtptrain', '--cfg', 'job', '+recipe=distill']; "
        "from mtptrain.cli import main; main(); sys.exit(len({'torch', 'transformers'} & sys.modules.keys()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "divergence: kl" in shown.stdout


def test_another_process_waits_until_rank_0_has_printed_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all processes as soon as the first has ended."""
    waited: list[float] = []
    monkeypatch.setattr("mtptrain.cli.time.sleep", waited.append)
    for rank, line in (("1", ""), ("0", "mtptrain: train.steps=0: must be at least 1\n")):
        monkeypatch.setenv("RANK", rank)
        assert run_main("+recipe=distill", "train.steps=0") == 2
        assert capfd.readouterr().err == line
    assert waited == [PATIENCE_SECONDS, 0]
