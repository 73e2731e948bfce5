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
    """Return a summary line and the table; a fault without an outcome was not planted yet."""
    known = [outcomes[mutant.name] for mutant in mutants if mutant.name in outcomes]
    kinds = [caught_by(outcome) for outcome in known]
    counts = {kind: kinds.count(kind) for kind in ("test", "certificate", "control", "nothing")}
    evaluated = [outcome for outcome in known if outcome.evaluated]
    noticed = sum(bool(outcome.certificate or outcome.control) for outcome in evaluated)
    lines = [
        f"{len(known)} of {len(mutants)} faults planted: a test notices {counts['test']}, only the certificate "
        f"{counts['certificate']}, only a control {counts['control']}, nothing {counts['nothing']}. Certificate or "
        f"controls notice {noticed} of the {len(evaluated)} faults with which an evaluation ran.",
        "",
        "| area | fault | test | certificate and controls |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(mutant, outcomes.get(mutant.name)) for mutant in mutants)]) + "\n"


def _row(mutant: Mutant, outcome: Outcome | None) -> str:
    if outcome is None:
        return f"| {mutant.area} | {mutant.fault} | not planted yet | |"
    test = outcome.test.removeprefix("tests/").replace("|", "\\|") if outcome.test else ""
    checks = ", ".join(filter(None, [outcome.certificate, outcome.control])).replace("|", "\\|")
    noticed = f"`{test}`" if "::" in test else test or "**nothing**"
    return f"| {mutant.area} | {mutant.fault} | {noticed} | {checks or ('nothing' if outcome.evaluated else '')} |"
