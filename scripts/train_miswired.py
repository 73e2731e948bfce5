"""Train a head that is fed wrongly, to see what `+recipe=doctor` makes of it (docs/doctor.md).

python scripts/train_miswired.py WIRING [setting=value ...]

WIRING is one of those that the doctor tries, such as embedding_late. The settings are those of `+recipe=distill`.
"""

from __future__ import annotations

import sys
from typing import Any

from mtptrain.cli import main
from mtptrain.doctor.wirings import WIRINGS
from mtptrain.losses import rollout as objective


def feed_wrongly(name: str) -> None:
    """Make every rollout of a training that of a wiring."""
    wiring = next((one for one in WIRINGS if one.name == name), None)
    if wiring is None:
        sys.exit(f"WIRING={name}: is not known; give one of {', '.join(one.name for one in WIRINGS)}")
    begin = objective.RolloutObjective.__init__

    def begin_wrongly(self: objective.RolloutObjective, model: Any, *arguments: Any) -> None:
        begin(self, model, *arguments)
        run = wiring.build(model, 0)
        objective.rollout = lambda *inputs, recompute: run(*inputs)

    objective.RolloutObjective.__init__ = begin_wrongly  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    feed_wrongly(sys.argv[1])
    sys.argv = ["mtptrain", "+recipe=distill", "evaluate_at_end=false", "evaluation.every=0", *sys.argv[2:]]
    main()
