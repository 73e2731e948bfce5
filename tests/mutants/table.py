"""The table of mutants: for each fault, everything that noticed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.mutants.mutant import Mutant
from tests.mutants.outcome import Outcome


def caught_by(outcome: Outcome) -> str:
    """Return the cheapest check that noticed the fault: test, certificate, control or nothing."""
    if outcome.test:
        return "test"
    return "certificate" if outcome.certificate else "control" if outcome.control else "nothing"


def describe(mutant: Mutant, outcome: Outcome) -> str:
    """Return a mutant's line in the terminal."""
    checks = {"test": outcome.test, "certificate": outcome.certificate, "control": outcome.control}
    noticed = "; ".join(f"{name}: {found}" for name, found in checks.items() if found)
    return f"{mutant.area}/{mutant.name} ({outcome.seconds:.0f} s): {noticed or 'NOTHING'}"


def markdown(mutants: Sequence[Mutant], outcomes: Mapping[str, Outcome]) -> str:
    """Return a summary line and the table."""
    kinds = [caught_by(outcomes[mutant.name]) for mutant in mutants]
    counts = {kind: kinds.count(kind) for kind in ("test", "certificate", "control", "nothing")}
    evaluated = [outcomes[mutant.name] for mutant in mutants if outcomes[mutant.name].evaluated]
    noticed = sum(bool(outcome.certificate or outcome.control) for outcome in evaluated)
    lines = [
        f"{len(mutants)} faults: a test notices {counts['test']}, only the certificate {counts['certificate']}, only a "
        f"control {counts['control']}, nothing {counts['nothing']}. Of the {len(evaluated)} faults in code that an "
        f"evaluation runs, certificate or controls notice {noticed}.",
        "",
        "| area | fault | test | certificate and controls |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(mutant, outcomes[mutant.name]) for mutant in mutants)]) + "\n"


def _row(mutant: Mutant, outcome: Outcome) -> str:
    test = outcome.test.removeprefix("tests/").replace("|", "\\|") if outcome.test else ""
    checks = ", ".join(filter(None, [outcome.certificate, outcome.control])).replace("|", "\\|")
    noticed = f"`{test}`" if "::" in test else test or "**nothing**"
    return f"| {mutant.area} | {mutant.fault} | {noticed} | {checks or ('nothing' if outcome.evaluated else '')} |"
