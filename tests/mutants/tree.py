"""Copies of the checkout in which faults are planted, so that the working tree stays as it is."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.mutants.mutant import Mutant


def copy_checkout(root: Path, target: Path) -> None:
    """Copy the tracked and new files of a checkout, without ignored ones; links stay links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_symlink() or (root / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)


def digest_tree(tree: Path) -> str:
    """Return a hash of the names and contents of all files of a copy."""
    digest = hashlib.sha256()
    for path in sorted(path for path in tree.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(str(path.relative_to(tree)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def plant(mutant: Mutant, base: Path, target: Path) -> None:
    """Copy a tree with its compiled files, and plant a fault in the copy."""
    shutil.copytree(base, target, symlinks=True)
    path = target / mutant.file
    path.write_text(mutant.mutated(base), encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
