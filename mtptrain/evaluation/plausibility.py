"""Reasons to doubt a measured speed-up: it cannot be, or the machine was busy."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from mtptrain.evaluation.result import Doubt, MachineLoad, Speedup
from mtptrain.evaluation.speedup import BatchRuns, batch_length, machine_load, summarize_speed, tokens_per_second

LEAST_SHARE = 0.9  # of the wall time that one busy thread spends on a processor of its own
RATIO_TOLERANCE = 1.1  # idle, the ratio of two heads is within a few percent of that of their tokens a pass


def is_busy(machine: MachineLoad) -> bool:
    """Return whether others used the machine: this process waited for a processor, or the load exceeds the cores."""
    has_waited = machine.processor_share is not None and machine.processor_share < LEAST_SHARE
    return has_waited or (machine.load is not None and machine.load > machine.cores)


def find_doubts(runs: list[BatchRuns], head: str, draft_length: int, peers: list[str]) -> list[Doubt]:
    """Return the reasons to doubt the speed-up of one head at one K.

    Args:
        runs: all timed batches of one size.
        head: its name.
        draft_length: K.
        peers: heads whose passes cost as much, by name.
    """
    doubts = []
    speed = summarize_speed(runs, head, draft_length)
    if max(speed.median, speed.after_prefill.median) > batch_length(runs, head, draft_length):
        doubts.append(Doubt.above_acceptance_length)
    if any(_is_off(runs, head, peer, draft_length) for peer in peers if peer != head):
        doubts.append(Doubt.ratio_of_heads)
    if is_busy(machine_load(runs)):
        doubts.append(Doubt.busy)
    return doubts


def _is_off(runs: list[BatchRuns], head: str, peer: str, draft_length: int) -> bool:
    """Return whether the ratio of two heads' speeds is not that of their tokens a pass, up to the tolerance."""
    speeds = [
        tokens_per_second([run.speculative[head, draft_length]])
        / tokens_per_second([run.speculative[peer, draft_length]])
        for run in runs
    ]
    lengths = [batch_length([run], head, draft_length) / batch_length([run], peer, draft_length) for run in runs]
    ratio = median(speed / length for speed, length in zip(speeds, lengths, strict=True))
    return not 1 / RATIO_TOLERANCE <= ratio <= RATIO_TOLERANCE


def summarize_heads(
    runs: list[BatchRuns], depths: Mapping[str, int], draft_lengths: list[int]
) -> dict[str, dict[int, Speedup]]:
    """Return the speed-ups of all heads by K, with the doubts about each.

    Args:
        runs: all timed batches of one size.
        depths: modules of each head; passes of heads with as many cost the same.
        draft_lengths: every K.
    """
    return {
        head: {
            k: summarize_speed(
                runs, head, k, find_doubts(runs, head, k, [peer for peer in depths if depths[peer] == depth])
            )
            for k in draft_lengths
        }
        for head, depth in depths.items()
    }
