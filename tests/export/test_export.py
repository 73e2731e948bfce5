"""Exports through the command line, on a head that was trained for two steps on a miniature release."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import mtptrain
from mtptrain.config import ExportConfig, ExportTarget, ReleaseVariant, RunConfig
from mtptrain.errors import UserError
from mtptrain.export.folder import check_room, save_tensors
from mtptrain.export.record import EXPORT, Measured
from mtptrain.recipes.storing import check_drop
from mtptrain.release.modules import from_release
from mtptrain.release.names import release_table
from mtptrain.release.shards import INDEX, Shards
from mtptrain.run.artifact import open_artifact
from tests.command import edit_json, largest_file, run_main, tree
from tests.conftest import save_release
from tests.export.exporting import FAST, export, read_record


def test_a_full_folder_holds_the_unchanged_model_and_the_trained_head(exported: Path, release_folder: Path) -> None:
    source, written = Shards(release_folder, "a"), Shards(exported, "b")
    assert set(written) == set(source)
    assert json.loads((exported / INDEX).read_text())["metadata"]["total_size"] == sum(
        t.nbytes for t in written.values()
    )
    for name, tensor in written.items():
        same = torch.equal(tensor.view(torch.uint8), source[name].view(torch.uint8))
        assert same or name.startswith("mtp.")
    assert not torch.equal(written["mtp.0.hc_head_fn"], source["mtp.0.hc_head_fn"])


def test_untouched_shards_are_the_same_files(exported: Path, release_folder: Path) -> None:
    shared = [path.name for path in exported.glob("*.safetensors") if path.samefile(release_folder / path.name)]
    assert len(shared) == 6
    assert "model-00007-of-00007.safetensors" not in shared


def test_the_config_describes_the_head_of_the_folder(exported: Path, release_folder: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (release_folder, exported))
    facts = {
        "version": mtptrain.__version__,
        "mode": "shared",
        "steps": 3,
        "scheme": "fp8_fp4",
        "checked": "vLLM 0.33.0",
    }
    assert after.pop("mtptrain") == facts
    assert after == before


def test_transformers_loads_the_exported_folder(exported: Path) -> None:
    model, report = DeepseekV4ForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"]
    assert isinstance(model.config, DeepseekV4Config)


def test_the_exported_head_is_evaluated_as_the_stock_head_and_the_checkpoint_still_fits(
    exported: Path, settings: list[str], tmp_path: Path
) -> None:
    record = read_record(exported)
    again = [*settings, f"backbone.path={exported}", f"output_dir={tmp_path}"]
    assert run_main("+recipe=evaluate", *again) == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for head, moment in zip(evaluation["heads"], ("after", "before"), strict=True):
        lengths = {k: figures["acceptance_length"] for k, figures in head["replay"].items()}
        assert lengths == pytest.approx(record["acceptance"][moment])


@pytest.mark.parametrize(("shared", "check"), [((), "replay"), (("embed.weight", "head.weight"), "tensors")])
def test_a_draft_folder_holds_the_head_and_on_request_what_it_shares_with_the_model(
    shared: tuple[str, ...], check: str, settings: list[str], release_folder: Path, tmp_path: Path
) -> None:
    """vLLM 0.33.0 takes embedding and lm_head from the model: 2.1 GB for V4-Flash."""
    form = ["export.form=draft", f"export.embeddings={bool(shared)}", f"export.check={check}"]
    export(settings, tmp_path / "draft", "target=vllm", *form)
    written = Shards(tmp_path / "draft", "draft")
    names = {name for name in Shards(release_folder, "R") if name.startswith("mtp.")}
    assert set(written) == names | set(shared)
    card = (tmp_path / "draft" / "README.md").read_text()
    assert f'"model": "{tmp_path}/draft"' in card
    assert ("no tensor of the model in the folder" in card) == (not shared)


@pytest.mark.parametrize(("container", "check"), [(torch.float32, "replay"), (torch.float8_e8m0fnu, "tensors")])
def test_the_scales_of_a_head_are_stored_as_the_models(
    container: torch.dtype, check: str, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """-Base releases hold them as float32; beside FP8 experts vLLM takes an E8M0 scale for the number of its byte."""
    folder, run = tmp_path / "R", tmp_path / "run"
    save_release(folder, ReleaseVariant.base)
    for file in folder.glob("*.safetensors"):
        scaled = {n: t.to(container) if n.endswith(".scale") else t for n, t in load_file(file).items()}
        save_tensors(scaled, file)
    arguments = [*light, *FAST, f"backbone.path={folder}"]
    assert run_main("+recipe=distill", *arguments, f"output_dir={run}", "evaluate_at_end=false") == 0
    export(arguments, tmp_path / "X", f"checkpoint={run}", "target=vllm", f"export.check={check}")
    scales = {t.dtype for name, t in Shards(tmp_path / "X", "X").items() if name.endswith(".scale")}
    assert scales == {container}
    warned = "E8M0 scales, which vLLM reads as the numbers of their bytes" in capfd.readouterr().err
    assert warned == (container != torch.float32)


def test_a_new_module_replaces_the_blocks_of_a_release_with_dspark(light: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "R"
    save_release(folder, ReleaseVariant.dspark)
    arguments = [*light, *FAST, f"backbone.path={folder}"]
    training = ["mtp.init=backbone", "evaluate_at_end=false", f"output_dir={tmp_path}/run"]
    assert run_main("+recipe=distill", *arguments, *training) == 0
    record = export(arguments, tmp_path / "X", f"checkpoint={tmp_path}/run", "target=vllm")
    assert record["acceptance"]["gain"] is None
    config = json.loads((tmp_path / "X" / "config.json").read_text())
    assert not [key for key in config if key.startswith("dspark")]
    assert config["num_nextn_predict_layers"] == 1
    names = {row.released for row in release_table(DeepseekV4Config.from_pretrained(tmp_path / "X"))}
    assert {name for name in Shards(tmp_path / "X", "X") if name.startswith("mtp.")} == {f"mtp.0.{n}" for n in names}


def test_llama_cpp_gets_a_full_folder_and_the_commands_of_its_converter(settings: list[str], tmp_path: Path) -> None:
    acceptance = export(settings, tmp_path / "X", "target=llama_cpp", "decoding.temperature=1")["acceptance"]
    greedy = acceptance["other"][1]["1"]
    assert (
        abs(acceptance["served"]["1"] - greedy) < abs(acceptance["after"]["1"] - greedy) / 2
    )  # it has no sampled drafts
    card = (tmp_path / "X" / "README.md").read_text()
    assert f"python convert_hf_to_gguf.py {tmp_path}/X --mtp --outfile head.gguf" in card
    assert "--spec-type draft-mtp" in card
    assert "--spec-draft-n-max 3" in card


@pytest.mark.parametrize("copies", ["symlink", "copy"])
def test_shards_can_be_symlinked_or_copied(
    copies: str, settings: list[str], release_folder: Path, tmp_path: Path
) -> None:
    export(settings, tmp_path / "X", "target=sglang", f"export.shards={copies}", "export.check=tensors")
    first = tmp_path / "X" / "model-00001-of-00007.safetensors"
    assert first.is_symlink() == (copies == "symlink")
    assert first.samefile(release_folder / first.name) == (copies == "symlink")
    assert first.read_bytes() == (release_folder / first.name).read_bytes()


def test_bf16_is_bit_exact(settings: list[str], tmp_path: Path) -> None:
    record = export(settings, tmp_path / "X", "target=hf", "export.scheme=bf16", "export.check=tensors")
    assert record["scheme"] == "bf16"
    checkpoint = Path(record["checkpoint"].split(" (")[0])
    trained = load_file(checkpoint / "module.safetensors")
    config = DeepseekV4Config.from_pretrained(tmp_path / "X")
    read = from_release(Shards(tmp_path / "X", "X").only("mtp."), config)
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in read.items())


def test_a_folder_that_is_no_release_gets_its_head_beside_the_weights(
    light: list[str], backbone_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_main("+recipe=distill", *light, f"output_dir={run}", "evaluate_at_end=false") == 0
    record = export([*light, *FAST], tmp_path / "X", f"checkpoint={run}", "target=hf")
    assert record["scheme"] == "bf16"
    assert not (tmp_path / "X" / INDEX).exists()
    assert (tmp_path / "X" / "model.safetensors").samefile(backbone_folder / "model.safetensors")


def test_stacked_modules_and_a_release_without_a_head(
    settings: list[str], release_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(release_folder, tmp_path / "bare")
    (bare / "model-00007-of-00007.safetensors").unlink()
    edit_json(
        bare / INDEX,
        lambda index: index.update(
            weight_map={name: file for name, file in index["weight_map"].items() if not name.startswith("mtp.")}
        ),
    )
    arguments = [*settings, f"backbone.path={bare}", "mtp.mode=stacked", "mtp.depth=2", "mtp.init=fresh"]
    assert run_main("+recipe=distill", *arguments, f"output_dir={tmp_path}/run", "evaluate_at_end=false") == 0
    stacked = [*settings, f"backbone.path={bare}", f"checkpoint={tmp_path}/run"]
    assert run_main("+recipe=export", *stacked, "target=sglang", f"output_dir={tmp_path}/Y") == 2
    assert "SGLang runs exactly one MTP module" in capfd.readouterr().err
    assert run_main("+recipe=export", *stacked, "target=vllm", f"output_dir={tmp_path}/eagle3-X") == 2
    line = capfd.readouterr().err
    assert re.search(r"^mtptrain: output_dir=.*eagle3-X: the path contains `eagle3`, .*; choose another name, or", line)
    assert not (tmp_path / "eagle3-X").exists()
    assert run_main("+recipe=export", *stacked, "target=vllm", "export.form=draft", f"output_dir={tmp_path}/Z") == 2
    assert "export.form=draft: the head has 2 module(s), and vLLM takes their number" in capfd.readouterr().err
    longer = ["export.force=true", "decoding.draft_length=3"]
    record = export(stacked, tmp_path / "eagle3-X", "target=vllm", *longer)
    assert record["depth"] == 2
    assert record["warnings"][0].endswith("rename it before serving")
    assert "must be a multiple of 2" in record["warnings"][1]
    assert record["draft_length"]["served"] == 2
    assert list(record["acceptance"]["after"]) == ["1", "2", "3"]
    card, printed = (tmp_path / "eagle3-X" / "README.md").read_text(), capfd.readouterr().err
    assert "| 2 |" in card
    assert "| 3 |" not in card  # vLLM runs no third step as it was trained
    assert "K=3" not in card + printed
    config = json.loads((tmp_path / "eagle3-X" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2
    assert config["compress_ratios"][-3:] == [0, 0, 0]
    assert Shards(tmp_path / "eagle3-X", "X").entries["mtp.1.norm.weight"].file == "model-mtp.safetensors"


def test_the_record_lists_every_file_that_the_export_wrote(exported: Path) -> None:
    record = open_artifact(EXPORT, "output_dir", exported)
    assert {"config.json", "README.md", INDEX, "model-00007-of-00007.safetensors"} <= record.files.keys()
    assert "model-00001-of-00007.safetensors" not in record.files  # a hard link to the source
    record.verify(record.files)


def test_other_groups_may_read_what_is_written(exported: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert (exported / "model-00007-of-00007.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


REFUSED = [
    (["target=vllm", "export.scheme=bf16"], r"export\.scheme=bf16: vllm builds the head with the model's quantisation"),
    (["target=sglang", "export.form=draft"], r"export\.form=draft: a draft folder is written for vLLM only"),
    (["target=vllm", "checkpoint=stock"], r"checkpoint=stock: export needs a trained head"),
    ([], r"target=null: export needs target=vllm"),
    (["target=llama_cpp", "export.form=draft"], r"export\.form=draft: a draft folder is written for vLLM only"),
    (["target=llama"], r"target"),
    (["target=vllm", "export.max_drop=-1"], r"export\.max_drop=-1\.0: must be 0 or more"),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_an_impossible_export_is_refused_in_one_line(
    arguments: list[str], line: str, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "X"
    assert run_main("+recipe=export", *settings, f"output_dir={folder}", *arguments) == 2
    errors = capfd.readouterr().err
    assert re.search(rf"mtptrain: .*{line}", errors)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_not_trained_is_refused(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    still = ["train.learning_rate=1e-60", "train.weight_decay=0", f"output_dir={tmp_path}/run", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *settings, *still) == 0
    arguments = ["target=vllm", f"checkpoint={tmp_path}/run", f"output_dir={tmp_path}/X"]
    assert run_main("+recipe=export", *settings, *arguments) == 2
    assert "holds the head that its training started from, unchanged" in capfd.readouterr().err
    assert not (tmp_path / "X").exists()


def test_a_disk_that_fills_leaves_nothing_of_the_export(
    settings: list[str], release_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(release_folder)
    with largest_file((release_folder / "model-00007-of-00007.safetensors").stat().st_size - 1):
        assert run_main("+recipe=export", *settings, "target=vllm", f"output_dir={tmp_path}/X") == 2
    assert re.search(
        r"^mtptrain: output_dir=.*X: a file would be larger .* nothing was kept", capfd.readouterr().err, re.M
    )
    assert list(tmp_path.iterdir()) == []
    assert tree(release_folder) == before


def test_an_export_that_would_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir=.*X: the export needs 1000000000\.00 GB and .* GB free"):
        check_room(tmp_path / "X", 10**18)
    check_room(tmp_path / "X", 1)


def test_a_drop_beyond_the_bound_is_an_error() -> None:
    config = RunConfig(task="export", target=ExportTarget.hf, export=ExportConfig(max_drop=0.05))
    check_drop(config, measured({1: 1.5, 2: 1.7}, {1: 1.46, 2: 1.9}))
    line = r"^export\.max_drop=0\.05: storing the head costs 0\.100 tokens a pass at K=2 \(1\.700 to 1\.600\)"
    with pytest.raises(UserError, match=line):
        check_drop(config, measured({1: 1.5, 2: 1.7}, {1: 1.5, 2: 1.6}))


def measured(before: dict[int, float], after: dict[int, float]) -> Measured:
    return Measured(8, "temperature 0", before, after, [0.5, 0.4], None)
