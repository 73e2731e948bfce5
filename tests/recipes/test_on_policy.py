"""`data=on_policy`: the backbone's own texts, generated once, and training on them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig, DataConfig, DataSource, OnPolicyConfig, RunConfig
from mtptrain.data.batches import PackedBatches
from mtptrain.data.text import training_documents
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits, StopStrings
from mtptrain.decoding.speculative import decode_plain
from mtptrain.recipes.on_policy import open_on_policy_prompts
from mtptrain.recipes.session import Session
from mtptrain.run.folder import open_run_folder
from mtptrain.traces.file import Trace, read_trace_set
from mtptrain.traces.folder import outcome
from mtptrain.traces.on_policy import as_corpus
from mtptrain.traces.prompts import Prompt
from tests.command import Refused, fitting, kill_when, read_metrics, run_main, start_process, tree
from tests.conftest import CHAT_TEMPLATE, save_backbone
from tests.warm import run_in_two

PROMPT_TOKENS = "on_policy.prompt_tokens=8"  # prompts of a file keep their length


@pytest.fixture(scope="module")
def small(light: list[str]) -> list[str]:
    """Nine prompts of 8 tokens in three files of texts, continued by at most 12 tokens."""
    other = [setting for setting in light if setting != "data=text"]
    return [
        *other,
        "on_policy.num_prompts=9",
        PROMPT_TOKENS,
        "on_policy.max_new_tokens=12",
        "on_policy.batch_size=3",
        "evaluate_at_end=false",
    ]


def train(small: list[str], output: Path, texts: Path, *more: str) -> int:
    folders = [f"output_dir={output}", f"on_policy.path={texts}"]
    return run_main("+recipe=distill_on_policy", *small, *folders, *more)


@pytest.fixture(scope="module")
def made(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run `run` and its texts `texts`; do not write into it."""
    folder = tmp_path_factory.mktemp("on_policy")
    assert train(small, folder / "run", folder / "texts") == 0
    return folder


def texts(folder: Path) -> list[Trace]:
    return [trace for path in sorted(folder.glob("texts_*.jsonl")) for trace in read_trace_set(path).traces]


def refusal(small: list[str], output: Path, folder: Path, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    capfd.readouterr()
    assert train(small, output, folder, *more) == 2
    assert not output.exists()
    return capfd.readouterr().err.splitlines()[-1]


def test_only_tokens_of_the_backbone_are_trained_on() -> None:
    traces = [Trace(Prompt([5, 6, 7], "x", 0), [8, 9], [1.0] * 2, [1.0] * 2)]
    traces += [Trace(Prompt([4], "x", 1), [3, 2, 1], [1.0] * 3, [1.0] * 3)]
    batch = PackedBatches(as_corpus(traces), sequence_length=9, batch_size=1, seed=0).batch(0)
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    # Step k at anchor i drafts t_{i+2} .. t_{i+k+1}; the first of them is 8, 9, 2 and 1 (3 is never drafted: its
    # text has one token before it).
    assert batch.target_mask(1).nonzero()[:, 1].tolist() == [1, 2, 5, 6]
    assert batch.target_mask(2).nonzero()[:, 1].tolist() == [1, 5]


def test_a_run_trains_on_the_texts_it_made(made: Path) -> None:
    assert [row["step"] for row in read_metrics(made / "run")] == [1, 2]
    record = json.loads((made / "run" / "provenance.json").read_text(encoding="utf-8"))["on_policy"]
    manifest = json.loads((made / "texts" / "manifest.json").read_text(encoding="utf-8"))
    counts = manifest["content"]["counts"]
    assert record["folder"] == str(made / "texts")
    assert {name: record[name] for name in counts} == counts
    traces = texts(made / "texts")
    ends = [outcome(trace, manifest["identity"]["stop"], 12) for trace in traces]
    assert (counts["prompts"], len(traces), len(manifest["files"])) == (9, 9, 3)
    assert {name: ends.count(name) for name in ("stopped", "full", "empty")}.items() <= counts.items()


def test_prompts_are_cut_from_training_documents(backbone_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"  # every slice contains its document's number
    path.write_text("".join(json.dumps({"text": f"{number}," * 30}) + "\n" for number in range(100, 140)))
    data = DataConfig(source=DataSource.on_policy, path=str(path), heldout_every=3, cache_dir=str(tmp_path))
    source, on_policy = BackboneConfig(path=str(backbone_folder)), OnPolicyConfig(num_prompts=60)
    config = RunConfig(task="distill", backbone=source, data=data, on_policy=on_policy)
    session = Session(config, open_run_folder(config, {}))
    prompts = open_on_policy_prompts(session)
    documents = {
        session.source.tokenizer.decode(conversation.prompt.tokens).split(",")[1]
        for conversation in prompts.conversations
    }
    training = {document.text.split(",")[1] for document in training_documents(data)}
    assert len(training) < 40
    assert documents == training


def test_later_runs_use_the_texts_again(made: Path, small: list[str], tmp_path: Path) -> None:
    before = tree(made / "texts")
    assert train(small, tmp_path / "run", made / "texts", "seed=1", "on_policy.draft_length=2") == 0
    assert tree(made / "texts") == before


def test_a_run_is_continued_with_the_same_texts_only(
    made: Path, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    assert train(small, run, made / "texts", "resume=auto", "on_policy.batch_size=4") == 0
    capfd.readouterr()
    changes = ["on_policy.temperature=0.5", "decoding.stop=[7]"]
    assert train(small, run, tmp_path / "other", "resume=auto", *changes) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "another run: on_policy.temperature 1.0 -> 0.5, decoding.stop [] -> [7]; set them back" in line
    assert not (tmp_path / "other").exists()


def test_texts_without_a_folder_are_kept_in_the_cache(small: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = ["+recipe=distill_on_policy", *small, f"data.cache_dir={cache}"]
    for number in range(2):
        assert run_main(*settings, f"output_dir={tmp_path / str(number)}") == 0
    assert len(list(cache.glob("on-policy-*/manifest.json"))) == 1
    assert run_main(*settings, "on_policy.temperature=0.5", f"output_dir={tmp_path / 'other'}") == 0
    assert len(list(cache.glob("on-policy-*/manifest.json"))) == 2


def test_a_killed_run_continues_to_the_same_texts(made: Path, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    settings = ["+recipe=distill_on_policy", *small, f"on_policy.path={folder}", f"output_dir={tmp_path / 'run'}"]
    kill_when(start_process(*settings, folder=tmp_path), lambda: list(folder.glob("texts_*.jsonl")))
    assert not (folder / "manifest.json").exists()  # it ended early
    done = {name: digest for name, digest in tree(folder).items() if name.startswith("texts")}
    # A folder keeps the settings it was begun with, so its files fit together.
    assert run_main(*settings, "resume=auto", "on_policy.batch_size=4") == 0
    assert tree(folder) == tree(made / "texts")
    assert done.items() <= tree(folder).items()


def test_drafts_do_not_change_greedy_texts(small: list[str], tmp_path: Path) -> None:
    for length in (0, 2):
        settings = ["on_policy.temperature=0", f"on_policy.draft_length={length}"]
        assert train(small, tmp_path / f"run{length}", tmp_path / f"texts{length}", *settings) == 0
    plain, drafted = (texts(tmp_path / f"texts{length}") for length in (0, 2))
    assert [trace.tokens for trace in plain] == [trace.tokens for trace in drafted]


def test_an_untrained_head_drafts_nothing(small: list[str], tmp_path: Path) -> None:
    assert train(small, tmp_path / "fresh", tmp_path / "fresh_texts", "mtp.init=fresh") == 0
    assert train(small, tmp_path / "plain", tmp_path / "plain_texts", "on_policy.draft_length=0") == 0
    fresh, plain = (texts(tmp_path / f"{name}_texts") for name in ("fresh", "plain"))
    assert fresh == plain


def test_two_processes_write_what_one_writes(made: Path, small: list[str], tmp_path: Path) -> None:
    folders = [f"on_policy.path={tmp_path / 'texts'}", f"output_dir={tmp_path / 'run'}"]
    ended = run_in_two("mtptrain", *fitting(["+recipe=distill_on_policy", *small, *folders]))
    assert ended.codes == (0, 0), ended.errors[-3000:]
    assert tree(tmp_path / "texts") == tree(made / "texts")


def test_conversations_are_continued_turn_by_turn_and_failures_counted(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"turns": ["Why?", "And then?"]}, {"prompt": "def rule("}, {"prompt": "too long " * 40}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    save_backbone(tmp_path / "backbone", max_position_embeddings=100)
    settings = [
        f"backbone.path={tmp_path / 'backbone'}",
        f"on_policy.prompts={tmp_path / 'mine.jsonl'}",
        f"data.chat_template={tmp_path / 'chat.jinja'}",
        "data.sequence_length=64",
        "on_policy.max_new_tokens=8",
    ]
    cut = [one for one in small if one != PROMPT_TOKENS]
    assert train(cut, tmp_path / "run", tmp_path / "texts", *settings) == 0
    assert sorted(trace.prompt.group for trace in texts(tmp_path / "texts")) == [0, 0, 1]
    counts = json.loads((tmp_path / "texts" / "manifest.json").read_text(encoding="utf-8"))["content"]["counts"]
    assert (counts["prompts"], counts["too_long"], counts["dropped_turns"]) == (3, 1, 0)
    assert "1 failed (0 gave nothing, 1 were too long for the context" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "limit", "named"),
    [([7, 1], 2, "stopped"), ([7, 7], 2, "full"), ([1], 2, "empty"), ([7], 1, "full"), ([7, 7], 3, "stopped")],
)
def test_last_token_and_length_decide_the_outcome_of_a_prompt(tokens: list[int], limit: int, named: str) -> None:
    trace = Trace(Prompt([5], "x", 0), tokens, [1.0] * len(tokens), [1.0] * len(tokens))
    assert outcome(trace, [1], limit) == named


def test_texts_follow_penalties_and_end_at_stop_strings(
    made: Path, small: list[str], tmp_path: Path, backbone_folder: Path
) -> None:
    backbone = load_backbone(BackboneConfig(path=str(backbone_folder)), torch.device("cpu"), torch.float32)
    prompts = [trace.prompt.tokens for trace in texts(made / "texts")]
    policy, limits = Policy(penalties=Penalties(1.5, 0.5, 0.5)), Limits(12, frozenset([1]))
    free = [row.tokens for row in decode_plain(backbone.model, prompts, limits, policy).rows]
    assert free != [row.tokens for row in decode_plain(backbone.model, prompts, limits).rows]
    spans = (row[start : start + 2] for row in free for start in range(2, 8))
    word = next(text for span in spans if (text := backbone.tokenizer.decode(span)).isascii() and text.isalnum())
    limits = replace(limits, strings=StopStrings((word,), backbone.tokenizer))
    expected = [row.tokens for row in decode_plain(backbone.model, prompts, limits, policy).rows]
    assert sum(map(len, expected)) < sum(map(len, free))
    policy_settings = ["temperature=0", "repetition_penalty=1.5", "frequency_penalty=0.5", "presence_penalty=0.5"]
    given = [f"on_policy.{one}" for one in policy_settings] + [f"decoding.stop_strings=['{word}']"]
    assert train(small, tmp_path / "run", tmp_path / "texts", *given) == 0
    assert [trace.tokens for trace in texts(tmp_path / "texts")] == expected
    assert train(small, tmp_path / "other", tmp_path / "texts", *given[:-1]) == 2  # other texts


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("on_policy.temperature=0.5", "temperature=1.0 and this run has temperature=0.5"),
        ("on_policy.top_k=3", "top_k=None and this run has top_k=3"),
        ("on_policy.max_new_tokens=11", "max_new_tokens=12 and this run has max_new_tokens=11"),
        ("on_policy.prompt_tokens=7", "prompts="),
        ("decoding.stop=[5]", "stop=[1] and this run has stop=[1, 5]"),
        ("backbone.path=OTHER", "backbone="),
    ],
    ids=["temperature", "top_k", "length", "prompts", "stop", "backbone"],
)
def test_texts_of_other_settings_are_refused(
    setting: str, reason: str, made: Path, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "OTHER" in setting:
        save_backbone(tmp_path / "other", index_topk=2)
    before = tree(made / "texts")
    line = refusal(small, tmp_path / "run", made / "texts", capfd, setting.replace("OTHER", str(tmp_path / "other")))
    assert f"on_policy.path={made / 'texts'}: holds {reason}" in line
    assert "to match, or choose another folder" in line
    assert tree(made / "texts") == before


def test_an_altered_file_is_named_and_made_again(
    made: Path, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made / "texts", tmp_path / "texts"))
    path = folder / "texts_00001.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("1", "2", 1), encoding="utf-8")
    line = refusal(small, tmp_path / "run", folder, capfd)
    assert f"on_policy.path={folder}: texts_00001.jsonl is missing, truncated or altered" in line
    path.unlink()
    (folder / "manifest.json").unlink()
    assert train(small, tmp_path / "run", folder) == 0
    assert tree(folder) == tree(made / "texts")


def test_a_folder_of_something_else_is_left_alone(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    line = refusal(small, tmp_path / "run", tmp_path / "mine", capfd)
    assert f"on_policy.path={tmp_path / 'mine'}: holds other files than a folder of texts" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["on_policy.prompts=heldout"], "on_policy.prompts=heldout: is for measuring heads"),
        (["on_policy.prompts=a.jsonl", "prompts=[a.jsonl,b.jsonl]"], "on_policy.prompts=[a.jsonl]: are used"),
        (
            ["on_policy.prompts=[training,a.jsonl]"],
            "on_policy.prompts=[training,a.jsonl]: training cannot be combined",
        ),
        (["on_policy.temperature=-1"], "on_policy.temperature=-1.0: must be 0 (greedy) or above"),
        (["on_policy.draft_length=9"], "on_policy.draft_length=9: must lie between 0 and 8"),
        (["on_policy.num_prompts=100000"], "on_policy.num_prompts=100000: the training text has"),
        (["on_policy.max_new_tokens=5000"], "on_policy.max_new_tokens=5000: no prompt has room for it"),
        (["on_policy.prompts=absent.jsonl"], "on_policy.prompts=absent.jsonl: cannot be read"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_impossible_settings_are_refused(
    arguments: list[str], reason: str, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [one for one in small if one != PROMPT_TOKENS or "prompts=absent" not in arguments[0]]
    line = refusal(settings, tmp_path / "run", tmp_path / "texts", capfd, *arguments)
    assert line.startswith(f"mtptrain: {reason}")
    assert not (tmp_path / "texts").exists()


def test_the_texts_are_no_text_to_collect_from(refused: Refused) -> None:
    line = refused("data=on_policy", recipe="collect")
    assert line.startswith("data=on_policy: is text that the backbone writes during training")
