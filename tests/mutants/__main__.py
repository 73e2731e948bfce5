"""Plant single faults, one at a time, and print for each the test, certificate or control that notices it.

python -m tests.mutants [--jobs 2] [--area AREA ...] [--only NAME ...] [--tests-only] [--fresh] [--output FOLDER]

Results of faults that have not changed are kept between runs. The exit code is 1 if no test notices some fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtptrain.run.storage import write_json, write_text
from tests.command import ROOT
from tests.mutants.forked import fork, preload
from tests.mutants.mutant import Mutant, read_mutants
from tests.mutants.outcome import Outcome, evaluate, run_tests
from tests.mutants.table import caught_by, describe, markdown
from tests.mutants.tree import copy_checkout, digest_tree, plant

BASE, EVALUATION = ".without_fault.json", "evaluation"


class Results:
    """Outcomes by mutant, kept in files of one folder.

    Args:
        folder: holds NAME.json for each mutant, and `BASE`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, outcome: Outcome) -> None:
        """Store an outcome."""
        write_json(self.folder / f"{outcome.name}.json", asdict(outcome))

    def find(self, mutant: Mutant) -> Outcome | None:
        """Return the stored outcome of a mutant."""
        path = self.folder / f"{mutant.name}.json"
        return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def passed_without_fault(self) -> dict[str, Any]:
        """Return the digest of the tree that was tested last without any fault, and what passed in it."""
        path = self.folder / BASE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tree": "", "checks": []}

    def add_passed(self, tree: str, checks: set[str]) -> None:
        """Store what passed in a tree without any fault: names of tests, and `EVALUATION`."""
        write_json(self.folder / BASE, {"tree": tree, "checks": sorted(checks)})

    def holds(self, mutant: Mutant, is_evaluated: bool) -> bool:
        """Return whether the outcome of this very mutant is known."""
        outcome = self.find(mutant)
        return outcome is not None and outcome.digest == mutant.digest(ROOT) and outcome.evaluated >= is_evaluated


def try_mutant(mutant: Mutant, base: Path, is_evaluated: bool) -> Outcome:
    """Return a mutant's outcome, from a copy of `base` that is deleted afterwards."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"mutant-{mutant.name}-", dir=base.parent) as name:
        folder = Path(name)
        plant(mutant, base, folder / "tree")
        test = run_tests(folder / "tree", mutant.tests, folder / "log")
        found = evaluate(folder / "tree", folder / "run", folder / "log") if is_evaluated else (None, None)
    return Outcome(mutant.name, mutant.digest(ROOT), test, *found, is_evaluated, round(time.monotonic() - started, 1))


def check_base(mutants: list[Mutant], base: Path, is_evaluated: bool, results: Results) -> None:
    """End with an error if a test or the certificate fails without any fault; skip what passed in this very tree."""
    tree, passed = digest_tree(base), results.passed_without_fault()
    known = set(passed["checks"]) if passed["tree"] == tree else set()
    tests = sorted({test for mutant in mutants for test in mutant.tests} - known)
    failed = run_tests(base, tests, base.parent / "log") if tests else None
    if failed is not None:
        sys.exit(f"{failed} fails without any fault; mend it first")
    results.add_passed(tree, known.union(tests))
    if is_evaluated and EVALUATION not in known:
        found = [part for part in evaluate(base, base.parent / "run", base.parent / "log") if part]
        if found:
            sys.exit(f"the evaluation fails without any fault ({', '.join(found)}); mend it first")
        results.add_passed(tree, known.union(tests, {EVALUATION}))


def main() -> int:
    """Run the mutants whose outcome is not known, and write results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2), help="mutants at once")
    parser.add_argument("--area", nargs="+", default=[], help="run the mutants of these areas only")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these mutants only")
    parser.add_argument("--tests-only", action="store_true", help="run no evaluation")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "mutants")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.output, ignore_errors=True)
    results = Results(options.output / "outcomes")
    mutants = [mutant for mutant in read_mutants() if is_chosen(mutant, options)]
    pending = [m for m in mutants if not results.holds(m, m.evaluated and not options.tests_only)]
    if pending:
        run(pending, results, options.jobs, options.tests_only)
    outcomes = {mutant.name: results.find(mutant) for mutant in mutants}
    known = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
    uncaught = [name for name in outcomes if name not in known or caught_by(known[name]) != "test"]
    write_json(options.output / "results.json", {name: asdict(outcome) for name, outcome in known.items()})
    write_text(options.output / "table.md", markdown(mutants, known))
    print(f"{len(mutants)} faults, {len(uncaught)} that no test notices: {', '.join(uncaught) or 'none'}")
    print(f"results.json and table.md are in {options.output}")
    return int(bool(uncaught))


def is_chosen(mutant: Mutant, options: argparse.Namespace) -> bool:
    """Return whether the options choose a mutant."""
    return (not options.only or mutant.name in options.only) and (not options.area or mutant.area in options.area)


def run(pending: list[Mutant], results: Results, jobs: int, tests_only: bool) -> None:
    """Try mutants, several at once, and store and print every outcome."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = Path(folder) / "tree"
        copy_checkout(ROOT, base)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")  # of the evaluations; tests have their own
        preload()
        print(f"{len(pending)} mutants; first without any fault", flush=True)
        check_base(pending, base, not tests_only and any(mutant.evaluated for mutant in pending), results)
        running = 0
        for mutant in pending:

            def program(mutant: Mutant = mutant) -> int:
                outcome = try_mutant(mutant, base, mutant.evaluated and not tests_only)
                results.add(outcome)
                print(describe(mutant, outcome), flush=True)
                return 0

            if running == jobs:
                os.wait()
                running -= 1
            fork(program)
            running += 1
        for _ in range(running):
            os.wait()


if __name__ == "__main__":
    sys.exit(main())
