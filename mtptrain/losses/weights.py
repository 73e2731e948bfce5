import torch
from torch import Tensor


def step_weights(steps: int, decay: float) -> Tensor:
    """Weight of each draft step in the loss, decay^(k-1) normalised to sum 1.

    Args:
        steps: number of draft steps K, at least 1.
        decay: beta in (0, 1]; 1 weighs every step alike.

    Returns:
        float32 [K], not increasing.

    Raises:
        ValueError: a setting is out of range.

    Source: FastMTP, arXiv:2509.18362, equation 2.

    """
    if steps < 1:
        raise ValueError(f"steps={steps} leaves no draft step to weigh; use at least 1")
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must lie in (0, 1]; use 1 to weigh every step alike")
    weights_K = decay ** torch.arange(steps, dtype=torch.float64)
    return (weights_K / weights_K.sum()).float()
