"""Print the map of the tree for CONTRIBUTING.md: files and lines of every folder, at the present commit.

python scripts/tree.py
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "mtptrain"
COUNTED = {".py", ".sh", ".sbatch", ".yaml", ".md", ".html", ".css"}


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def folder_of(file: PurePosixPath) -> str:
    """Return the row of the map that a file counts for: its top-level folder; in the library, its whole folder."""
    depth = len(file.parts) - 1 if file.parts[0] == LIBRARY else min(1, len(file.parts) - 1)
    return "/".join(file.parts[:depth]) + "/"


def main() -> None:
    """Print a Markdown table; links to folders and recorded data are not counted."""
    num_files: Counter[str] = Counter()
    num_lines: Counter[str] = Counter()
    for name in git("ls-files"):
        path, file = ROOT / name, PurePosixPath(name)
        if file.suffix in COUNTED and len(file.parts) > 1 and path.is_file():
            num_files[folder_of(file)] += 1
            num_lines[folder_of(file)] += len(path.read_text(encoding="utf-8").splitlines())
    print(f"At commit {git('rev-parse', '--short', 'HEAD')[0]}, by `python scripts/tree.py`:\n")
    print("| folder | files | lines |\n|---|---|---|")
    for folder in sorted(num_files):
        print(f"| `{folder}` | {num_files[folder]} | {num_lines[folder]:,} |")


if __name__ == "__main__":
    main()
