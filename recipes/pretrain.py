"""`+recipe=pretrain`: train a head on data tokens, as DeepSeek trains its own, then measure it.

python -m mtptrain +recipe=pretrain

The program is that of `distill`; `loss.divergence`, by default cross-entropy, makes the difference.
"""

from __future__ import annotations

from mtptrain.recipes.distill import PROCESSES, reads, run

__all__ = ["PROCESSES", "reads", "run"]
