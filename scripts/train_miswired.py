"""Train a head under a wrong wiring, to test the diagnosis of `+recipe=doctor` (docs/doctor.md).

python scripts/train_miswired.py WIRING [setting=value ...]

WIRING is the name of one of the doctor's wirings, such as embedding_late. The settings are those of `+recipe=distill`.
"""

from __future__ import annotations

import sys
from typing import Any

from mtptrain.cli import main
from mtptrain.doctor.wirings import WIRINGS
from mtptrain.losses import rollout as objective


def miswire(name: str) -> None:
    """Replace the rollout of every training by that of a wiring."""
    wiring = next((wiring for wiring in WIRINGS if wiring.name == name), None)
    if wiring is None:
        sys.exit(f"WIRING={name}: is not known; give one of {', '.join(wiring.name for wiring in WIRINGS)}")
    begin = objective.RolloutObjective.__init__

    def begin_miswired(self: objective.RolloutObjective, model: Any, *arguments: Any) -> None:
        begin(self, model, *arguments)
        run = wiring.build(model, 0)
        objective.rollout = lambda *inputs, recompute: run(*inputs)

    objective.RolloutObjective.__init__ = begin_miswired  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    miswire(sys.argv[1])
    sys.argv = ["mtptrain", "+recipe=distill", "evaluate_at_end=false", "evaluation.every=0", *sys.argv[2:]]
    main()
