"""Compare two runs of the same training, one with Triton kernels and one with their definitions.

python scripts/compare_kernels.py TRITON_RUN REFERENCE_RUN

The last line is JSON. Exit code 1 if the losses of the first draft step differ by more than rounding explains.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

BF16 = 2**-8  # a unit in the last place, relative
LARGEST_MEDIAN = 4 * BF16  # relative difference of a step's loss, median over the steps
LOSS = "loss/step_1"


def read(folder: str) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def summarize(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return losses, rate and memory of a run; the first half of the steps warms up and is not timed."""
    late = rows[len(rows) // 2 :]
    return {
        "first loss": rows[0][LOSS],
        "last loss": rows[-1][LOSS],
        "tokens/s, median": statistics.median(row["tokens_per_second"] for row in late),
        "peak memory, GB": rows[-1]["peak_memory_gb"],
    }


def main() -> int:
    """Print a table and the differences of the losses."""
    if len(sys.argv) != 3:
        print("usage: python scripts/compare_kernels.py TRITON_RUN REFERENCE_RUN", file=sys.stderr)
        return 2
    runs = {name: read(folder) for name, folder in zip(("triton", "reference"), sys.argv[1:], strict=True)}
    table = {name: summarize(rows) for name, rows in runs.items()}
    print(f"| {len(runs['triton'])} steps | {' | '.join(table)} |\n|---|---|---|")
    for figure in table["triton"]:
        print(f"| {figure} | {' | '.join(f'{row[figure]:.5g}' for row in table.values())} |")
    pairs = zip(runs["triton"], runs["reference"], strict=True)
    apart = [abs(a[LOSS] / b[LOSS] - 1) for a, b in pairs]
    result = {"runs": table, "differences": {"first": apart[0], "median": statistics.median(apart), "most": max(apart)}}
    print(f"relative difference of the loss: {result['differences']}; a unit in the last place of bf16 is {BF16:.1e}")
    print(json.dumps(result))
    return 1 if statistics.median(apart) > LARGEST_MEDIAN else 0


if __name__ == "__main__":
    sys.exit(main())
