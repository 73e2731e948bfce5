"""Where a number comes from: command, commit, versions, hardware and seed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mtptrain

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "tokenizers", "safetensors", "triton")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine of a run.

    Attributes:
        processor: model name of the CPU.
        cores: number of cores that this process may use.
        torch_threads: CPU threads of torch; None if the run has not loaded torch.
        gpus: names of all GPUs; empty if the run has not loaded torch.
    """

    processor: str
    cores: int
    torch_threads: int | None = None
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Everything needed to repeat a run.

    Attributes:
        command: as typed.
        started: local time with its offset.
        git_commit: see `git_commit`.
        versions: of Python and packages.
        hardware: the machine.
        seed: of the run.
        continues: provenance of the run that this one resumed.
    """

    command: list[str]
    started: str
    git_commit: str | None
    versions: dict[str, str]
    hardware: Hardware
    seed: int
    continues: Provenance | None = None


@cache
def git_commit() -> str | None:
    """Return the commit of the checkout that holds this package, with `-dirty` if files differ; None outside one.

    It is looked up once: a process goes on with the code that it has imported.
    """
    folder = Path(mtptrain.__file__).resolve().parent
    try:
        # The package may be installed inside another repository, whose commit says nothing about it.
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        if Path(top) != folder.parent:
            return None
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def processor_name() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on.

    If torch is loaded, its version includes the build (2.13.0+cpu), which package metadata may omit, and the version of
    CUDA is added.
    """
    versions = {"python": platform.python_version(), "mtptrain": mtptrain.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["torch"] = str(torch.__version__)
        if torch.version.cuda is not None:
            versions["cuda"] = torch.version.cuda
    return versions


def hardware() -> Hardware:
    """Return the CPU and, if the run has loaded torch, its threads and the GPUs of this machine."""
    processor, cores = processor_name(), len(os.sched_getaffinity(0))
    torch = sys.modules.get("torch")
    if torch is None:
        return Hardware(processor, cores)
    gpus = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return Hardware(processor, cores, torch.get_num_threads(), gpus)


def describe_run(seed: int) -> Provenance:
    """Return everything that a reader needs to repeat this run."""
    return Provenance(
        command=["python", "-m", "mtptrain", *sys.argv[1:]],
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        git_commit=git_commit(),
        versions=package_versions(),
        hardware=hardware(),
        seed=seed,
    )
