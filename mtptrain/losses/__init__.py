"""From per-token divergences to one scalar loss."""

from .objective import chain_loss, weighted_loss
from .weights import step_weights

__all__ = ["chain_loss", "step_weights", "weighted_loss"]
