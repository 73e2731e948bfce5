"""Cheap measurements, and backbones that are read once: for the runs with `Light` settings (`tests/command.py`)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

from mtptrain.evaluation.sampler_result import SamplerTest
from tests.evaluation.recorded import recorded_evaluation

MOST_KEPT = 8  # backbones of a test process
_KEPT: dict[str, Any] = {}


@contextmanager
def measuring_little() -> Iterator[None]:
    """Make a recipe's measurements cheap: these numbers only make figures less noisy; plots have their own tests.

    Nothing that is measured is left out. The test of the installed command measures as users do.
    """
    from mtptrain.certificate import controls, drafts, rounding, sampler
    from mtptrain.evaluation import speedup, steptime
    from mtptrain.generation import writer
    from mtptrain.recipes import evaluate

    with (
        patch.object(evaluate, "STEP_REPETITIONS", 1),
        patch.object(steptime, "WARM_UP", 0),
        patch.object(speedup, "LEAST_BATCHES", 1),
        patch.object(rounding, "COPIES", 3),
        patch.object(drafts, "NEW_TOKENS", 4),
        patch.object(controls, "PASSES", 3),
        patch.object(sampler, "DRAWS", 2_000),
        patch.object(evaluate, "sampler_certificate", sampler_once),
        patch.object(writer, "TIMED_PASSES", 4),
        sketching(),
    ):
        yield


@contextmanager
def sketching() -> Iterator[None]:
    """Leave all plots of a page empty."""
    with (
        patch("matplotlib.figure.Figure", Sketch),
        patch("matplotlib.backends.backend_svg.FigureCanvasSVG", Sketch),
    ):
        yield


@contextmanager
def certified() -> Iterator[None]:
    """Give every evaluation a recorded certificate, for tests of runs whose certificate nothing reads."""
    from mtptrain.recipes import evaluate

    recorded = recorded_evaluation().certificate
    with patch.object(evaluate, "make_certificate", lambda *_: recorded):
        yield


@cache
def sampler_once(device: Any) -> SamplerTest:
    """Return the test of the sampler: its draws are fixed, and no setting but the device changes it."""
    from mtptrain.certificate.sampler import sampler_certificate

    return sampler_certificate(device=device)


class Sketch:
    """A figure, its canvas and its axes, of which nothing is laid out; it is saved as an empty plot."""

    texts = ()

    def __init__(self, *arguments: object, **options: object) -> None:
        """Take everything."""

    def __getattr__(self, name: str) -> "Sketch":
        return self

    def __call__(self, *arguments: object, **options: object) -> "Sketch":
        """Do nothing."""
        return self

    def __sub__(self, other: object) -> "Sketch":
        return self

    def transform(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return a point as it is."""
        return point

    def get_xlim(self) -> tuple[float, float]:
        """Return the limits of an axis without data."""
        return 0.0, 1.0

    def get_legend_handles_labels(self) -> tuple[list[object], list[str]]:
        """Return no line."""
        return [], []

    def savefig(self, target: TextIO, **options: object) -> None:
        """Write an empty plot."""
        target.write("<svg ></svg>")


@contextmanager
def loading_once() -> Iterator[None]:
    """Let `from_pretrained` copy a backbone that it has read before from the same files, which takes a fifth as long.

    A backbone that processes share, or with hooks of a test, is read each time.
    """
    from transformers import PreTrainedModel

    from mtptrain.backbone.load import DeepseekV4ForCausalLM

    read: Callable[..., Any] = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def copied(kind: Any, folder: Path, **options: Any) -> Any:
        if "distributed_config" in options or read.__module__ != PreTrainedModel.__module__:
            return read(kind, folder, **options)
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
        given = {**options, "config": options["config"].to_json_string()}
        name = repr((folder.resolve(), files, given))
        if name not in _KEPT:
            loaded = read(kind, folder, **options)
            if len(_KEPT) >= MOST_KEPT:
                _KEPT.clear()
            _KEPT[name] = loaded
        return copy.deepcopy(_KEPT[name])

    with patch.object(DeepseekV4ForCausalLM, "from_pretrained", classmethod(copied)):
        yield
