"""Time training from cached hidden states against training online: the same steps, interleaved, in one process.

python scripts/benchmark_streams.py [steps] [fp32|bf16|fp8] [setting=value ...]

The settings are those of +recipe=distill. The cache of the training documents lies in a temporary folder. Prints the
step rate of both (median and quartiles of the paired ratio) and the largest difference of their losses.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_module

from mtptrain.cli import typed_config
from mtptrain.config import RunConfig, register
from mtptrain.config.given import Given
from mtptrain.recipes import collect
from mtptrain.recipes.distill import make_trainer
from mtptrain.recipes.session import Session
from mtptrain.recipes.start import start_stack
from mtptrain.run.folder import open_run_folder
from mtptrain.training.trainer import Trainer


def distill_config(settings: list[str]) -> RunConfig:
    """Return the configuration of +recipe=distill with some settings."""
    with initialize_config_module("mtptrain.conf", version_base="1.3"):
        composed = compose("config", ["+recipe=distill", "evaluation.every=0", *settings])
        return typed_config(composed, Given(frozenset(), {}))[0]


def open_trainer(config: RunConfig, folder: Path) -> Trainer:
    """Return the recipe's trainer of the stock head."""
    session = Session(config, open_run_folder(replace(config, output_dir=str(folder)), {}))
    trainer = make_trainer(session, *start_stack(session))
    trainer.engine.module.train()
    return trainer


def timed_step(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds of a step and the loss of its first draft step."""
    begun = time.perf_counter()
    step = trainer.train_step()
    return time.perf_counter() - begun, float(step.sums_K["loss"][0] / step.counts_K[0])


def main(steps: int = 40, stored_as: str = "bf16", *settings: str) -> None:
    """Collect the cache, train both ways step by step, and print the figures."""
    register()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = distill_config([f"output_dir={folder / 'cache'}", f"collect.format={stored_as}", *settings])
        collect.run(Session(config, open_run_folder(config, {})))
        cached = distill_config([*settings, "data=streams", f"data.path={folder / 'cache'}"])
        online, offline = open_trainer(config, folder / "online"), open_trainer(cached, folder / "offline")
        timed_step(online), timed_step(offline)  # the first step allocates
        ratios, gaps, seconds = [], [], ([], [])
        for number in range(steps):
            pair = (online, offline) if number % 2 else (offline, online)
            steps_timed = {trainer is offline: timed_step(trainer) for trainer in pair}
            ratios.append(steps_timed[False][0] / steps_timed[True][0])
            gaps.append(abs(steps_timed[False][1] - steps_timed[True][1]))
            for is_offline, times in enumerate(seconds):
                times.append(steps_timed[bool(is_offline)][0])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"online {statistics.median(seconds[0]):.3f} s a step, from the cache {statistics.median(seconds[1]):.3f} s"
        )
        print(f"step rate from the cache over online: {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {steps} pairs)")
        print(f"loss of draft step 1: largest difference {max(gaps):.2e}, {stored_as} streams")


if __name__ == "__main__":
    main(*(int(argument) if argument.isdecimal() else argument for argument in sys.argv[1:]))
