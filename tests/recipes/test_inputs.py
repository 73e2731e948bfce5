"""Whatever needs no weights is checked before a backbone is loaded, by every recipe."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mtptrain.backbone import load
from mtptrain.release import fingerprint
from mtptrain.traces.file import write_trace_set
from tests.command import Refused, run_main
from tests.conftest import save_backbone
from tests.recipes.recorded import recorded

WRONG = [
    # recipe, arguments; pattern of the line
    ("distill", "data.path={new}/nowhere.jsonl", "data.path=.*nowhere.jsonl: cannot be read"),
    ("distill", "data.path={new}/nowhere.jsonl data.streaming=true", "data.path=.*nowhere.jsonl: cannot be read"),
    ("distill", "data.mixture=[{{path:{new}/no.jsonl}}]", "data.path=.*no.jsonl: cannot be read"),
    ("distill", "data.field_name=body", "data.field_name=body: "),
    ("distill", "data.path={talk} data.field_name=messages", "data.path: .* no chat template"),
    ("distill", "data.chat_template={new}/no.jinja", "data.chat_template=.*no.jinja: "),
    ("distill", "data=streams data.path={new}/no", "data.path=.*/no: "),
    ("distill", "mtp.init={new}/no", "mtp.init=.*/no: checkpoint=.* no checkpoint there"),
    ("distill", "prompts={new}/no.jsonl", "prompts=.*no.jsonl: "),
    ("distill", "evaluation.traces={new}/no.jsonl", "evaluation.traces=.*no.jsonl: "),
    ("distill", 'decoding.stop=["two words of a text"]', "decoding.stop=two words of a text: is not one token"),
    ("distill_on_policy", "on_policy.prompts={new}/no.jsonl", "on_policy.prompts=.*no.jsonl: "),
    ("pretrain", "data.path={new}/nowhere.jsonl", "data.path=.*nowhere.jsonl: cannot be read"),
    ("collect", "data.path={new}/nowhere.jsonl", "data.path=.*nowhere.jsonl: cannot be read"),
    ("evaluate", "checkpoint={new}/no", "checkpoint=.*/no: no checkpoint there"),
    ("evaluate", "checkpoint=stock prompts={new}/no.jsonl", "prompts=.*no.jsonl: "),
    ("evaluate", "checkpoint=stock prompts={prompts} data.path={new}/no.jsonl", "data.path=.*no.jsonl: "),
    ("evaluate", "checkpoint=stock decoding.max_new_tokens=99999", "decoding.max_new_tokens=99999: leaves no room"),
    ("doctor", "checkpoint={new}/no", "checkpoint=.*/no: no checkpoint there"),
    ("doctor", "checkpoint=stock prompts={new}/no.jsonl", "prompts=.*no.jsonl: "),
    ("compare", "checkpoints=[stock,{new}/no]", "checkpoint=.*/no: no checkpoint there"),
    ("compare", "checkpoints=[stock,stock] prompts={new}/no.jsonl", "prompts=.*no.jsonl: "),
    ("export", "target=vllm checkpoint={new}/no", "checkpoint=.*/no: no checkpoint there"),
    ("distill", "mtp.trainable=*.lora.*", "mtp.trainable=.*lora.*: '.*lora.*' fits no tensor of the head"),
    (
        "distill",
        "mtp.mode=stacked mtp.depth=2 decoding.served_as=sglang",
        "decoding.served_as=sglang: runs exactly one MTP module and this head has 2; set decoding.served_as=exact or",
    ),
    ("distill", "backbone.weights=keep", "backbone.weights=keep: keeps FP8 and FP4 .* holds none; leave it at auto"),
    ("collect", "backbone.weights=keep", "backbone.weights=keep: keeps FP8 and FP4 .* holds none; leave it at auto"),
    ("distill", "backbone.path={bare}", "backbone.path=.*bare: holds no stock head .* mtp.init=fresh"),
    ("evaluate", "backbone.path={bare} checkpoint=stock", "backbone.path=.*bare: holds no stock head"),
    ("doctor", "backbone.path={bare} checkpoint=stock", "backbone.path=.*bare: holds no stock head"),
    ("compare", "backbone.path={bare} checkpoints=[stock,stock]", "backbone.path=.*bare: holds no stock head"),
    ("distill", "backbone.path={foreign} mtp.init={head}", "mtp.init=.*head: checkpoint=.* holds backbone=.* this run"),
    ("distill", "backbone.path={foreign} data=streams data.path={streams}", "data.path=.*streams: holds backbone="),
    ("evaluate", "backbone.path={foreign} checkpoint={head}", "checkpoint=.*head.*: holds backbone="),
    ("doctor", "backbone.path={foreign} checkpoint={head}", "checkpoint=.*head.*: holds backbone="),
    ("compare", "backbone.path={foreign} checkpoints=[{head},{head}]", "checkpoint=.*head.*: holds backbone="),
    ("export", "backbone.path={foreign} checkpoint={head} target=vllm", "checkpoint=.*head.*: holds backbone="),
    (
        "evaluate",
        "backbone.path={foreign} checkpoint=stock evaluation.traces={traces}",
        "evaluation.traces=.*: holds backbone=",
    ),
    (
        "evaluate",
        "checkpoint=stock evaluation.traces={traces} decoding.temperature=1",
        "evaluation.traces=.*: holds temperature=0.0 and this run has temperature=1.0",
    ),
    ("distill", "backbone.path={foreign} resume=auto output_dir={head}", "resume=auto: .*backbone.path .fingerprint"),
    ("collect", "output_dir={streams}", "output_dir=.*streams: already holds a stream cache"),
    ("collect", "backbone.path={foreign} output_dir={streams} resume=auto", "output_dir=.*streams: holds backbone="),
    ("evaluate", "{curve} backbone.path={foreign}", "checkpoint=.*head.*: holds backbone="),
    ("evaluate", "{curve} decoding.draft_length=1", "output_dir=.*curve: holds draft_length=2 and this run has draft"),
]


# On a backbone of other sizes whose weights no run has hashed yet.
UNHASHED = [
    (
        "distill",
        "mtp.init={head}",
        "mtp.init=.*: checkpoint=.*: belongs to another backbone: its mtp.0.* is .* of this",
    ),
    ("evaluate", "checkpoint={head}", "checkpoint=.*head.*: belongs to another backbone: its mtp.0"),
    ("compare", "checkpoints=[{head},stock]", "checkpoint=.*head.*: belongs to another backbone"),
    ("export", "checkpoint={head} target=vllm", "checkpoint=.*head.*: belongs to another backbone"),
    ("distill", "resume=auto output_dir={head}", "resume=auto: .*head.*: belongs to another backbone: its mtp.0"),
    ("distill", "data=streams data.path={streams}", "data.path=.*streams: holds num_streams=2 and this run has num"),
    ("collect", "output_dir={streams} resume=auto", "output_dir=.*streams: holds num_streams=2 and this run has"),
    (
        "distill",
        "data=on_policy {texts} on_policy.max_new_tokens=7",
        "on_policy.path=.*texts: holds max_new_tokens=6 and this run has max_new_tokens=7",
    ),
    ("evaluate", "checkpoint=stock evaluation.traces={large}", "evaluation.traces=.*: holds the token id 9999 and"),
]


@pytest.fixture(scope="module")
def places(light: list[str], backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """Results of the usual backbone, and backbones of other weights, of other sizes and without a head; only read."""
    folder = tmp_path_factory.mktemp("places")
    places = {name: folder / name for name in ("head", "streams", "foreign", "bare", "wide")}
    trained = ["train.steps=1", "evaluate_at_end=false", f"output_dir={places['head']}"]
    assert run_main("+recipe=distill", *light, *trained) == 0
    assert run_main("+recipe=collect", *light, f"output_dir={places['streams']}") == 0
    curve = f"checkpoint={places['head']} checkpoints=all evaluation.decoded=none output_dir={folder / 'curve'}"
    assert run_main("+recipe=evaluate", *light, *curve.split()) == 0
    texts = f"on_policy.num_prompts=2 on_policy.prompt_tokens=8 on_policy.path={folder / 'texts'}"
    written = ["data=on_policy", *texts.split(), "on_policy.max_new_tokens=6", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *written, f"output_dir={folder / 'writer'}") == 0
    save_backbone(places["foreign"], rms_norm_eps=1e-3)
    shutil.copytree(backbone_folder, places["bare"], ignore=shutil.ignore_patterns("mtp.*"))
    save_backbone(places["wide"], hc_mult=3)
    traces = folder / "traces.jsonl"
    write_trace_set(traces, recorded(light))
    lines = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    lines[1]["tokens"][0] = 9999
    (folder / "large.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"curve": f"{curve} resume=auto", "texts": texts}
    return places | {"traces": traces, "large": folder / "large.jsonl"} | settings


def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail if a backbone is loaded."""

    def load_backbone(*_: object) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr(load, "load_backbone", load_backbone)


@pytest.mark.parametrize(("recipe", "arguments", "line"), WRONG)
def test_a_wrong_input_is_found_before_a_backbone_is_loaded(
    recipe: str,
    arguments: str,
    line: str,
    refused: Refused,
    places: dict[str, Path | str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_weights(monkeypatch)
    talk, prompts = tmp_path / "talk.jsonl", tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
    talk.write_text((json.dumps({"messages": messages}) + "\n") * 30, encoding="utf-8")
    prompts.write_text(json.dumps({"prompt": "The river follows"}) + "\n", encoding="utf-8")
    given = re.split(" (?=[a-z_.]+=)", arguments.format(new=tmp_path, talk=talk, prompts=prompts, **places))
    assert re.match(line, refused(*given, recipe=recipe))


@pytest.mark.parametrize(("recipe", "arguments", "line"), UNHASHED)
def test_sizes_are_compared_before_weights_are_hashed(
    recipe: str,
    arguments: str,
    line: str,
    refused: Refused,
    places: dict[str, Path | str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_weights(monkeypatch)
    monkeypatch.setattr(fingerprint, "known_fingerprint", lambda _: None)
    given = arguments.format(**places).split()
    assert re.match(line, refused(f"backbone.path={places['wide']}", *given, recipe=recipe))


def test_a_run_says_what_it_trains_on_and_gives_no_figure_of_a_draft_step_without_targets(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.jsonl"  # two tokens with the begin and end of a text: a target for step 1 only
    text.write_text("".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefghijklmnopqrstuvwxyz"))
    arguments = [f"data.path={text}", "mtp.steps=3", "evaluate_at_end=false", f"output_dir={tmp_path / 'run'}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    errors = capfd.readouterr().err
    line = rf"training on data.path={text}: \d+ documents, [\d,]+ tokens; one document in 3 is held out"
    assert re.search(f"^{line}$", errors, re.MULTILINE)
    assert re.search(r"alpha 0\.\d{3}/-/-", errors)
