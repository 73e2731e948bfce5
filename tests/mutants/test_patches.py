"""Every planted fault still applies, and the tests that should notice it exist."""

import ast

import pytest

from tests.command import ROOT
from tests.mutants.mutant import Mutant, read_mutants

MUTANTS = read_mutants()
AREAS = {
    *("objective", "rollout", "packing", "cache", "rewind", "verify", "draws", "replay"),
    *("certificate", "metrics", "resume", "ZeRO", "codecs", "Triton kernels"),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_changes_one_place_of_a_file_that_still_parses(mutant: Mutant) -> None:
    before = ast.dump(ast.parse((ROOT / mutant.file).read_text(encoding="utf-8")))
    assert ast.dump(ast.parse(mutant.mutated(ROOT))) != before


def test_names_are_unique_and_all_areas_have_faults() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.area for mutant in MUTANTS} == AREAS


def test_the_tests_that_should_notice_a_fault_exist() -> None:
    assert all(mutant.tests for mutant in MUTANTS)
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, *names = test.split("[")[0].split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"def {name}(" in text or f"class {name}:" in text for name in names), test


def test_the_page_shows_every_fault() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    assert [mutant.name for mutant in MUTANTS if f"| {mutant.area} | {mutant.fault} |" not in page] == []
