"""`+recipe=collect`, and training from its cache."""

import json
import re
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig
from mtptrain.hidden_cache import reader
from mtptrain.hidden_cache.manifest import open_cache
from mtptrain.run.artifact import Artifact
from tests.command import fitting, kill_when, read_metrics, run_main, start_process, tree
from tests.conftest import save_backbone
from tests.warm import run_in_two


@pytest.fixture(scope="module")
def small(light: list[str]) -> list[str]:
    """Shards of a document or two."""
    return [*light, "collect.shard_tokens=60", "collect.format=fp32"]


@pytest.fixture(scope="module")
def cache(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of fp32 streams; do not write into it."""
    folder = tmp_path_factory.mktemp("streams") / "cache"
    assert run_main("+recipe=collect", *small, f"output_dir={folder}") == 0
    return folder


def streams(folder: Path) -> dict[str, str]:
    """Return the hashes of a cache's shards and of its manifest."""
    return {name: digest for name, digest in tree(folder).items() if name.startswith(("shard", "manifest"))}


def copied(cache: Path, folder: Path) -> Path:
    return Path(shutil.copytree(cache, folder / "copy"))


def train_from(cache: Path, light: list[str], output: Path, *more: str) -> int:
    settings = ["data=streams", f"data.path={cache}", "evaluate_at_end=false", f"output_dir={output}"]
    kept = [setting for setting in light if not setting.startswith(("data=", "data.path="))]
    return run_main("+recipe=distill", *kept, *settings, *more)


def refusal(cache: Path, light: list[str], output: Path, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    capfd.readouterr()
    assert train_from(cache, light, output, *more) == 2
    assert not output.exists()
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("stored", ["saved", "released"])
def test_training_from_streams_has_the_losses_of_training_online(
    stored: str, cache: Path, release_folder: Path, small: list[str], light: list[str], tmp_path: Path
) -> None:
    longer = ["train.steps=5", "train.batch_size=3", "mtp.steps=3"]
    if stored == "released":
        longer.append(f"backbone.path={release_folder}")
        cache = tmp_path / "cache"
        assert run_main("+recipe=collect", *small, longer[-1], f"output_dir={cache}") == 0
    assert train_from(cache, light, tmp_path / "cached", *longer) == 0
    assert run_main("+recipe=distill", *light, *longer, "evaluate_at_end=false", f"output_dir={tmp_path / 'on'}") == 0
    for left, right in zip(read_metrics(tmp_path / "cached"), read_metrics(tmp_path / "on"), strict=True):
        assert left["tokens"] == right["tokens"]
        for k in (1, 2, 3):
            # fp32 rounding of a padded batch of pieces against another batch of them, through a few updates
            assert left[f"loss/step_{k}"] == pytest.approx(right[f"loss/step_{k}"], rel=1e-4)


@pytest.mark.parametrize("stored_as", ["bf16", "fp8"])
def test_rounded_streams_are_trained_on_and_measured_on_the_whole_backbone(
    stored_as: str, light: list[str], tmp_path: Path
) -> None:
    """The measurement reads no streams, so that one of the formats shows it."""
    made, is_measured = tmp_path / "cache", stored_as == "fp8"
    assert run_main("+recipe=collect", *light, f"collect.format={stored_as}", f"output_dir={made}") == 0
    assert train_from(made, light, tmp_path / "run", f"evaluate_at_end={str(is_measured).lower()}") == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    if is_measured:
        evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
        assert evaluation["certificate"]["passed"]


def test_only_embedding_head_and_norm_are_held_for_it(backbone_folder: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(backbone_folder)), torch.device("cpu"), torch.float32, False)
    whole = load_backbone(BackboneConfig(path=str(backbone_folder)), torch.device("cpu"), torch.float32)
    held, state = dict(backbone.model.named_parameters()), whole.model.state_dict()
    parts = {"model.embed_tokens", "model.norm", "model.hc_head", "lm_head"}
    assert {name.rpartition(".")[0] for name in held} == parts
    assert all(torch.equal(tensor, state[name]) for name, tensor in held.items())
    assert (backbone.fingerprint, backbone.config.num_hidden_layers) == (whole.fingerprint, 3)


def test_a_shard_holds_whole_documents_in_their_order(cache: Path) -> None:
    shards = open_cache(cache).files
    assert len(shards) > 5
    for name, shard in shards.items():
        with safe_open(cache / name, framework="pt") as file:
            sizes, pieces = file.get_tensor("piece_sizes").tolist(), file.get_tensor("document_pieces").tolist()
            tokens = file.get_tensor("tokens").tolist()
        assert (len(tokens), len(sizes), len(pieces)) == tuple(
            shard.counts[name] for name in ("tokens", "pieces", "documents")
        )
        begins = [sum(sizes[: sum(pieces[:number])]) for number in range(len(pieces) + 1)]
        for begin, end in pairwise(begins):
            assert (tokens[begin], tokens[end - 1]) == (0, 1)  # the bos_eos of begin and end


def test_a_killed_collection_continues_to_the_same_bytes(cache: Path, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    kill_when(
        start_process("+recipe=collect", *small, f"output_dir={folder}", folder=tmp_path),
        lambda: list(folder.glob("shard_*.safetensors")),
    )
    assert not (folder / "manifest.json").exists()  # it ended early
    done = {name: digest for name, digest in streams(folder).items() if (folder / name).with_suffix(".json").exists()}
    assert run_main("+recipe=collect", *small, f"output_dir={folder}", "resume=auto") == 0
    assert streams(folder) == streams(cache)
    assert done.items() <= streams(folder).items()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("placement", ["zero3", "expert_parallel"])
def test_two_processes_that_share_a_backbone_collect_what_one_collects(
    placement: str, cache: Path, small: list[str], tmp_path: Path
) -> None:
    settings = [*small, f"backbone.placement={placement}", f"output_dir={tmp_path}"]
    ended = run_in_two("mtptrain", *fitting(["+recipe=collect", *settings]))
    assert ended.codes == (0, 0), ended.errors[-3000:]
    left, right = open_cache(tmp_path), open_cache(cache)
    assert left.identity == right.identity
    assert len(right.files) % 2 == 1  # so that one process pads with dummy forwards
    for part, expected in zip(left.files, right.files, strict=True):
        written, whole = load_file(tmp_path / part), load_file(cache / expected)
        error = (written.pop("streams") - (streams_TND := whole.pop("streams"))).norm() / streams_TND.norm()
        assert error < 64 * 2**-24  # experts add up their tokens in another order, in four layers
        assert all(torch.equal(written[name], whole[name]) for name in whole)


def test_an_unfinished_cache_is_not_trained_from(
    cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = copied(cache, tmp_path)
    (part / "manifest.json").unlink()
    line = refusal(part, light, tmp_path / "run", capfd)
    assert f"data.path={part}: holds no manifest.json" in line
    assert "resume=auto" in line


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_missing_or_truncated_shard_is_named_before_training(
    damage: str, cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = copied(cache, tmp_path)
    path = broken / "shard_00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1])
    line = refusal(broken, light, tmp_path / "run", capfd)
    assert "shard_00002.safetensors is missing, truncated or altered (its SHA-256 differs)" in line


def test_an_altered_shard_is_named_when_it_is_first_read(
    cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = copied(cache, tmp_path)
    path = broken / "shard_00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train_from(broken, light, tmp_path / "run", "train.steps=50") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "shard_00002.safetensors is missing, truncated or altered (its SHA-256 differs)" in line


def test_few_shards_are_open_at_a_time_and_each_is_verified_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    checked: list[str] = []
    monkeypatch.setattr(Artifact, "verify", lambda self, names: checked.extend(names))
    opened = open_cache(cache)
    batches = reader.HiddenStateBatches(opened, 32, 2, 0, torch.float32)
    seen = [batches.batch(index).streams_BSND for index in range(40)]
    assert len(batches.shards.opened) <= 2
    assert sorted(checked) == sorted(set(checked))
    assert len(checked) > 2
    again = reader.HiddenStateBatches(opened, 32, 2, 0, torch.float32)
    assert torch.equal(again.batch(7).streams_BSND, seen[7])  # out of order, as after a resume


def test_a_cache_is_followed_and_collected_on_after_shards_are_deleted(
    cache: Path, small: list[str], light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part, run = copied(cache, tmp_path), tmp_path / "run"
    names = list(open_cache(cache).files)
    (part / "manifest.json").unlink()
    for name in names[-2:]:
        (part / name).unlink()
        (part / name).with_suffix(".json").unlink()
    follow = ["data.follow=true", "data.delete_consumed=true"]
    assert train_from(part, light, run, *follow) == 0
    assert "a growing number of cached streams, shard by shard, which are deleted" in capfd.readouterr().err
    left = [name for name in names if (part / name).exists()]
    assert len(names) - 2 - len(left) > 0
    assert run_main("+recipe=collect", *small, f"output_dir={part}", "resume=auto") == 0
    assert [name for name in names if (part / name).exists()] == left + names[-2:]
    assert (part / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()
    for more in ([], ["data.follow=true"]):
        line = refusal(part, light, tmp_path / "other", capfd, *more)
        assert f"the run in {run} deletes its shards after use" in line
    longer = ["resume=auto", "train.steps=3", "resume_allow=[train.steps]"]
    assert train_from(part, light, run, *follow, *longer) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_the_order_of_shards_is_no_detail_of_a_run(
    cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_from(cache, light, tmp_path) == 0
    assert train_from(cache, light, tmp_path, "data.follow=true", "resume=auto") == 2
    assert "data.follow false -> true" in capfd.readouterr().err.splitlines()[-1]


def test_a_shard_that_one_of_two_processes_finds_damaged_is_named_once(
    cache: Path, light: list[str], tmp_path: Path
) -> None:
    broken = copied(cache, tmp_path)
    (broken / "shard_00001.safetensors").unlink()
    settings = [*light, "data=streams", f"data.path={broken}", f"output_dir={tmp_path / 'run'}"]
    ended = run_in_two("mtptrain", *fitting(["+recipe=distill", *settings]))
    assert 0 not in ended.codes
    (line,) = re.findall(r"^mtptrain: .*$", ended.errors, re.MULTILINE)
    assert "shard_00001.safetensors is missing" in line


def test_streams_of_another_backbone_are_refused(
    cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tmp_path / "other", index_topk=2)
    line = refusal(cache, light, tmp_path / "run", capfd, f"backbone.path={tmp_path / 'other'}")
    assert "holds backbone=" in line
    assert "set backbone or backbone.path to match, or collect anew" in line


def test_rows_shorter_than_the_pieces_are_refused(
    cache: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(cache, light, tmp_path / "run", capfd, "data.sequence_length=31")
    assert "data.sequence_length=31" in line
    assert "set at least 32" in line


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            ["collect.format=bf16", "resume=auto"],
            "holds stored_as=fp32 and this run has stored_as=bf16; set collect.format to match, or",
        ),
        (["data.heldout_every=4", "resume=auto"], "holds text="),
        ([], "already holds a stream cache; choose another, or set resume=auto"),
    ],
    ids=["format", "text", "no_resume"],
)
def test_another_collection_leaves_a_cache_as_it_is(
    more: list[str], reason: str, cache: Path, small: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(cache)
    assert run_main("+recipe=collect", *small, f"output_dir={cache}", *more) == 2
    assert reason in capfd.readouterr().err.splitlines()[-1]
    assert tree(cache) == before


def test_a_plan_prints_the_disk_need_and_writes_nothing(
    cache: Path, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("+recipe=collect", "--plan", *small, f"output_dir={tmp_path / 'cache'}") == 0
    lines = capfd.readouterr().err
    tokens = open_cache(cache).content.tokens
    assert f"{tokens:,} tokens in" in lines
    assert "2 streams of 64 channels as fp32: 0.50 KiB a token" in lines
    assert "GB needed" in lines
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")(1000, 1, 999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run_main("+recipe=collect", *small, f"output_dir={tmp_path / 'cache'}") == 2
    assert "the cache needs" in capfd.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["+recipe=distill", "--plan"], "collect.plan_only=true: belongs to +recipe=collect"),
        (["+recipe=collect", "data=streams", "data.path=x"], "data=streams: is the hidden states of a text"),
        (["+recipe=collect", "data.streaming=true"], "data.streaming=true: is for the training of heads"),
        (["+recipe=distill", "data=streams"], "data.path=null: data=streams needs the folder"),
        (["+recipe=distill", "data=streams", "data.path=x", "mtp.init=backbone"], "mtp.init=backbone: copies a layer"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    arguments: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = [] if "data=streams" in arguments else ["data=text", "data.path=x.jsonl"]
    assert run_main(*arguments, *text) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"mtptrain: {reason}")
