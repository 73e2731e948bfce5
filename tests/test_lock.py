"""The locked versions are those that pyproject.toml allows, complete and the same for every build of torch."""

import re
import sys
import tomllib
from importlib.metadata import distributions, requires, version
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.command import ROOT
from tests.scripts import load_script

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LISTED = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["docs"], *EXTRAS["dev"]]]
REQUIREMENTS = [requirement for requirement in LISTED if requirement.name != PROJECT["name"]]  # dev asks for docs
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
LOCKED = dict(line.split("==") for line in LINES if not line.startswith("#"))


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    """The script that makes the lock."""
    return load_script("lock")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_a_dependency_is_locked_to_a_version_that_the_project_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)])


def test_the_lock_holds_exact_public_versions_of_packages_alone(lock: ModuleType) -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES if not line.startswith("#"))
    assert [name for name in LOCKED if lock.OMITTED.fullmatch(name)] == []
    assert list(LOCKED) == sorted(LOCKED)


def test_the_lock_holds_the_chosen_versions(lock: ModuleType) -> None:
    assert set(lock.CHOSEN) <= set(LINES)
    assert PROJECT["requires-python"].startswith(">={}.{},".format(*lock.OLDEST_PYTHON))


def test_locked_versions_run_on_every_release_of_the_oldest_python(lock: ModuleType) -> None:
    oldest = "{}.{}.0".format(*lock.OLDEST_PYTHON)
    installed = {canonicalize_name(one.name): one for one in distributions()}
    same = [installed[name] for name in LOCKED if name in installed and installed[name].version == LOCKED[name]]
    needs = {one.name: SpecifierSet(one.metadata.get("Requires-Python") or "") for one in same}
    assert len(needs) > len(LOCKED) / 2
    assert {name: str(needed) for name, needed in needs.items() if not needed.contains(oldest)} == {}


def test_names_builds_and_what_torch_brings_are_normalized(lock: ModuleType) -> None:
    installed = {"Py.Yaml_x": "6.0", "torch": "2.13.0+cpu", "nvidia-nccl-cu13": "2.1", "mtptrain": "0.1.0"}
    assert lock.lock_lines(installed) == ["py-yaml-x==6.0", "torch==2.13.0"]


def test_the_lock_agrees_with_what_an_installed_cuda_build_of_torch_requires() -> None:
    """The CPU build requires no Triton, and another release of torch another one."""
    needed = [Requirement(text) for text in requires("torch") or [] if text.startswith("triton")]
    if version("torch").partition("+")[0] != LOCKED["torch"] or not needed:
        pytest.skip("needs the CUDA build of the locked torch")
    assert all(requirement.specifier.contains(LOCKED["triton"]) for requirement in needed)


def test_no_other_python_than_the_oldest_makes_the_lock(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11"):
        lock.main()
