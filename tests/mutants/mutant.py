"""A single planted fault: one replacement in one file, and the tests that should notice it."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).parent / "patches"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A fault to plant.

    Attributes:
        name: unique.
        area: part of the code, the title of its file of patches.
        fault: the fault in words.
        file: path below the root.
        old, new: the replaced text, which stands in the file exactly once, and its replacement.
        tests: pytest's names of files or tests that should fail, the fastest first.
        evaluated: whether an evaluation runs the faulty code, so that its certificate or controls may notice.
    """

    name: str
    area: str
    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    evaluated: bool

    def mutated(self, root: Path) -> str:
        """Return the file's text with the fault.

        Raises:
            ValueError: `old` does not stand in the file exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {text.count(self.old)} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)

    def digest(self, root: Path) -> str:
        """Return a hash of the fault, the mutated file and the files of the tests."""
        parts = [repr(self), self.mutated(root)]
        parts += [(root / test.split("::")[0]).read_text(encoding="utf-8") for test in self.tests]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_mutants(folder: Path = PATCHES) -> list[Mutant]:
    """Return the mutants of all files of patches, in the order of their names and lines."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        patches = tomllib.loads(path.read_text(encoding="utf-8"))
        for patch in patches["mutants"]:
            tests = tuple(patch.pop("tests", patches.get("tests", ())))
            evaluated = patch.pop("evaluated", patches["evaluated"])
            mutants.append(Mutant(**patch, area=patches["area"], tests=tests, evaluated=evaluated))
    return mutants
