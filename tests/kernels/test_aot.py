"""Spills are located in the assembly and judged by Triton version; nothing is compiled here."""

import pytest

from mtptrain.kernels.aot import TARGETS, Usage, judge_usage
from mtptrain.kernels.loops import spills_in_hot_loops
from mtptrain.kernels.spills import REASONS, TRIED

BEFORE, INNER, BETWEEN, AFTER = range(4)


def sass(*spilled: int) -> str:
    """Return nested loops, of which the innermost waits for a copy, as `nvdisasm` prints them, with some spills."""
    parts = ["        /*0010*/                   STL [R1+0x4], R178 ;" if n in spilled else "" for n in range(4)]
    work = "\n".join("        /*0020*/                   IMAD.X R8, R3, R4, R2 ;" for _ in range(30))
    return f"""
        /*0000*/                   LDC R1, c[0x0][0x28] ;
{parts[BEFORE]}
.L_x_0:
{work}
{parts[BETWEEN]}
.L_x_1:
{work}
.L_x_2:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
{parts[INNER]}
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/              @!P2 BRA `(.L_x_0) ;
{parts[AFTER]}
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


@pytest.mark.parametrize(("spilled", "hot"), [((), 0), ((BEFORE, BETWEEN, AFTER), 0), ((INNER,), 1), ((0, 1, 2, 3), 1)])
def test_only_spills_in_the_innermost_loop_are_hot(spilled: tuple[int, ...], hot: int) -> None:
    assert spills_in_hot_loops(sass(*spilled)) == hot


@pytest.mark.parametrize(("inside", "hot"), [(True, 2), (False, 0)])
def test_spills_of_amd_are_found(inside: bool, hot: int) -> None:
    spill = "\tscratch_store_dword off, v1, off offset:4 ; Folded Spill\n\tscratch_load_dword v1, off, off offset:4\n"
    before, within = ("", spill) if inside else (spill, "")
    loop = f".LBB0_1:        ; =>This Inner Loop Header: Depth=1\n{within}\ts_cbranch_scc1 .LBB0_1\n"
    assert spills_in_hot_loops(f"kernel:\n\ts_mov_b32 s0, 0\n{before}{loop}\ts_endpgm\n") == hot


def test_code_that_branches_out_of_line_and_back_makes_no_loop() -> None:
    text = """
        /*0000*/                   BRA.DIV UR6, `(.L_x_9) ;
.L_x_8:
        /*0010*/                   STL [R1], R0 ;
        /*0020*/                   EXIT ;
.L_x_9:
        /*0030*/                   BRA `(.L_x_8) ;
"""
    assert spills_in_hot_loops(text) == 0


def spilling(hot: int) -> Usage:
    return Usage(registers=64, shared_bytes=0, spill_bytes=8, hot_spills=hot)


LISTED = next(iter(REASONS))


@pytest.mark.parametrize("version", [f"{LISTED[0]}.1", "99.0.0"])
def test_a_spill_in_a_hot_loop_is_a_fault_with_every_version(version: str) -> None:
    faults, notes = judge_usage(spilling(hot=3), version, *LISTED[1:])
    assert faults == ["spills in a hot loop (3 instructions)"]
    assert notes == []


def test_a_spill_elsewhere_is_accepted_with_its_reason() -> None:
    faults, (note,) = judge_usage(spilling(hot=0), f"{LISTED[0]}.1", *LISTED[1:])
    assert faults == []
    assert REASONS[LISTED] in note


@pytest.mark.parametrize("version", TRIED)
def test_a_spill_without_a_reason_is_a_fault_with_a_version_that_was_tried(version: str) -> None:
    faults, notes = judge_usage(spilling(hot=0), f"{version}.0", "op.kernel", "sm_90")
    assert faults == [f"spills outside the hot loops; no reason for Triton {version} in kernels/spills.py"]
    assert notes == []


def test_a_spill_without_a_reason_only_warns_with_another_version() -> None:
    faults, (note,) = judge_usage(spilling(hot=0), "99.1.0", "op.kernel", "sm_90")
    assert faults == []
    assert "Triton 99.1.0 was not tried" in note


def test_every_reason_names_a_tried_version_and_a_known_gpu() -> None:
    assert {version for version, _, _ in REASONS} <= set(TRIED)
    assert {target for _, _, target in REASONS} <= set(TARGETS)
