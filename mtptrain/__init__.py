"""Train multi-token-prediction heads on a frozen DeepSeek-V4 backbone and measure what they gain.

The names below are the interface from Python; docs/python.md shows them at work. Importing this package loads none of
them: torch is imported when the first name is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtptrain.api import (
        Batch,
        BatchSource,
        DecodedText,
        DecodedTexts,
        Evaluation,
        Head,
        HeadResult,
        LoadedBackbone,
        TrainedRun,
        UserError,
        decode,
        evaluate,
        load_backbone,
        load_head,
        read_evaluation,
        run_recipe,
        train,
        training_batches,
    )

__version__ = "0.2.0"

__all__ = [
    "Batch",
    "BatchSource",
    "DecodedText",
    "DecodedTexts",
    "Evaluation",
    "Head",
    "HeadResult",
    "LoadedBackbone",
    "TrainedRun",
    "UserError",
    "decode",
    "evaluate",
    "load_backbone",
    "load_head",
    "read_evaluation",
    "run_recipe",
    "train",
    "training_batches",
]


def _hide_folder_of_kernels() -> None:
    """Keep transformers from taking the folder kernels/ of a checkout for the Hugging Face package of that name.

    It would look for its version in all installed packages, at every start.
    """
    spec = None if "kernels" in sys.modules else find_spec("kernels")
    places = [] if spec is None or spec.origin else list(spec.submodule_search_locations or [])
    if {Path(place).resolve() for place in places} == {(Path(__file__).parent / "kernels").resolve()}:
        sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_folder_of_kernels()


def __getattr__(name: str) -> Any:
    """Return a name of the interface from Python, imported at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mtptrain.api"), name)


def __dir__() -> list[str]:
    """Return the names of the package with those of the interface, for completion."""
    return sorted({*globals(), *__all__})
