"""The wheel holds everything that a run needs, and runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import ROOT, run_process

NEEDED = {".py", ".yaml", ".html", ".css"}


def sources() -> list[str]:
    """Return the tracked and new files of the checkout, without ignored ones, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout, with links kept as links."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in sources():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the copy."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package(checkout: Path, wheel: zipfile.ZipFile) -> None:
    expected = set()
    for folder, _, files in os.walk(checkout / "mtptrain", followlinks=True):
        inside = Path(folder).relative_to(checkout)
        expected |= {str(inside / name) for name in files if Path(name).suffix in NEEDED or "shipped" in inside.parts}
    held = set(wheel.namelist())
    assert expected - held == set()
    assert {
        "mtptrain/cli.py",
        "mtptrain/recipes/distill.py",
        "mtptrain/kernels/linear_loss/reference.py",
        "mtptrain/conf/recipe/distill.yaml",
        "mtptrain/evaluation/report/page.html",
        "mtptrain/evaluation/report/page.css",
    } <= expected


def test_the_wheel_holds_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"mtptrain"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_the_unpacked_wheel_is_what_python_imports(unpacked: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "import mtptrain.recipes as r, mtptrain.kernels as k; print(*r.__path__, *k.__path__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.split() == [str(unpacked / "mtptrain" / name) for name in ("recipes", "kernels")]


def test_the_unpacked_wheel_shows_a_configuration(unpacked: Path, tmp_path: Path) -> None:
    code, output, errors = run_process("--cfg", "job", "+recipe=distill", folder=tmp_path, python_path=unpacked)
    assert (code, errors) == (0, "")
    assert "divergence: kl" in output


def test_the_unpacked_wheel_trains_and_reports(unpacked: Path, light: list[str], tmp_path: Path) -> None:
    code, output, errors = run_process("+recipe=distill", *light, folder=tmp_path, python_path=unpacked)
    assert code == 0, output + errors
    (run,) = (tmp_path / "outputs" / "distill").iterdir()  # the default folder of a run
    assert [folder.name for folder in checkpoint_folders(run / "checkpoints")] == ["step_00000001", "step_00000002"]
    assert "<style>" in (run / "report.html").read_text(encoding="utf-8")
