"""Check every op for correctness, then compare its time and memory with its peers and the roofline."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mtptrain.run.provenance import git_commit, processor_name

from ..dispatch import INTERPRETER, requested
from .case import Case, Outputs
from .ceilings import Ceilings, measure_ceilings
from .measure import Observed, interleaved_seconds, observe, quartiles

Result = dict[str, Any]  # JSON of a case, or of all

OPS = tuple(sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/bench.py")))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN (integers: the largest value), so that an entry that a kernel never writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # operations without a deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: Case, device: torch.device) -> tuple[dict[str, Observed], dict[str, str]]:
    """Observe one call of every candidate; return the correct ones, and the faults of the others."""
    passed, wrong = {}, {}
    expected = _expected(case, device)
    if isinstance(expected, Observed):
        passed["definition"], expected = expected, expected.outputs
    else:
        wrong["definition"] = "it does not fit into memory; the others were checked against it in pieces"
    for name, run in {"ours": case.ours, **case.peers}.items():
        try:
            if device.type == "cuda" or name != "ours":
                run()  # it may compile
            observed = observe(run, device)
            fault = case.difference(observed.outputs, expected)
        except Exception as error:
            if name == "ours":
                traceback.print_exc()
            fault = f"it failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if fault is None:
            passed[name] = observed
        else:
            wrong[name] = fault
    return passed, wrong


def _expected(case: Case, device: torch.device) -> Observed | Outputs:
    """Observe the definition; return only its outputs if it had to be computed in pieces."""
    try:
        if device.type == "cuda":
            case.definition()  # initialises libraries
        return observe(case.definition, device)
    except torch.OutOfMemoryError:
        if case.in_pieces is None:
            raise
    return case.in_pieces()


def run_case(case: Case, ceilings: Ceilings, device: torch.device, rounds: int) -> Result:
    """Check a case, and time the correct candidates; time nothing if ours is wrong or `rounds` is 0.

    With 0 rounds, memory is poisoned during the check. Otherwise it is not: filling it would count as memory used.
    """
    print(f"\n{case.label}", flush=True)
    with poisoned_memory() if rounds == 0 else nullcontext():
        passed, wrong = check(case, device)
    for name, fault in wrong.items():
        print(f"  {name:<28} wrong: {fault}")
    floor = ceilings.seconds(case.bytes, case.flops)
    result = {"case": case.label, "missing": case.missing, "wrong": wrong, "measured": {}, "roofline_seconds": floor}
    if "ours" in passed and rounds > 0:
        runs: dict[str, Callable[[], Any]] = {"ours": case.ours, "definition": case.definition, **case.peers}
        runs = {name: run for name, run in runs.items() if name in passed}
        first = {name: passed[name].seconds for name in runs}
        if case.bare is not None:
            runs["bare products"], first["bare products"] = case.bare, observe(case.bare, device).seconds
        seconds = interleaved_seconds(runs, first, rounds, device)
        extra = {name: passed[name].extra_bytes if name in passed else None for name in runs}
        result["measured"] = {name: _row(seconds[name], seconds["ours"], extra[name], floor) for name in runs}
    if rounds == 0:
        print(f"  {', '.join(passed)} agree", flush=True)
        return result
    _print_case(result)
    print(
        f"  {'roofline':<28}{floor * 1e3:>10.2f}  {case.bytes / 1e6:.1f} MB, {case.flops / 1e9:.2f} GFLOP", flush=True
    )
    return result | {"bytes": case.bytes, "flops": case.flops}


def _row(seconds: list[float], ours: list[float], extra_bytes: int | None, floor: float) -> Result:
    return {
        "seconds": quartiles(seconds),
        "times_ours": quartiles([a / b for a, b in zip(seconds, ours, strict=True)])[1],
        "extra_bytes": extra_bytes,
        "share_of_roofline": floor / quartiles(seconds)[1],
    }


def _print_case(result: Result) -> None:
    print(f"  {'':<28}{'ms':>10}  {'quartiles':<19}{'x ours':>8}{'extra MB':>10}{'of roofline':>13}")
    for name, row in result["measured"].items():
        low, middle, high = (1e3 * x for x in row["seconds"])
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}"
        print(
            f"  {name:<28}{middle:>10.2f}  {f'{low:.2f} to {high:.2f}':<19}{row['times_ours']:>8.2f}{extra:>10}"
            f"{row['share_of_roofline']:>13.0%}"
        )
    for name, reason in result["missing"].items():
        print(f"  {name:<28} not measured: {reason}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m mtptrain.kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"ops to measure (default all: {', '.join(OPS)})")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="interleaved measurements of each candidate (default 7); 0 only checks them",
    )
    parser.add_argument("--no-peers", action="store_true", help="only our implementation and the definition")
    parser.add_argument("--sizes", choices=["cpu", "cuda"], help="list of sizes (default: that of the device)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.op if op not in OPS]:
        parser.error(f"op={unknown[0]} does not exist; use {', '.join(OPS)}")
    if options.rounds < 0:
        parser.error(f"--rounds={options.rounds} must be 0 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda needs a GPU that torch can see; use --device=cpu")
    if os.environ.get(INTERPRETER) == "1":
        parser.error(f"{INTERPRETER}=1 times an interpreter; leave it out")
    return options


def main() -> int:
    """Run `python -m mtptrain.kernels.bench`, and return its exit code: 1 if any of our ops is wrong."""
    options = parse()
    torch.set_num_threads(1)  # `measure` relies on it
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    ceilings = measure_ceilings(device, dtype)
    report: Result = {
        "device": name,
        "torch": torch.__version__,
        "commit": git_commit(),
        "kernels": requested(),
        "flops_per_second": ceilings.flops_per_second,
        "bytes_per_second": ceilings.bytes_per_second,
        "ops": {},
    }
    print(f"{name}, torch {torch.__version__}, commit {report['commit']}; on a CPU: one thread, processor time")
    print(
        f"measured ceilings: {ceilings.flops_per_second / 1e12:.3g} TFLOP/s in {dtype} products,"
        f" {ceilings.bytes_per_second / 1e9:.3g} GB/s in copies"
    )
    for op in options.op or OPS:
        print(f"\n== {op}")
        cases = import_module(f"..{op}.bench", __package__).cases(device, options.sizes or device.type)
        report["ops"][op] = []
        for case in cases:
            if options.no_peers:
                case.peers.clear()
            report["ops"][op].append(run_case(case, ceilings, device, options.rounds))
    print(json.dumps(report))
    wrong = [op for op, results in report["ops"].items() if any("ours" in result["wrong"] for result in results)]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
