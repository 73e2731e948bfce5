"""Draw the figures of docs/speed.md with the functions of `+recipe=plan`.

python scripts/plot_speed.py        # writes docs/images/*.svg; needs no GPU and no weights
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from mtptrain.config import HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.planning.decoding import draft_length_rows
from mtptrain.planning.result import DraftLengthRow, Profile
from mtptrain.planning.speedup import predicted_acceptance_length
from mtptrain.run.storage import atomic_file

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
MODEL, HARDWARE, CONTEXT = "v4_flash", "h200", 8192
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.5, 0.7, 0.9)  # of drafts kept at every position
DIGITS = 6  # of the recorded figures: far below a pixel, and equal on every machine
COLOURS = ("#0b6bb0", "#b45309", "#15803d", "#7c3aed")
SIZE_INCHES = (5.2, 3.2)


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart.

    Attributes:
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        x: positions of the points of every line.
        lines: heights of the points by the name of the line; None leaves one out.
        level: height of a dashed line, or None.
        is_log: whether `x` doubles from point to point.
    """

    x_label: str
    y_label: str
    x: list[int]
    lines: dict[str, list[float | None]]
    level: float | None = None
    is_log: bool = False


def plan_rows(batch: int, share: float) -> list[DraftLengthRow]:
    """Return the rows of a plan, one for each K from 0, if every position keeps the same share of drafts."""
    shape = yaml.safe_load((ROOT / f"conf/backbone/{MODEL}.yaml").read_text(encoding="utf-8"))["shape"]
    hardware = yaml.safe_load((ROOT / f"conf/hardware/{HARDWARE}.yaml").read_text(encoding="utf-8"))
    load = PlanConfig(batch=batch, context=CONTEXT)
    return draft_length_rows(ShapeConfig(**shape), HardwareConfig(**hardware), load, Profile([share], "assumed"))


def relative_cost(rows: list[DraftLengthRow], draft_length: int) -> float:
    """Return the time of drafting and verifying K tokens over the time of a plain pass."""
    row = rows[draft_length]
    return (row.verify.seconds + (row.draft.seconds if row.draft else 0.0)) / rows[0].verify.seconds


def charts() -> dict[str, Chart]:
    """Return the charts by name of their file."""
    lengths = list(range(6))
    by_batch = {batch: plan_rows(batch, 1.0) for batch in BATCHES}
    shares = {f"{share:.0%} kept": share for share in SHARES}
    return {
        "acceptance_length": Chart(
            "drafts a pass, K",
            "tokens a pass",
            lengths,
            {name: [predicted_acceptance_length([share], k) for k in lengths] for name, share in shares.items()},
        ),
        "cost": Chart(
            "drafts a pass, K",
            "time over a plain pass",
            lengths,
            {f"batch {b}": [relative_cost(by_batch[b], k) for k in lengths] for b in (1, 8, 32, 256)},
        ),
        "speedup": Chart(
            "drafts a pass, K",
            "speed-up at batch 1",
            lengths,
            {name: [plan_rows(1, share)[k].speedup for k in lengths] for name, share in shares.items()},
            level=1.0,
        ),
        "break_even": Chart(
            "batch (concurrent requests)",
            "break-even share kept",
            list(BATCHES),
            {f"K={k}": [by_batch[b][k].break_even for b in BATCHES] for k in (1, 2, 3)},
            is_log=True,
        ),
    }


def digest(chart: Chart) -> str:
    """Return SHA-256 of a chart's rounded figures, which its SVG carries as its description."""
    values = asdict(chart)
    values["lines"] = {
        name: [None if height is None else round(height, DIGITS) for height in line]
        for name, line in chart.lines.items()
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def draw(chart: Chart, path: Path) -> None:
    """Write a chart as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "mtptrain", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
    with rc_context({**style, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        for colour, (name, line) in zip(COLOURS, chart.lines.items(), strict=False):
            heights = [float("nan") if height is None else height for height in line]
            axes.plot(chart.x, heights, marker="o", markersize=4, color=colour, label=name)
        if chart.level is not None:
            axes.axhline(chart.level, color="#1c2127", linewidth=1, linestyle="--")
        if chart.is_log:
            axes.set_xscale("log", base=2)
        axes.set_xticks(chart.x, [str(one) for one in chart.x])
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.legend(frameon=False)
        with atomic_file(path) as written:
            figure.savefig(written, format="svg", metadata={"Date": None, "Description": digest(chart)})


def main() -> None:
    """Draw every chart."""
    IMAGES.mkdir(exist_ok=True)
    for name, chart in charts().items():
        draw(chart, IMAGES / f"{name}.svg")
        print(f"docs/images/{name}.svg")
        for line, heights in chart.lines.items():
            print(f"  {line:<10}", *(" -   " if height is None else f"{height:.2f}" for height in heights))


if __name__ == "__main__":
    main()
