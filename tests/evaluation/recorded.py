"""Results of real runs of the tiny backbone, recorded with few prompts and few held-out rows.

`scripts/record_results.sh` makes them, on a machine that may be busy; the commands are in their `provenance`. `greedy`:
two heads, two domains, batches of 1 and 2; `sampled`: temperature 1, batches of 1; `single`: one head, drafts of up to
8 tokens, one domain.
"""

import json
from pathlib import Path
from typing import Any, Literal

from mtptrain.evaluation.result import Evaluation, read_evaluation

FOLDER = Path(__file__).parent
METRICS = FOLDER / "data" / "metrics.jsonl"  # of a run of `+recipe=distill`
LAST_STEP = int(json.loads(METRICS.read_text(encoding="utf-8").splitlines()[-1])["step"])
EVALUATIONS = {name: FOLDER / "report" / "data" / f"{name}.json" for name in ("greedy", "sampled", "single")}


def recorded_evaluation(name: Literal["greedy", "sampled", "single"] = "greedy") -> Evaluation:
    return read_evaluation(EVALUATIONS[name], "recorded")


def recorded_json(name: Literal["comparison", "doctor"]) -> dict[str, Any]:
    return json.loads((FOLDER / "data" / f"{name}.json").read_text(encoding="utf-8"))
