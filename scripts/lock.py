"""Write constraints.txt, the exact version of every package that `make run`, `make test` and CI install.

python scripts/lock.py        # or `make lock`; needs the package index and a few minutes

Installs `.[dev]` with the newest versions that pyproject.toml allows into a fresh environment and lists them.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)  # of requires-python: a newer one may choose versions that the oldest cannot install
# The CUDA build of a torch release requires one release of triton; the CPU build requires none, and pip would take the
# newest. Newer pymdown-extensions need Python 3.11.5, and Debian 12 has 3.11.2: pip would look for half an hour for
# versions of the dev extra that agree, and give up.
CHOSEN = ("torch==2.13.0", "triton==3.7.1", "pymdown-extensions==12.3")
OMITTED = re.compile(r"mtptrain|(nvidia|cuda)-.*")  # this project, and what the CUDA build of torch pins itself


def normalize(name: str) -> str:
    """Return a distribution's name as package indexes compare it. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock_lines(installed: dict[str, str]) -> list[str]:
    """Return sorted `name==version` lines.

    Args:
        installed: version by name. A local suffix such as `+cpu` names a build and is dropped.
    """
    versions = {normalize(name): version.partition("+")[0] for name, version in installed.items()}
    return [f"{name}=={versions[name]}" for name in sorted(versions) if not OMITTED.fullmatch(name)]


def resolve(folder: Path) -> dict[str, str]:
    """Install `.[dev]` into a new environment in `folder` and return the version of every package there."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "install", "--quiet", *CHOSEN, "--editable", f"{ROOT}[dev]"], check=True)
    subprocess.run([*pip, "check"], check=True)
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}


def header() -> str:
    """Return the comment above the versions."""
    made = f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    return (
        f"# Exact versions of all packages, made by `make lock` ({made}); do not edit.\n"
        "# For the CPU and the CUDA build of torch: pip install -c constraints.txt -e '.[dev]'\n"
    )


def main() -> None:
    """Resolve in a temporary environment, then replace the lock."""
    if sys.version_info[:2] != OLDEST_PYTHON:
        raise SystemExit(f"make lock needs Python {'.'.join(map(str, OLDEST_PYTHON))}, the oldest that is supported")
    with tempfile.TemporaryDirectory() as folder:
        lines = lock_lines(resolve(Path(folder)))
    LOCK.write_text(header() + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
