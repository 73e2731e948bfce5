"""`data=stdlib`: the sources of Python's standard library and the English of its documentation topics."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from mtptrain.data.documents import Document, Split, split_of
from mtptrain.errors import UserError

# Tables, test data and programs that do not read like the rest of the library.
EXCLUDED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "turtledemo",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "pydoc_data",
    ]
)
OVERLAP_LINES = 5  # a package file that repeats this many held-out lines in a row is left out of training
# Largest share of a held-out document's runs of lines that training may hold. In CPython 3.11, five documents have 0.05
# to 0.98 (the topic numeric-types, lzma beside bz2, an event loop, a program and a licence), all others at most 0.02.
MAX_OVERLAP = 1 / 32


def _source_files(root: Path) -> Iterator[Path]:
    found: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in EXCLUDED_FOLDERS]  # site-packages may hold 100,000 files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    yield from sorted(found)


def _read_source(path: Path) -> str | None:
    """Return the file's text, or None if it is blank, unreadable or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() else None


def _library_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _source_files(root):
        text = _read_source(path)
        if text is not None:
            yield Document(".".join(path.relative_to(root).with_suffix("").parts), text)
    for topic, text in sorted(topics.items()):
        yield Document(f"pydoc_data.topics:{topic}", text)


def stdlib_documents(split: Split, heldout_every: int) -> list[Document]:
    """Return the standard library's documents on one side of the hold-out: modules by path, then topics by name.

    Held-out documents whose lines recur in training documents, such as topics under a second name, are left out.
    """
    sides: dict[Split, list[Document]] = {Split.train: [], Split.heldout: []}
    for document in _library_documents():
        sides[split_of(document.name, heldout_every)].append(document)
    if split is Split.train:
        return sides[Split.train]
    trained = set().union(*(_line_runs(document.text) for document in sides[Split.train]))
    return [document for document in sides[Split.heldout] if _overlap(document.text, trained) <= MAX_OVERLAP]


def _overlap(text: str, known: set[int]) -> float:
    """Return the share of a text's runs of lines that are known."""
    runs = _line_runs(text)
    return len(runs & known) / max(1, len(runs))


def _line_runs(text: str) -> set[int]:
    """Return hashes of all runs of `OVERLAP_LINES` lines, counting only lines of more than ten characters."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 10]
    return {hash(tuple(lines[i : i + OVERLAP_LINES])) for i in range(len(lines) - OVERLAP_LINES + 1)}


def package_documents(packages: list[str], library: list[Document], heldout: list[Document]) -> list[Document]:
    """Return sources of installed packages as training documents, in a fixed sample.

    The sample has at most as many characters as `library`. A file that repeats held-out text is left out.

    Args:
        packages: import names, e.g. ["torch"].
        library: the standard library's training documents.
        heldout: documents whose text must not be trained on.

    Raises:
        UserError: a package is not installed.
    """
    forbidden = set().union(*(_line_runs(document.text) for document in heldout))
    candidates: list[Document] = []
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # the parent of a dotted name is missing, or the name is empty
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"data.packages: {package} is not an installed package; install it or take it off the list")
        root = Path(spec.submodule_search_locations[0])
        for path in _source_files(root):
            text = _read_source(path)
            if text is not None and forbidden.isdisjoint(_line_runs(text)):
                candidates.append(Document(f"{package}:{path.relative_to(root)}", text))
    budget = sum(len(document.text) for document in library)
    chosen = []
    for document in sorted(candidates, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        budget -= len(document.text)
        if budget < 0:
            break
        chosen.append(document)
    return chosen
