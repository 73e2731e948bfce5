"""A folder has one owner: no run and no result is written over another in silence."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.run.folder import RESULTS, FolderUse, RunFolder, default_output_dir, open_run_folder


@contextmanager
def claimed(path: Path, use: FolderUse, **settings: object) -> Iterator[RunFolder]:
    config = RunConfig(task="evaluate", output_dir=str(path), **settings)
    folder = open_run_folder(config, {}, use=use)
    with closing(folder.lock):
        folder.claim()
        yield folder


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_replaced_only_on_request(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    line = rf"^output_dir={tmp_path}: already holds {name}; choose another folder, or set overwrite=true"
    with pytest.raises(UserError, match=line), claimed(tmp_path, FolderUse.result):
        pass
    with claimed(tmp_path, FolderUse.result, overwrite=True):
        assert (tmp_path / name).read_text() == "mine"  # until there is another one
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("settings", [{}, {"resume": "auto"}])
def test_a_training_starts_in_no_folder_with_a_result(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "doctor.json").touch()
    with (
        pytest.raises(UserError, match=r"holds doctor\.json of another run"),
        claimed(tmp_path, FolderUse.run, **settings),
    ):
        pass


@pytest.mark.parametrize(("use", "word"), [(FolderUse.result, "already holds a cache"), (FolderUse.run, "begun.json")])
def test_the_folder_of_a_cache_takes_no_other_run(use: FolderUse, word: str, tmp_path: Path) -> None:
    (tmp_path / "begun.json").touch()
    with pytest.raises(UserError, match=word), claimed(tmp_path, use, overwrite=True):
        pass


def test_a_folder_that_is_written_whole_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not empty"), claimed(tmp_path, FolderUse.whole, overwrite=True):
        pass


def test_a_second_run_is_refused_as_soon_as_the_first_has_started(tmp_path: Path) -> None:
    for use in (FolderUse.run, FolderUse.result, FolderUse.whole):
        path = tmp_path / use.value
        with claimed(path, use), pytest.raises(UserError, match="is writing there"), claimed(path, use):
            pass
        assert not path.exists()


def test_runs_of_the_same_second_get_folders_of_their_own() -> None:
    assert len({default_output_dir("distill") for _ in range(100)}) == 100


def test_a_recipe_that_writes_no_file_needs_no_folder(corpus_file: Path) -> None:
    config = RunConfig(task="generate", output_dir=str(corpus_file / "run"))  # below a file
    folder = open_run_folder(config, {}, None, FolderUse.none)
    with closing(folder.lock):
        folder.claim()
    assert corpus_file.is_file()
    assert "nothing is written" in folder.describe_rest()
