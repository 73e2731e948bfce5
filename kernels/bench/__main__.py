"""The bench: correctness first, then time and memory beside the peers and the roofline."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mtptrain.provenance import git_commit, processor_name

from ..dispatch import INTERPRETER, requested
from .case import Case
from .ceilings import Ceilings, measure_ceilings
from .measure import extra_bytes, interleaved_seconds, spread

OPS = tuple(sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/bench.py")))


def run_case(case: Case, ceilings: Ceilings, device: torch.device, rounds: int) -> dict[str, Any]:
    """Check a case, and time what passed; prints as it goes."""
    print(f"\n{case.label}")
    runs = {"ours": case.ours, "definition": case.definition, **case.peers}
    expected = case.definition()
    result: dict[str, Any] = {"case": case.label, "missing": case.missing, "wrong": {}, "measured": {}}
    for name in list(runs):
        try:
            fault = case.difference(runs[name](), expected)
        except Exception as error:
            if name == "ours":
                raise
            fault = f"it failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if fault is not None:
            result["wrong"][name] = fault
            del runs[name]
            print(f"  {name:<28} wrong: {fault}")
    if "ours" not in runs:  # nothing is quoted on a red test
        return result
    memory = {name: extra_bytes(run, device) for name, run in runs.items()}
    seconds = interleaved_seconds(runs, rounds, device)
    floor = ceilings.seconds(case.bytes, case.flops)
    print(f"  {'':<28}{'ms':>10}  {'quartiles':<19}{'x ours':>8}{'extra MB':>10}{'of roofline':>13}")
    for name in runs:
        low, middle, high = spread(seconds[name])
        ratio = spread([a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)])[1]
        held = memory[name]
        result["measured"][name] = {
            "seconds": [low, middle, high],
            "times_ours": ratio,
            "extra_bytes": held,
            "share_of_roofline": floor / middle,
        }
        span = f"{low * 1e3:.2f} to {high * 1e3:.2f}"
        megabytes = "-" if held is None else f"{held / 1e6:.0f}"
        print(f"  {name:<28}{middle * 1e3:>10.2f}  {span:<19}{ratio:>8.2f}{megabytes:>10}{floor / middle:>13.0%}")
    for name, reason in case.missing.items():
        print(f"  {name:<28} not measured: {reason}")
    print(f"  {'roofline':<28}{floor * 1e3:>10.2f}  {case.bytes / 1e6:.1f} MB, {case.flops / 1e9:.2f} GFLOP")
    return result | {"roofline_seconds": floor, "bytes": case.bytes, "flops": case.flops}


def main() -> int:
    """Entry point of `python -m mtptrain.kernels.bench`."""
    parser = argparse.ArgumentParser(prog="python -m mtptrain.kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"which ops; all without it: {', '.join(OPS)}")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved measurements of each candidate (default 7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if unknown := [op for op in options.op if op not in OPS]:
        parser.error(f"op={unknown[0]} does not exist; there are {', '.join(OPS)}")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda needs a GPU that torch can see; use --device=cpu")
    if os.environ.get(INTERPRETER) == "1":
        parser.error(f"{INTERPRETER}=1 times an interpreter; leave it out")
    torch.set_num_threads(1)  # what `measure` counts on
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    ceilings = measure_ceilings(device, dtype)
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "commit": git_commit(),
        "kernels": requested(),
        "flops_per_second": ceilings.flops_per_second,
        "bytes_per_second": ceilings.bytes_per_second,
        "ops": {},
    }
    print(f"{name}, torch {torch.__version__}, commit {report['commit']}; on a CPU one thread and processor time")
    print(
        f"measured ceilings: {ceilings.flops_per_second / 1e12:.3g} TFLOP/s in {dtype} products,"
        f" {ceilings.bytes_per_second / 1e9:.3g} GB/s in copies"
    )
    for op in options.op or OPS:
        print(f"\n== {op}")
        cases = import_module(f"..{op}.bench", __package__).cases(device)
        report["ops"][op] = [run_case(case, ceilings, device, options.rounds) for case in cases]
    print(json.dumps(report))
    return 1 if any("ours" in case["wrong"] for cases in report["ops"].values() for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
