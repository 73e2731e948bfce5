"""The distributions are whole, and the wheel runs in an environment of its own, without the checkout."""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from twine.commands.check import check

import mtptrain
from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import ROOT, fitting

NEEDED = {".py", ".yaml", ".html", ".css"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
OF_GIT = {".gitignore", ".dockerignore"}


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
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution built from the copy, and the wheel built from that."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(checkout)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    """The wheel."""
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def without_checkout() -> dict[str, str]:
    """Return the variables of processes that must not find the checkout, where pip would see the package installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which finds the packages that it depends on in the present one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python, (path,) = folder / "bin" / "python", built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(path)]
    subprocess.run(command, check=True, capture_output=True, env=without_checkout())
    (own,) = folder.glob("lib/*/site-packages")
    # The folders alone: the files there that make the checkout importable are not read.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return folder


def run_installed(environment: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the installed command in a folder outside the checkout."""
    command = [str(environment / "bin" / "mtptrain"), *fitting(arguments)]
    return subprocess.run(command, cwd=folder, env=without_checkout(), capture_output=True, text=True)


def test_the_source_distribution_holds_the_whole_checkout(checkout: Path, built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    links = {path for path in (checkout / "mtptrain").iterdir() if path.is_symlink()}
    assert {link.name for link in links} == {"conf", "kernels", "recipes"}
    linked = {
        f"mtptrain/{link.name}/{name.partition('/')[2]}"
        for link in links
        for name in sources()
        if name.startswith(f"{link.name}/")
    }
    files = {name for name in sources() if not (checkout / name).is_symlink()} - OF_GIT
    assert (files | linked) - held == set()


def test_the_distributions_can_be_uploaded(built: Path) -> None:
    assert not check([str(path) for path in built.iterdir()], strict=True)


def test_the_version_is_one(built: Path) -> None:
    assert mtptrain.__version__ == VERSION
    assert {
        path.name.removeprefix("mtptrain-").partition("-py3")[0].removesuffix(".tar.gz") for path in built.iterdir()
    } == {VERSION}
    assert f"\n## {VERSION} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


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


def test_the_installed_package_is_what_python_imports(environment: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [
            environment / "bin" / "python",
            "-c",
            "import mtptrain.recipes as r, mtptrain.kernels as k; print(r.__path__[0], k.__path__[0])",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    (own,) = environment.glob("lib/*/site-packages")
    assert shown.stdout.split() == [str(own / "mtptrain" / name) for name in ("recipes", "kernels")]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(["--version"], VERSION), (["--help"], "+recipe=RECIPE"), (["--cfg", "job", "+recipe=distill"], "divergence: kl")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_installed_command_answers(arguments: list[str], line: str, environment: Path, tmp_path: Path) -> None:
    ended = run_installed(environment, tmp_path, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert line in ended.stdout


def test_the_installed_command_trains_and_reports(environment: Path, light: list[str], tmp_path: Path) -> None:
    """Beside the tests of the recipes this one measures as users do: every repetition, draw and plot."""
    ended = run_installed(environment, tmp_path, "+recipe=distill", *light)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (run,) = (tmp_path / "outputs" / "distill").iterdir()  # the default folder of a run
    assert [folder.name for folder in checkpoint_folders(run / "checkpoints")] == ["step_00000001", "step_00000002"]
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["certificate"]["passed"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<style>" in page
    assert "<svg" in page
    assert json.loads((run / "provenance.json").read_text(encoding="utf-8"))["versions"]["mtptrain"] == VERSION


# (folders of a package without __init__.py that is named kernels, relative to the checkout; whether it is hidden)
FOLDERS = [
    (["kernels"], True),
    (["mtptrain/kernels"], True),
    (["docs"], False),
    (["kernels", "docs"], False),
    (["absent"], False),
    ([], False),
]


@pytest.mark.parametrize(("folders", "is_hidden"), FOLDERS)
def test_only_the_folder_of_the_checkout_is_hidden_as_a_package(
    folders: list[str], is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would take it for the hub's package of that name, and search all packages for its version."""
    spec = ModuleSpec("kernels", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / folder) for folder in folders]
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(mtptrain, "find_spec", lambda name: spec if folders else None)
    mtptrain._hide_folder_of_kernels()
    assert ("kernels" in sys.modules) == is_hidden
    assert sys.modules.pop("kernels", None) is None


def test_the_hubs_package_of_kernels_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("kernels", None, origin="kernels/__init__.py", is_package=True)
    spec.submodule_search_locations = [str(ROOT / "kernels")]
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(mtptrain, "find_spec", lambda name: spec)
    mtptrain._hide_folder_of_kernels()
    assert "kernels" not in sys.modules
