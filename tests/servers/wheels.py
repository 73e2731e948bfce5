"""Published distributions, downloaded by name and not installed."""

import subprocess
import sys
import zipfile
from pathlib import Path


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of one distribution, without what it needs, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, requirement, "--dest", str(folder)], check=True)
    return next(folder.glob(f"{requirement.split('==')[0]}-*.whl"))


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
