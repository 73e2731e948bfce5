"""The training loop: one engine, one objective, batches by step number, and checkpoints for an exact resume."""

# K draft steps, J sources

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mtptrain.batch import Batch
from mtptrain.config import TrainConfig
from mtptrain.data.batches import BatchSource
from mtptrain.errors import UserError
from mtptrain.losses.next_token import LossOutput
from mtptrain.run.distributed import (
    broadcast_object,
    gather_objects,
    max_over_processes,
    on_rank0,
    rank,
    sum_over_processes,
)
from mtptrain.run.memory import keep_freed_memory, peak_memory_bytes
from mtptrain.run.nodes import require_shared
from mtptrain.run.preemption import StopRequest
from mtptrain.run.progress import Progress
from mtptrain.run.tracking import MetricsLog
from mtptrain.training.checkpoint import (
    BEST,
    OPTIMIZER,
    Checkpoint,
    TrainerState,
    TrainingIdentity,
    checkpoint_name,
    fitting_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from mtptrain.training.engine import Engine
from mtptrain.training.figures import progress_figures
from mtptrain.training.optim import learning_rate
from mtptrain.training.resume import Difference, differences, require_allowed
from mtptrain.training.router_balance import RouterBalancer
from mtptrain.training.selection import SELECTION, Values


class Objective(Protocol):
    """Training objective of a module."""

    def counts(self, batch: Batch) -> Tensor:
        """Return the number of valid target tokens of each draft step, float64 [K]."""
        ...

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        """Return loss and metric sums of a micro-batch, given the counts of the whole step."""
        ...


BEST_METRIC = "best_metric"  # counter in a checkpoint: the metric of `best_score`
POSITIONS = "data_positions"  # counter in a checkpoint: the data position of every process


@dataclass(frozen=True, slots=True)
class Step:
    """Counts and metric sums of an optimiser step, over all its micro-batches and processes.

    Attributes:
        counts_K: valid target tokens of each draft step, float64.
        sums_K: metric sums over these tokens by name, float64; empty if the step was skipped.
        norm: norm of the gradient before clipping.
        stop_requested: whether a signal has asked any process to stop.
    """

    counts_K: Tensor
    sums_K: dict[str, Tensor]
    norm: float
    stop_requested: bool


@dataclass(slots=True)
class MetricTotals:
    """Metric sums since the last log line."""

    counts_K: Tensor | None = None
    sums_K: dict[str, Tensor] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        """Add an optimiser step, unless it was skipped."""
        if not step.sums_K:
            return
        self.counts_K = step.counts_K if self.counts_K is None else self.counts_K + step.counts_K
        for name, value_K in step.sums_K.items():
            self.sums_K[name] = self.sums_K.get(name, torch.zeros_like(value_K)) + value_K

    def means(self) -> dict[str, float]:
        """Return `name/step_k`: the mean over the valid tokens of draft step k, NaN if there are none."""
        if self.counts_K is None:
            return {}
        means = {}
        for name, sum_K in self.sums_K.items():
            mean_K = sum_K / self.counts_K.where(self.counts_K > 0, math.nan)
            means.update({f"{name}/step_{k}": value for k, value in enumerate(mean_K.tolist(), start=1)})
        return means


@dataclass(frozen=True, slots=True)
class Probe:
    """A measurement during training; the checkpoint with the best score is kept as `best`.

    Attributes:
        every: steps between measurements; the last step is measured too.
        measure: returns the metrics to log.
        score: name of the metric that selects the best checkpoint; larger is better.
        prompts: digests of the prompts that it is measured on, kept with the best checkpoint.
    """

    every: int
    measure: Callable[[], dict[str, float]]
    score: str
    prompts: Sequence[str] = ()


class Trainer:
    """Trains a module, together with the other processes of the run.

    Args:
        engine: holds the module. The whole module is checkpointed, buffers and frozen parameters included.
        objective: turns a batch into a loss.
        batches: micro-batches by number.
        config: steps, accumulation, schedule and intervals of the loop.
        checkpoints: folder of the checkpoints.
        identity: identity of the training; checkpoints of another training are refused.
        label: shown in the progress line.
        probe: measures the module during training.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        batches: BatchSource,
        config: TrainConfig,
        checkpoints: Path,
        identity: TrainingIdentity,
        label: str = "train",
        probe: Probe | None = None,
    ) -> None:
        self.engine, self.objective, self.batches, self.config = engine, objective, batches, config
        self.checkpoints, self.identity, self.label, self.probe = checkpoints, identity, label, probe
        self.device = next(engine.module.parameters()).device
        self.balancer = RouterBalancer(engine.module, config.router_bias_rate)
        self.stop_request = StopRequest()
        self.step = self.saved_step = 0
        self.best_metric: str | None = None  # that of the counter `best_score`
        self.counters: Values = {"tokens": 0, "skipped_steps": 0, "bad_steps_in_a_row": 0}

    def restore(self, checkpoint: Checkpoint, allowed: Sequence[str] = ()) -> list[Difference]:
        """Continue from a checkpoint of any engine: module, optimiser, random numbers, counts and data position.

        Args:
            checkpoint: of this training.
            allowed: settings that may differ; see `require_allowed`.

        Returns:
            The settings that differ. Other data start from their beginning.

        Raises:
            UserError: the checkpoint belongs to another training.
        """
        changes = differences(checkpoint.identity, self.identity)
        require_allowed(f"resume=auto: {checkpoint.folder}", changes, allowed)
        self.engine.load(fitting_tensors(checkpoint, self.engine.module), checkpoint.stored(OPTIMIZER))
        random = checkpoint.random_state()
        torch.set_rng_state(random["torch"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        self.step = self.saved_step = checkpoint.step
        self.counters = dict(checkpoint.counters)
        self.best_metric = self.counters.pop(BEST_METRIC, None)
        index, positions = self.step * self.config.accumulation, self.counters.pop(POSITIONS, [])
        passages = checkpoint.passages()
        if checkpoint.identity.data == self.identity.data:
            self.batches.seek(index, positions, passages)
        else:
            self.batches.restart(index, passages)
        return changes

    def save(self, name: str | None = None) -> Path:
        """Write this step's checkpoint, named after the step by default, prune older ones, and return its folder."""
        folder = self.checkpoints / (name or checkpoint_name(self.step))
        positions, passages = gather_objects(self.batches.position()), self.batches.passages()
        counters = dict(self.counters)
        if any(positions):
            counters[POSITIONS] = positions
        if self.best_metric is not None:
            counters[BEST_METRIC] = self.best_metric
        if name == BEST and self.probe is not None:
            counters[SELECTION] = {"by": self.probe.score, "prompts": [*self.probe.prompts]}
        save_checkpoint(folder, self.engine.state(), self.identity, TrainerState(self.step, counters), passages)
        on_rank0(lambda: prune_checkpoints(self.checkpoints, self.config.keep_checkpoints))
        if name is None:  # `best` is not resumed from
            self.saved_step = self.step
            self.batches.saved()
        return folder

    def _await_batches(self) -> None:
        """Wait for the data of the next step; save the steps before it if they do not come.

        Raises:
            Preempted: a signal asked the run to stop; the state is saved.
            UserError: the data did not appear in time, or there are no more; the state is saved.
        """
        end = (self.step + 1) * self.config.accumulation
        try:
            if self.batches.await_batches(end, lambda: self.stop_request.is_made):
                return
        except UserError:
            self._save_new()
            raise
        self._save_new()
        raise self.stop_request.ending(f"step {self.step} of {self.config.steps} is saved")

    def _save_new(self) -> None:
        """Save the steps after the newest checkpoint, if any."""
        if self.step > self.saved_step:
            self.save()

    def train_step(self) -> Step:
        """Run one optimiser step; a non-finite loss or gradient skips the update on all processes and is counted.

        Raises:
            UserError: `train.max_bad_steps` steps in a row were not finite.
        """
        first = self.step * self.config.accumulation
        batches = [self.batches.batch(first + i).to(self.device) for i in range(self.config.accumulation)]
        num_sources = max(1, len(self.batches.names))
        tokens_J = torch.stack([batch.source_tokens(num_sources) for batch in batches]).sum(0)
        counts_K = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        counts_K, tokens_J = sum_over_processes(torch.cat([counts_K, tokens_J])).split([len(counts_K), num_sources])
        sums_K: dict[str, Tensor] = {}
        for batch in batches:
            output = self.objective(batch, counts_K)
            self.engine.backward(_poisoned(output.loss))
            for name, value_K in output.sums_K.items():
                sums_K[name] = sums_K.get(name, torch.zeros_like(value_K)) + value_K
        norm = self.engine.step(learning_rate(self.step, self.config))
        self.balancer.step()
        self.step += 1
        self._count_tokens(tokens_J)
        sums_K, stop_requested = self._over_processes(sums_K)
        if not math.isfinite(norm):
            self._count_bad_step()
            return Step(counts_K, {}, norm, stop_requested)
        self.counters["bad_steps_in_a_row"] = 0
        return Step(counts_K, sums_K, norm, stop_requested)

    def _count_tokens(self, tokens_J: Tensor) -> None:
        """Count the tokens of a step, in total and by source of a mixture."""
        self.counters["tokens"] += int(tokens_J.sum())
        for name, tokens in zip(self.batches.names, tokens_J.tolist(), strict=False):
            self.counters[f"tokens/{name}"] = self.counters.get(f"tokens/{name}", 0) + int(tokens)

    def _shares(self) -> dict[str, float]:
        """Return `share/NAME`: the share of each source of a mixture in all tokens so far."""
        total = max(self.counters["tokens"], 1)
        return {f"share/{name}": self.counters.get(f"tokens/{name}", 0) / total for name in self.batches.names}

    def _over_processes(self, sums_K: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Return the sums over all processes, and whether a signal has asked any of them to stop."""
        request = torch.tensor([float(self.stop_request.is_made)], dtype=torch.float64, device=self.device)
        *rows, requests = sum_over_processes(torch.cat([*sums_K.values(), request])).split(
            [value_K.numel() for value_K in sums_K.values()] + [1]
        )
        return dict(zip(sums_K, rows, strict=True)), bool(requests > 0)

    def _count_bad_step(self) -> None:
        self.counters["skipped_steps"] += 1
        self.counters["bad_steps_in_a_row"] += 1
        if self.counters["bad_steps_in_a_row"] >= self.config.max_bad_steps:
            raise UserError(
                f"train.max_bad_steps={self.config.max_bad_steps}: loss or gradient was not finite that many steps in "
                f"a row, up to step {self.step}; lower train.learning_rate (now {self.config.learning_rate}) or check "
                "the data, and resume from the last checkpoint with resume=auto"
            )

    def run(self, log: MetricsLog) -> None:
        """Train until `train.steps`, with progress, metrics and checkpoints.

        Raises:
            Preempted: a signal asked the run to stop; the state is saved.
            UserError: a process does not see the run's folder.
        """
        require_shared(self.checkpoints.parent)
        keep_freed_memory()
        self.engine.module.train()
        totals, logged_at, tokens_at = MetricTotals(), time.monotonic(), self.counters["tokens"]
        with closing(self.batches), self.stop_request, Progress(self.label, self.config.steps, self.step) as progress:
            while self.step < self.config.steps:
                self._await_batches()
                before = self.counters["tokens"]
                step = self.train_step()
                totals.add(step)
                progress.update(self.step, progress_figures(totals.means()), self.counters["tokens"] - before)
                if self._is_due(self.config.log_every):
                    now = time.monotonic()
                    speed = (self.counters["tokens"] - tokens_at) / max(now - logged_at, 1e-9)
                    rate = learning_rate(self.step - 1, self.config)
                    extra = {"gradient_norm": step.norm, "learning_rate": rate, "tokens_per_second": speed}
                    extra["peak_memory_gb"] = max_over_processes(peak_memory_bytes(self.device)) / 1e9
                    extra.update(**self.balancer.figures(), **self._shares())
                    log.write(self.step, {**totals.means(), **extra, **self.counters})
                    totals, logged_at, tokens_at = MetricTotals(), now, self.counters["tokens"]
                if self.probe is not None and self._is_due(self.probe.every):
                    self._measure(self.probe, log)
                if self._is_due(self.config.checkpoint_every) or step.stop_requested:
                    self.save()
                if step.stop_requested:
                    raise self.stop_request.ending(f"step {self.step} of {self.config.steps} is saved")
        self.engine.module.eval()
        if self.counters["skipped_steps"] and rank() == 0:
            print(f"{self.counters['skipped_steps']} steps were skipped: not finite", file=sys.stderr)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _measure(self, probe: Probe, log: MetricsLog) -> None:
        metrics = broadcast_object(probe.measure())  # every process measures: its share of the head may be needed
        log.write(self.step, metrics)
        if self.best_metric != probe.score:  # an earlier start of the run chose by another one
            self.best_metric = probe.score
            self.counters.pop("best_score", None)
        if metrics.get(probe.score, -math.inf) > self.counters.get("best_score", -math.inf):
            self.counters.update(best_score=metrics[probe.score], best_step=self.step)
            self.save(BEST)


def _poisoned(loss: Tensor) -> Tensor:
    """Return the loss; a non-finite loss gets a non-finite gradient, which every process and engine detects."""
    return loss * (1 + 0 * loss.detach())
