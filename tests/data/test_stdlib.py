from pathlib import Path

import pytest

from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.stdlib import OVERLAP_LINES, package_documents, stdlib_documents
from mtptrain.errors import UserError

HELDOUT_EVERY = 16
PACKAGE = "omegaconf"  # installed with mtptrain, small


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return stdlib_documents(Split.train, HELDOUT_EVERY)


@pytest.fixture(scope="module")
def heldout() -> list[Document]:
    return stdlib_documents(Split.heldout, HELDOUT_EVERY)


def line_runs(text: str) -> set[tuple[str, ...]]:
    """Runs of `OVERLAP_LINES` lines longer than ten characters."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 10]
    return {tuple(lines[i : i + OVERLAP_LINES]) for i in range(len(lines) - OVERLAP_LINES + 1)}


def test_no_name_lies_on_both_sides(library: list[Document], heldout: list[Document]) -> None:
    names = [document.name for document in [*library, *heldout]]
    assert len(set(names)) == len(names)


def test_no_heldout_text_is_trained_on(library: list[Document], heldout: list[Document]) -> None:
    assert {document.text for document in heldout}.isdisjoint(document.text for document in library)


def test_both_sides_together_are_the_whole_library(library: list[Document], heldout: list[Document]) -> None:
    names = {document.name for document in [*library, *heldout]}
    assert {"argparse", "asyncio.tasks", "json.decoder", "pydoc_data.topics:assert"} <= names


def test_about_one_document_in_heldout_every_is_held_out(library: list[Document], heldout: list[Document]) -> None:
    share = len(heldout) / (len(library) + len(heldout))
    assert share == pytest.approx(1 / HELDOUT_EVERY, rel=0.5)  # 600 names: a standard deviation is 16 % of the share


@pytest.mark.parametrize(
    ("name", "side"),
    [("argparse", Split.train), ("decimal", Split.train), ("module_13", Split.heldout), ("x", Split.train)],
)
def test_the_side_of_a_name_never_changes(name: str, side: Split) -> None:
    assert split_of(name, HELDOUT_EVERY) is side


def test_the_side_does_not_depend_on_the_other_documents(heldout: list[Document]) -> None:
    assert all(split_of(document.name, HELDOUT_EVERY) is Split.heldout for document in heldout)


@pytest.mark.parametrize("folder", ["test", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__"])
def test_excluded_folders_are_absent(folder: str, library: list[Document], heldout: list[Document]) -> None:
    modules = [document.name for document in [*library, *heldout] if ":" not in document.name]
    assert not [name for name in modules if folder in name.split(".")[:-1]]


def test_documents_come_in_the_same_order_every_time(library: list[Document]) -> None:
    assert stdlib_documents(Split.train, HELDOUT_EVERY) == library


def test_package_documents_share_no_run_of_lines_with_heldout_text(library: list[Document]) -> None:
    everything = package_documents([PACKAGE], library, heldout=[])
    secret = max(everything, key=lambda document: len(document.text))
    excerpt = "\n".join(line for line in secret.text.splitlines() if len(line.strip()) > 10)
    heldout = [Document("heldout", "\n".join(excerpt.splitlines()[20:60]))]
    kept = package_documents([PACKAGE], library, heldout)
    assert secret in everything
    assert secret not in kept
    assert all(line_runs(document.text).isdisjoint(line_runs(heldout[0].text)) for document in kept)


def test_package_documents_stay_within_the_size_of_the_library() -> None:
    library = [Document("small", "x" * 100_000)]
    chosen = package_documents([PACKAGE], library, heldout=[])
    assert 0 < sum(len(document.text) for document in chosen) <= 100_000


def test_a_smaller_budget_takes_a_prefix_of_the_sample() -> None:
    small, large = (package_documents([PACKAGE], [Document("", "x" * size)], []) for size in (50_000, 150_000))
    assert large[: len(small)] == small


def test_package_documents_are_named_by_package_and_path(library: list[Document]) -> None:
    names = {document.name for document in package_documents([PACKAGE], library, heldout=[])}
    assert f"{PACKAGE}:dictconfig.py" in names


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.part", "", "argparse"])
def test_an_unknown_package_is_named(package: str, library: list[Document], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.packages: {package} is not an installed package; install"):
        package_documents([package], library, heldout=[])


def test_no_heldout_document_repeats_training_lines(library: list[Document], heldout: list[Document]) -> None:
    trained = set().union(*(line_runs(document.text) for document in library))
    assert max(len(line_runs(one.text) & trained) / max(1, len(line_runs(one.text))) for one in heldout) <= 1 / 32
    for copy in ("lzma", "pydoc_data.topics:numeric-types"):  # of bz2, and of another topic
        assert split_of(copy, HELDOUT_EVERY) is Split.heldout
        assert copy not in {document.name for document in heldout}
