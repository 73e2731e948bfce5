"""Compile every kernel ahead of time, without a GPU, and print its use of registers and shared memory.

python -m mtptrain.kernels.aot [op ...]

Exit code 1 when a kernel does not compile, does not fit, lacks the instruction that it is meant to use, spills
registers in a hot loop, or spills elsewhere without a reason in `spills.py`. With a Triton version that was not tried,
a spill outside the hot loops is only a warning. Triton keeps what it compiled in its own cache (TRITON_CACHE_DIR), so a
second run takes seconds. It shows that a kernel fits a GPU, not that it is right or fast.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from .dispatch import INTERPRETER
from .launch import Launch
from .loops import spills_in_hot_loops
from .spills import judge

OPS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/kernel.py")))
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Of a program. Source: CUDA programming guide, table of compute capabilities; the CDNA 3 instruction set's LDS.
MOST_SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


class Usage(NamedTuple):
    """Resources of one compiled kernel."""

    registers: int  # of a thread; on AMD vector registers
    shared_bytes: int  # of a program
    spill_bytes: int  # of a thread: its stack frame, which Triton uses for nothing else
    hot_spills: int  # instructions in hot loops that move spilled values


def launches(op: str) -> list[Launch]:
    """Return all launches that an op lists."""
    listed: list[Launch] = import_module(f".{op}.kernel", __package__).launches()
    return listed


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compile one launch for one GPU, and return its use of resources.

    Args:
        launch: the launch.
        target: a key of `TARGETS`.

    Raises:
        ValueError: the arguments do not match the kernel's, or the assembly lacks the launch's instruction.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = launch.kernel.arg_names
    if set(order) != launch.arguments.keys() | launch.constants.keys():
        raise ValueError(f"{launch.kernel.__name__} takes {order}, but its launch {launch.label} names others")
    types = {name: launch.arguments.get(name, "constexpr") for name in order}
    source = ASTSource(
        launch.kernel,
        {name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=launch.constants,
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in types if types[name].endswith(":16")},
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)
    if launch.instruction not in compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]:
        raise ValueError(f"its assembly holds no {launch.instruction}")
    return _amd_usage(compiled) if target.startswith("gfx") else _nvidia_usage(compiled)


def _nvidia_usage(compiled: Any) -> Usage:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        hot = spills_in_hot_loops(_output(knobs.nvidia.nvdisasm.path, "-c", file.name)) if stack else 0
    return Usage(registers, compiled.metadata.shared, stack, hot)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_usage(compiled: Any) -> Usage:
    text = compiled.asm["amdgcn"]
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Usage(registers, compiled.metadata.shared, stack, spills_in_hot_loops(text) if stack else 0)


def _compile_job(job: tuple[str, int, str]) -> Usage | str:
    op, number, target = job
    try:
        return compile_launch(launches(op)[number], target)
    except Exception as error:  # the table names it, and the others still compile
        return f"{type(error).__name__}: {error}"


def main(ops: list[str]) -> int:
    """Compile, print the table, and return the exit code: 0, 1 for a fault, 2 for an unknown op."""
    os.environ.pop(INTERPRETER, None)  # an interpreted function cannot be compiled
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        print(f"{unknown[0]}: no such op; there are {', '.join(OPS)}", file=sys.stderr)
        return 2
    jobs = [
        (op, number, target)
        for op in ops or OPS
        for number, launch in enumerate(launches(op))
        for target in TARGETS
        if launch.target in ("", target)
    ]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        usages = dict(zip(jobs, pool.map(_compile_job, jobs), strict=True))
    import triton

    faults = _report(usages, triton.__version__)
    print("\n".join(faults) or f"{len(usages)} compiled with Triton {triton.__version__}, no unexplained spill")
    return 1 if faults else 0


def _report(usages: dict[tuple[str, int, str], Usage | str], version: str) -> list[str]:
    """Print a row for each launch and the accepted spills; return a line for each fault.

    Args:
        usages: usage or error message by op, number of the launch and GPU.
        version: of Triton.
    """
    faults: list[str] = []
    notes: list[str] = []
    rows: dict[str, dict[str, str]] = {}
    for (op, number, target), usage in usages.items():
        launch = launches(op)[number]
        name = (f"{_kernel_name(op, launch)} {launch.label}").strip()
        cells = rows.setdefault(name, {})
        if isinstance(usage, str):
            faults.append(f"{name}, {target}: {usage}")
            cells[target] = "failed"
            continue
        cells[target] = f"{usage.registers} / {usage.shared_bytes} / {usage.spill_bytes}"
        wrong, accepted = judge_usage(usage, version, name, target)
        faults += [f"{name}, {target}: {line}" for line in wrong]
        notes += [f"{name}, {target}: {line}" for line in accepted]
    _print_table(rows)
    print("\n".join(["", *notes]))
    return faults


def _kernel_name(op: str, launch: Launch) -> str:
    """Return `op.kernel`, without the parts that the names of all kernels share."""
    return f"{op}.{launch.kernel.__name__.strip('_').removesuffix('_kernel').removeprefix(f'{op}_')}"


def judge_usage(usage: Usage, version: str, name: str, target: str) -> tuple[list[str], list[str]]:
    """Return the faults and the accepted spills of one launch on one GPU."""
    faults: list[str] = []
    notes: list[str] = []
    if usage.shared_bytes > MOST_SHARED_BYTES[target]:
        faults.append(f"more shared memory than the {MOST_SHARED_BYTES[target]} bytes there are")
    if usage.hot_spills:
        faults.append(f"spills in a hot loop ({usage.hot_spills} instructions)")
    elif usage.spill_bytes:
        is_fault, reason = judge(version, name, target)
        (faults if is_fault else notes).append(f"spills outside the hot loops; {reason}")
    return faults, notes


def _print_table(rows: dict[str, dict[str, str]]) -> None:
    print("registers / shared bytes / spilled bytes a thread\n")
    print(f"{'kernel':<50}" + "".join(f"{target:>18}" for target in TARGETS))
    for name, cells in rows.items():
        print(f"{name:<50}" + "".join(f"{cells.get(target, '-'):>18}" for target in TARGETS))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
