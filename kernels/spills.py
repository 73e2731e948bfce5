"""The accepted spills of registers outside hot loops, by Triton version, launch and GPU, each with its reason.

Reasons were read in the assembly of the version that they are listed under. Another version places registers otherwise.
"""

from __future__ import annotations

TRIED = ("3.7", "3.8", "3.9")  # Triton versions whose spills are all listed here

_RESIDUAL = "kept to 64 registers; values of the text wait in memory during a pass over the vocabulary"
_KEY_GRADIENT = "values that only the end needs wait in memory during the loop"

REASONS: dict[tuple[str, str, str], str] = {
    ("3.7", "acceptance.verify block softmax", "sm_80"): _RESIDUAL,
    ("3.7", "acceptance.verify block softmax", "sm_100"): _RESIDUAL,
    ("3.7", "sink_attention.key_backward", "sm_90"): _KEY_GRADIENT,
    ("3.8", "acceptance.verify token softmax", "sm_100"): _RESIDUAL,
    ("3.8", "sink_attention.key_backward", "sm_90"): _KEY_GRADIENT,
    ("3.9", "sink_attention.key_backward", "sm_90"): _KEY_GRADIENT,
}


def minor_version(version: str) -> str:
    """Return the first two parts of a version, such as 3.7 for 3.7.1."""
    return ".".join(version.split(".")[:2])


def judge(version: str, launch: str, target: str) -> tuple[bool, str]:
    """Return whether a spill outside the hot loops is a failure, and the reason or the complaint.

    Args:
        version: of Triton.
        launch: the name of its row in the table.
        target: the GPU.
    """
    minor = minor_version(version)
    if minor not in TRIED:
        return False, f"Triton {version} was not tried; tried are {', '.join(TRIED)}"
    reason = REASONS.get((minor, launch, target))
    return reason is None, reason or f"no reason for Triton {minor} in kernels/spills.py"
