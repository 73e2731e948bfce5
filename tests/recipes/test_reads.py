"""The settings that a recipe declares are those that its code reads; another one that a user gives is refused."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mtptrain import cli
from mtptrain.config import MixtureConfig, RunConfig
from mtptrain.config.given import Given
from mtptrain.config.reads import ALWAYS, ROWS, SAMPLING, settings
from mtptrain.config.unread import check_given
from mtptrain.recipes import find_recipe
from tests.command import ROOT, Light, Refused, read_metrics, run_main
from tests.conftest import corpus_texts
from tests.light import certified
from tests.reads import recorded_reads
from tests.recipes.test_recipes import SHAPE

SIZES = "backbone.shape.vocab_size=300 backbone.shape.hidden_size=64 backbone.shape.num_experts=4"  # of the release
# A program, and settings with which one run reads all that the program may read with its source of data.
PROGRAMS = {
    "distill, stdlib": "+recipe=distill data=stdlib data.max_documents=40 decoding.temperature=1",
    "distill, not measured": "+recipe=distill data=text data.path={corpus} evaluate_at_end=false",
    "distill, probed only": "+recipe=distill data=text data.path={corpus} evaluate_at_end=false evaluation.every=1",
    "distill, streams, not measured": "+recipe=distill data=streams data.path={streams} evaluate_at_end=false",
    "distill, text": "+recipe=distill data=text data.path={corpus}",
    "distill, text read during training": "+recipe=distill data=text data.path={corpus} data.streaming=true",
    "distill, mixture": "+recipe=distill data.mixture=[{{path:{corpus}}},{{source:stdlib,name:library}}] "
    "data.max_documents=40",
    "distill, streams": "+recipe=distill data=streams data.path={streams}",
    "distill, followed streams": "+recipe=distill data=streams data.path={streams} data.follow=true",
    "distill, on_policy": "+recipe=distill_on_policy on_policy.num_prompts=4 on_policy.max_new_tokens=4 "
    "data.max_documents=40",
    "distill, on_policy from a text": "+recipe=distill data=on_policy data.path={corpus} on_policy.num_prompts=4 "
    "on_policy.max_new_tokens=4",
    "distill, on_policy from prompts": "+recipe=distill_on_policy on_policy.prompts={prompts} on_policy.path={new}/t "
    "data.max_documents=40 on_policy.max_new_tokens=4",
    "pretrain": "+recipe=pretrain data=text data.path={corpus} evaluation.every=1",
    "collect": "+recipe=collect data=text data.path={corpus}",
    "evaluate": "+recipe=evaluate data=text data.path={corpus} checkpoint={head}",
    "evaluate, prompts of a file": "+recipe=evaluate data=text data.path={corpus} checkpoint={head} prompts={prompts}",
    "evaluate, all checkpoints": "+recipe=evaluate data=text data.path={corpus} checkpoint={head} checkpoints=all",
    "evaluate, all by replay": "+recipe=evaluate data=text data.path={corpus} checkpoint={head} checkpoints=all "
    "evaluation.decoded=none",
    "watch": "+recipe=watch data=text data.path={corpus} checkpoint={head}",
    "doctor": "+recipe=doctor data=text data.path={corpus} checkpoint={head}",
    "doctor, prompts of a file": "+recipe=doctor checkpoint={head} prompts={prompts}",
    "generate": "+recipe=generate checkpoint={head} prompt=The decoding.temperature=1",
    "generate from a text as it is": "+recipe=generate checkpoint={head} prompt=The generate.raw=true",
    "compare": "+recipe=compare data=text data.path={corpus} checkpoints=[stock,{head}]",
    "export": "+recipe=export data=text data.path={corpus} checkpoint={head} target=vllm export.max_drop=9 "
    "plan.batch=2 " + SIZES,
    "export of a draft": "+recipe=export checkpoint={head} prompts={prompts} target=vllm export.form=draft "
    "export.max_drop=9 " + SIZES,
    "export of tensors": "+recipe=export checkpoint={head} target=vllm export.check=tensors",
    "mini_release": "+recipe=mini_release",
    "mini_release, random": "+recipe=mini_release release.random=true backbone.shape.layer_types=[sliding]",
    "mini_release, servable": "+recipe=mini_release release.random=true release.size=servable",
    "backbone": "+recipe=backbone data=text data.path={corpus} train.warmup_steps=1 stock_head.warmup_steps=1 "
    "stock_head.steps=2 stock_head.batch_size=2 data.packages=[] " + " ".join(SHAPE),
    "plan": "+recipe=plan plan.measured=true",
    "plan from an evaluation": "+recipe=plan plan.evaluation={head} plan.head=trained",
    "plan of training": "+recipe=plan plan.what=training plan.measured=true",
    "report": "+recipe=report path={head}",
}
# Programs whose certificate is made, greedily and at a temperature; elsewhere it would read the same settings again.
CERTIFIED = {"evaluate", "evaluate, all checkpoints", "distill, stdlib", "distill, mixture", "distill, on_policy"}
# Read only in a state that no small run reaches: on the hub, in several processes, after many bad steps,
# without a path, in a folder with an earlier run, or beside a run that still trains.
RARELY_READ = {
    "backbone.revision",
    "distributed_timeout",
    "train.max_bad_steps",
    "stock_head.max_bad_steps",
    "backbone.name",
    "overwrite",
    "resume_allow",
    "watch.poll_seconds",
}
# Of single programs: several processes need a placement, and no weights are placed.
RARELY_READ_BY = {"export of tensors": {"backbone.placement"}}
# Read with others although the result does not depend on them.
READ_WITHOUT_EFFECT = {
    *(*SAMPLING, "decoding.past_depth"),  # a policy is made whole, also at temperature 0
    "decoding.served_as",  # heads are loaded alike; an export computes as its target, the doctor as trained
    *("backbone.placement", "engine", "mtp.experts"),  # whether a single process was told to share tensors
    "backbone.weights",  # tells the room for a backbone, also for that of recipe=backbone, which is not quantised
    *("decoding.min_confidence", "loss.temperature", "loss.step_decay"),
    *("data.mixture", "data.streaming", "evaluation.every"),  # whether they are off
    *ROWS,  # copied from parts of a mixture
    *(f"data.mixture.{part.name}" for part in fields(MixtureConfig)),
    # The chat template and the encoder are made whole, also for texts without conversations.
    *("data.turns", "data.on_bad_row", "data.max_tokens", "data.chat_template", "data.chat_template_kwargs"),
    "on_policy.draft_length",  # of a head, if there is one
    "tracking.checkpoints",  # without a tracker that stores them
}


@pytest.fixture(scope="module")
def places(light: list[str], release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of the programs by name; do not write into them."""
    folder = tmp_path_factory.mktemp("reads")
    made = {name: folder / name for name in ("head", "streams", "corpus.jsonl", "prompts.jsonl")}
    corpus = next(one.removeprefix("data.path=") for one in light if one.startswith("data.path="))
    made["prompts.jsonl"].write_text("".join(json.dumps({"prompt": one}) + "\n" for one in corpus_texts()[:4]))
    release = [*light, f"backbone.path={release_folder}"]
    with certified():
        assert run_main("+recipe=distill", *release, f"output_dir={made['head']}") == 0
    assert run_main("+recipe=collect", *release, f"output_dir={made['streams']}") == 0
    return {"corpus": Path(corpus), "head": made["head"], "streams": made["streams"], "prompts": made["prompts.jsonl"]}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_recipe_declares_the_settings_that_it_reads(
    program: str, places: dict[str, Path], light: list[str], release_folder: Path, tmp_path: Path
) -> None:
    arguments = PROGRAMS[program].format(**places, new=tmp_path).split()
    sizes = [one for one in light if not one.startswith(("data=", "data.path=", "backbone.path="))]
    own = map(Light, (f"backbone.path={release_folder}", "train.warmup_steps=1", "data.chat_template=builtin"))
    with recorded_reads() as reads, nullcontext() if program in CERTIFIED else certified():
        code = run_main(*sizes, *own, *arguments, Light(f"output_dir={tmp_path / 'run'}"))
    assert code in (0, 3)  # the doctor finds a random head unhealthy
    assert reads.config is not None
    declared = find_recipe(reads.config.task).reads(reads.config)
    assert declared - reads.names <= RARELY_READ | RARELY_READ_BY.get(program, set()) | ALWAYS
    assert reads.names - declared <= READ_WITHOUT_EFFECT


# Given settings

SERVABLE = "release.random=true release.size=servable"
COMPARED = "checkpoint=a target=vllm export.check=tensors"
UNREAD = [
    # recipe, arguments; pattern of the line
    ("distill", "checkpoint=head", "checkpoint=head: belongs to .*, and .* does not read it; .* mtp.init=PATH"),
    (
        "pretrain",
        "checkpoint=head",
        r"checkpoint=head: belongs to \+recipe=doctor, .* measure_server or watch, and",
    ),
    ("distill", "target=vllm", r"target=vllm: belongs to \+recipe=export, and"),
    ("distill", "--plan", r"collect.plan_only=true: belongs to \+recipe=collect, and"),
    ("distill", "stock_head.steps=5", r"stock_head.steps=5: belongs to \+recipe=backbone, and"),
    ("distill", "backbone.shape.hidden_size=64", r"backbone.shape.hidden_size=64: belongs to \+recipe=backbone, and"),
    ("distill", "+model=tiny", r"model=tiny: belongs to \+recipe=plan, and"),
    ("distill", "data=stdlib data.path=a.txt", r"data.path=a.txt: \+recipe=distill with data=stdlib .*set data=text"),
    ("distill", "data=stdlib data.field_name=body", "data.field_name=body: .* data=stdlib .*: set data=text data.path"),
    ("distill", "data.packages=[torch]", r"data.packages=\[torch\]: \+recipe=distill with data=text .* data=stdlib"),
    ("distill", "data.workers=2", "data.workers=2: .*; they read text during training: set data.streaming=true"),
    ("distill", "on_policy.temperature=0.5", "on_policy.temperature=0.5: .* with data=text .*; set data=on_policy"),
    ("distill", "decoding.top_k=5", "decoding.top_k=5: .* does not read it; it matters at a decoding.temperature"),
    ("pretrain", "loss.temperature=2", "loss.temperature=2.0: .* loss.divergence=ce"),
    ("evaluate", "checkpoint=stock train.steps=5", "train.steps=5: belongs to .*backbone, distill or pretrain, and"),
    ("evaluate", "checkpoint=stock checkpoints=[a]", r"checkpoints=\[a\]: .* checkpoint=PATH"),
    ("evaluate", "checkpoint=stock train={{steps:5}}", "train.steps=5: belongs to"),
    ("doctor", "checkpoint=stock tracking=wandb", "tracking=wandb: belongs to .*; leave it out"),
    ("collect", "evaluation.num_prompts=5", "evaluation.num_prompts=5: belongs to"),
    ("plan", "data.path=a.txt", "data.path=a.txt: belongs to"),
    ("plan", "backbone=small", "backbone=small: belongs to .* model=NAME"),
    ("generate", "prompt=a prompts=b", r"prompts=\[b\]: belongs to .*; generate takes one text: prompt=TEXT"),
    ("generate", "prompt=a output_dir=b", "output_dir=b: belongs to .*; generate writes no file: redirect its output"),
    ("generate", "prompt=a generate.raw=true data.chat_template=builtin", "data.chat_template=builtin: .*"),
    ("evaluate", "checkpoint=stock prompt=a", r"prompt=a: belongs to \+recipe=generate, .* prompts=\[FILE\]"),
    ("report", "path=a seed=5", "seed=5: belongs to"),
    ("report", "path=a resume=auto", "resume=auto: belongs to .*; only trainings, .* continue; leave it out"),
    ("evaluate", "checkpoint=stock resume=auto", "resume=auto: belongs to"),
    (
        "collect",
        "resume=auto resume_allow=[train]",
        r"resume_allow=\[train\]: belongs to .*distill",
    ),
    ("distill", "resume=auto resume_allow=[train.step]", "resume_allow=.*: train.step: there is no .*mean train.steps"),
    ("collect", "collect.max_kl=1", "collect.max_kl=1.0: .* it belongs to vLLM: set collect.engine=vllm"),
    ("collect", "overwrite=true", "overwrite=true: belongs to .*evaluate"),
    ("evaluate", "checkpoint=stock decoding.min_p=0.1", "decoding.min_p=0.1: .*at a decoding.temperature above 0"),
    ("evaluate", "checkpoint=stock data=stdlib data.split=test", "data.split=test: .* prompts=NAME:SUBSET:SPLIT"),
    ("distill", "on_policy.min_p=0.1", "on_policy.min_p=0.1: .* with data=text .*; set data=on_policy"),
    ("mini_release", "release.size=servable", "release.size=servable: .*; set release.random=true as well"),
    (
        "mini_release",
        f"{SERVABLE} backbone.shape.head_dim=16",
        "backbone.shape.head_dim=16: .*servable brings all sizes of",
    ),
    ("mini_release", f"{SERVABLE} backbone=small", "backbone=small: release.size=serv"),
    ("mini_release", "backbone.weights=keep", "backbone.weights=keep: .* a miniature is made of decoded weights"),
    ("export", "checkpoint=a target=hf export.force=true", "export.force=true: .*; only target=vllm goes by the path"),
    ("export", f"{COMPARED} prompts=b", r"prompts=\[b\]: export.check=tensors measures"),
    ("export", f"{COMPARED} export.max_drop=1", "export.max_drop=1.0: .*check=replay"),
    ("export", f"{COMPARED} decoding.past_depth=stop", "decoding.past_depth=stop: .*export.check=tensors"),
    ("export", f"{COMPARED} hardware=h100", "hardware=h100: export.check=tensors .*"),
    ("export", f"{COMPARED} train.steps=5", "train.steps=5: belongs to"),
    ("export", "checkpoint=a target=vllm decoding.served_as=vllm", "decoding.served_as=vllm: "),
    ("doctor", "checkpoint=a decoding.past_depth=stop", "decoding.past_depth=stop: "),
    ("doctor", "checkpoint=a decoding.served_as=vllm", "decoding.served_as=vllm: "),
    ("collect", "decoding.served_as=vllm", "decoding.served_as=vllm: belongs to"),
    (
        "distill",
        "data=on_policy on_policy.temperature=0 on_policy.min_p=0.1",
        "on_policy.min_p=0.1: .* with data=on_policy .*at an on_policy.temperature above 0",
    ),
    (
        "distill",
        "evaluate_at_end=false decoding.temperature=1",
        "decoding.temperature=1.0: nothing is measured with evaluate_at_end=false and evaluation.every=0; leave it",
    ),
    ("distill", "evaluate_at_end=false decoding.top_k=5", "decoding.top_k=5: nothing is measured"),
    ("pretrain", "evaluate_at_end=false prompts=a", r"prompts=\[a\]: nothing is measured with evaluate_at_end=false"),
    ("distill", "evaluate_at_end=false evaluation.num_prompts=9", "evaluation.num_prompts=9: nothing is measured"),
    ("distill", "evaluate_at_end=false overwrite=true", "overwrite=true: nothing is measured"),
    (
        "distill",
        "data=streams evaluate_at_end=false decoding.stop=[1]",
        r"decoding.stop=\[1\]: nothing is measured with evaluate_at_end=false; leave it out$",
    ),
    (
        "distill",
        "backbone.placement=zero3 decoding.temperature=1",
        "decoding.temperature=1.0: backbone.placement=zero3 decodes nothing, so nothing is measured",
    ),
    ("report", "path=a data=streams data.path=b data.follow=true", "data.follow=true: belongs to .*compare, distill"),
    ("collect", "data=streams data.path=b data.follow=true", "data.follow=true: belongs to .*compare, distill"),
    ("backbone", "data.streaming=true", r"data.streaming=true: .* \+recipe=backbone reads its text before it starts"),
    ("backbone", "decoding.temperature=1", "decoding.temperature=1.0: belongs to"),
    ("distill", "data=stdlib data.turns=last", "data.turns=last: .* data=stdlib .*; it is for rows of your own"),
    ("evaluate", "checkpoint=stock data=stdlib data.chat_template=builtin", "data.chat_template=builtin: .*rows"),
    ("distill", "data=streams evaluate_at_end=false data.turns=last", "data.turns=last: nothing is measured"),
    ("distill", "tracking.name=a", "tracking.name=a: .*; no tracker is on: set tracking=wandb, mlflow"),
    (
        "distill",
        "mtp.steps=1 loss.step_decay=0.5",
        "loss.step_decay=0.5: .*; it weighs several steps, .* mtp.steps above 1",
    ),
    (
        "distill",
        "data=on_policy mtp.init=fresh on_policy.draft_length=3",
        "on_policy.draft_length=3: .*; a head of mtp.init=fresh or backbone drafts nothing",
    ),
    (
        "generate",
        "checkpoint=stock prompt=a generate.raw=true data.chat_template=builtin",
        "data.chat_template=builtin: generate.raw=true continues the prompt as it is; leave one of them out",
    ),
    ("report", "path=a backbone.path=b", "backbone.path=b: .* any other recipe needs none"),
    ("distill", "data=stdlib data.format=alpaca", "data.format=alpaca: .* data=stdlib .*: set data=text"),
]


@pytest.mark.parametrize(("recipe", "given", "line"), UNREAD)
def test_a_setting_that_is_not_read_is_refused(recipe: str, given: str, line: str, refused: Refused) -> None:
    assert re.match(line, refused(*given.replace("{{", "{").replace("}}", "}").split(), recipe=recipe))


def test_a_default_value_is_not_refused(light: list[str], tmp_path: Path) -> None:
    given = ["checkpoint=null", "evaluation.every=0", "evaluate_at_end=false", "target=null"]
    assert run_main("+recipe=distill", *light, *given, f"output_dir={tmp_path}") == 0


def test_sizes_of_an_evaluation_that_are_not_read_are_noted(
    places: dict[str, Path], light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["checkpoint=stock", f"prompts={places['prompts']}", "evaluation.timed_prompts=1"]
    assert run_main("+recipe=doctor", *light, *arguments, f"output_dir={tmp_path}") == 3
    note = r"^note: \+recipe=doctor does not read evaluation.timed_prompts=1 with these settings$"
    assert re.search(note, capfd.readouterr().err, re.MULTILINE)


def test_a_sweep_reads_its_folder_for_every_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(task="generate", output_dir="sweep")
    check_given(Given(frozenset({"output_dir"}), {}, is_sweep=True), config, settings("prompt"), lambda _: [])
    assert capfd.readouterr().err == ""


def test_values_of_a_shipped_recipe_are_not_refused(tmp_path: Path) -> None:
    assert run_main("+recipe=flash_2nodes", "task=plan", f"output_dir={tmp_path}") == 0


def test_values_of_a_users_own_recipe_are_refused(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\ndefaults: [distill, _self_]\nstock_head: {steps: 7}\n", encoding="utf-8")
    assert run_main("--config-dir", str(tmp_path), "+recipe=mine", *light, f"output_dir={tmp_path}/run") == 2
    assert re.match(r"mtptrain: stock_head.steps=7: belongs to \+recipe=backbone", capfd.readouterr().err)


def test_a_file_of_ones_own_in_a_group_serves_every_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as hardware: plans read its memory and exports do not; both may leave the measured rates."""
    own = tmp_path / "hardware" / "mine.yaml"
    own.parent.mkdir()
    own.write_text((ROOT / "conf/hardware/h200.yaml").read_text("utf-8").replace("h200", "mine"), encoding="utf-8")
    folder = ["--config-dir", str(tmp_path)]
    assert run_main(*folder, "+recipe=plan", "hardware=mine", f"output_dir={tmp_path}/plan") == 0
    capfd.readouterr()
    export = ["+recipe=export", "hardware=mine", "checkpoint=nowhere", "target=hf", f"output_dir={tmp_path}/E"]
    assert run_main(*folder, *export) == 2
    assert "mtptrain: checkpoint=nowhere: " in capfd.readouterr().err
    assert run_main(*folder, "+recipe=distill", "+hardware=mine") == 2
    assert "mtptrain: hardware=mine: belongs to +recipe=" in capfd.readouterr().err


def test_a_path_in_a_file_of_ones_own_chooses_its_source(light: list[str], corpus_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "data" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(f"path: {corpus_file}\n", encoding="utf-8")
    sizes = [one for one in light if not one.startswith("data")]
    run = ["+recipe=distill", "data=mine", *sizes, "data.sequence_length=32", f"output_dir={tmp_path}/run"]
    assert run_main("--config-dir", str(tmp_path), *run, "evaluate_at_end=false") == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text(encoding="utf-8"))["data"]["source"] == "text"


@pytest.mark.parametrize(("place", "source"), [("corpus", "text"), ("streams", "streams")])
def test_a_path_chooses_its_source(
    place: str, source: str, places: dict[str, Path], light: list[str], tmp_path: Path, release_folder: Path
) -> None:
    sizes = [one for one in light if not one.startswith(("data", "backbone"))]
    arguments = [f"backbone.path={release_folder}", f"data.path={places[place]}", "evaluate_at_end=false"]
    arguments += ["data.sequence_length=32", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *sizes, *arguments) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["data"]["source"] == source
    assert len(read_metrics(tmp_path)) == 2


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every command on a page that names a recipe and is whole."""
    for part in page.read_text(encoding="utf-8").replace("\\\n", " ").split("python -m mtptrain ")[1:]:
        command = re.split(r"[`\n#&|]", part)[0]
        if "+recipe=" in command and not re.search(r"NAME|\.\.\.| -m |--config-dir|--cfg", f" {command}"):
            yield shlex.split(command)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_commands_of_the_docs_give_only_settings_that_are_read(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(config: RunConfig, _: object, given: Given, __: object) -> None:
        check_given(given, config, find_recipe(config.task).reads(config), lambda name: [])

    monkeypatch.setattr(cli, "run_task", check)
    for command in commands(ROOT / page):
        assert run_main(*command) == 0, command
