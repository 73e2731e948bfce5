"""The settings that a recipe declares are those that its code reads; another one that a user gives is refused."""

import json
from pathlib import Path

import pytest

from mtptrain.config.reads import ALWAYS, SAMPLING
from mtptrain.recipes import find_recipe
from tests.command import Light, run_main
from tests.conftest import corpus_texts
from tests.reads import recorded_reads
from tests.recipes.test_recipes import SHAPE

# A program, and settings with which one run reads all that the program may read with its source of data.
PROGRAMS = {
    "distill, stdlib": "+recipe=distill data=stdlib decoding.temperature=1",
    "distill, text": "+recipe=distill data=text data.path={corpus}",
    "distill, text read during training": "+recipe=distill data=text data.path={corpus} data.streaming=true",
    "distill, mixture": "+recipe=distill data.mixture=[{{path:{corpus}}},{{source:stdlib,name:library}}]",
    "distill, streams": "+recipe=distill data=streams data.path={streams}",
    "distill, on_policy": "+recipe=distill_on_policy on_policy.num_prompts=4 on_policy.max_new_tokens=8",
    "distill, on_policy from a text": "+recipe=distill data=on_policy data.path={corpus} on_policy.num_prompts=4",
    "distill, on_policy from prompts": "+recipe=distill data=on_policy on_policy.prompts={prompts} on_policy.path={new}/t",
    "pretrain": "+recipe=pretrain data=text data.path={corpus} evaluation.every=1",
    "collect": "+recipe=collect data=text data.path={corpus}",
    "evaluate": "+recipe=evaluate data=text data.path={corpus} checkpoint={head}",
    "evaluate, prompts of a file": "+recipe=evaluate data=text data.path={corpus} checkpoint={head} prompts={prompts}",
    "doctor": "+recipe=doctor data=text data.path={corpus} checkpoint={head}",
    "doctor, prompts of a file": "+recipe=doctor checkpoint={head} prompts={prompts}",
    "compare": "+recipe=compare data=text data.path={corpus} checkpoints=[stock,{head}]",
    "export": "+recipe=export data=text data.path={corpus} checkpoint={head} target=vllm export.max_drop=9",
    "mini_release": "+recipe=mini_release",
    "mini_release, random": "+recipe=mini_release release.random=true backbone.shape.layer_types=[sliding]",
    "backbone": "+recipe=backbone data=text data.path={corpus} train.warmup_steps=1 stock_head.warmup_steps=1 "
    "stock_head.steps=2 stock_head.batch_size=2 data.packages=[] " + " ".join(SHAPE),
    "plan": "+recipe=plan",
    "plan from an evaluation": "+recipe=plan plan.evaluation={head}",
    "plan of training": "+recipe=plan plan.what=training",
    "report": "+recipe=report path={head}",
}
# Read only in a state that no small run reaches: on the hub, in several processes, after many bad steps, in a tracker, or without a path.
RARELY_READ = {
    "backbone.revision",
    "distributed_timeout",
    "train.max_bad_steps",
    "stock_head.max_bad_steps",
    "backbone.name",
}
RARELY_READ |= {f"tracking.{name}" for name in ("group", "name", "project", "tags")}
# Read with others although the result does not depend on them.
READ_WITHOUT_EFFECT = {
    *SAMPLING,  # a policy is made whole, also at temperature 0
    *("decoding.min_confidence", "loss.temperature", "loss.step_decay"),
    *("data.mixture", "data.streaming", "evaluation.every"),  # whether they are off
    *("data.path", "data.field_name", "data.mixture.path", "data.mixture.field_name"),  # copied from parts of a mixture
    *("data.mixture.name", "data.mixture.source", "data.mixture.weight"),
}


@pytest.fixture(scope="module")
def places(light: list[str], release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of the programs by name; do not write into them."""
    folder = tmp_path_factory.mktemp("reads")
    made = {name: folder / name for name in ("head", "streams", "corpus.jsonl", "prompts.jsonl")}
    corpus = next(one.removeprefix("data.path=") for one in light if one.startswith("data.path="))
    made["prompts.jsonl"].write_text("".join(json.dumps({"prompt": one}) + "\n" for one in corpus_texts()[:4]))
    release = [*light, f"backbone.path={release_folder}"]
    assert run_main("+recipe=distill", *release, f"output_dir={made['head']}") == 0
    assert run_main("+recipe=collect", *release, f"output_dir={made['streams']}") == 0
    return {"corpus": Path(corpus), "head": made["head"], "streams": made["streams"], "prompts": made["prompts.jsonl"]}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_recipe_declares_the_settings_that_it_reads(
    program: str, places: dict[str, Path], light: list[str], release_folder: Path, tmp_path: Path
) -> None:
    arguments = PROGRAMS[program].format(**places, new=tmp_path).split()
    sizes = [one for one in light if not one.startswith(("data=", "data.path=", "backbone.path="))]
    backbone = Light(f"backbone.path={release_folder}")
    with recorded_reads() as reads:
        code = run_main(*sizes, backbone, Light("train.warmup_steps=1"), *arguments, f"output_dir={tmp_path / 'run'}")
    assert code in (0, 3)  # the doctor finds a random head unhealthy
    assert reads.config is not None
    declared = find_recipe(reads.config.task).reads(reads.config)
    assert declared - reads.names <= RARELY_READ | ALWAYS
    assert reads.names - declared <= READ_WITHOUT_EFFECT
