"""The training loop: one module, one objective, batches by step number, checkpoints that resume exactly."""

# K draft steps

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtptrain.checkpoint import BEST, Checkpoint, checkpoint_name, load_module, prune_checkpoints, save_checkpoint
from mtptrain.config import TrainConfig
from mtptrain.data.packing import Batch
from mtptrain.errors import UserError
from mtptrain.losses.outcome import Outcome
from mtptrain.optim import MasterWeights, RouterBalancer, learning_rate, make_optimizer
from mtptrain.progress import Progress
from mtptrain.tracking import MetricsLog


class Objective(Protocol):
    """What a module is trained on."""

    def counts(self, batch: Batch) -> Tensor:
        """Valid target tokens of each draft step, float64 [K]."""
        ...

    def __call__(self, batch: Batch, counts_K: Tensor) -> Outcome:
        """Loss and metric sums of a micro-batch, given the counts of the whole step."""
        ...


class BatchSource(Protocol):
    """Batches by number."""

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`."""
        ...


@dataclass(slots=True)
class Totals:
    """Metric sums since the last log line."""

    counts_K: Tensor | None = None
    sums_K: dict[str, Tensor] = field(default_factory=dict)

    def add(self, counts_K: Tensor, outcomes: list[Outcome]) -> None:
        """Add one optimiser step."""
        self.counts_K = counts_K if self.counts_K is None else self.counts_K + counts_K
        for outcome in outcomes:
            for name, value_K in outcome.sums_K.items():
                self.sums_K[name] = self.sums_K.get(name, torch.zeros_like(value_K)) + value_K

    def means(self) -> dict[str, float]:
        """`name/step_k`: mean over the valid tokens of draft step k."""
        if self.counts_K is None:
            return {}
        found = {}
        for name, sum_K in self.sums_K.items():
            mean_K = sum_K / self.counts_K.clamp(min=1)
            found.update({f"{name}/step_{k}": value for k, value in enumerate(mean_K.tolist(), start=1)})
        return found


@dataclass(frozen=True, slots=True)
class Probe:
    """A measurement during training; the checkpoint with the best score is kept as `best`.

    Attributes:
        every: steps between measurements; the last step is measured too.
        measure: returns the metrics to log.
        score: which of them is better when larger.
    """

    every: int
    measure: Callable[[], dict[str, float]]
    score: str


class Trainer:
    """Trains a module.

    Args:
        module: its parameters that require gradients are trained and checkpointed, with its buffers.
        objective: turns a batch into a loss.
        batches: micro-batches by number.
        config: numbers of the loop.
        checkpoints: folder of the checkpoints.
        owner: what a checkpoint belongs to; a resume with another owner is refused.
        label: shown in the progress line.
        probe: measures the module while it trains.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        batches: BatchSource,
        config: TrainConfig,
        checkpoints: Path,
        owner: dict[str, Any],
        label: str = "train",
        probe: Probe | None = None,
    ) -> None:
        self.module, self.objective, self.batches, self.config = module, objective, batches, config
        self.checkpoints, self.owner, self.label, self.probe = checkpoints, owner, label, probe
        self.masters = MasterWeights(module)
        self.device = self.masters.parameters[0].device
        self.optimizer = make_optimizer(self.masters.parameters, config)
        self.balancer = RouterBalancer(module, config.router_bias_rate)
        self.step = 0
        self.counters: dict[str, Any] = {"tokens": 0, "skipped_steps": 0, "bad_steps_in_a_row": 0}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: module, optimiser, random numbers, counts and data position.

        Raises:
            UserError: the checkpoint belongs to another task, backbone or shape of heads.
        """
        for key, value in self.owner.items():
            if checkpoint.owner.get(key) != value:
                raise UserError(
                    f"resume=auto: {checkpoint.folder} belongs to {key}={checkpoint.owner.get(key)} and this run has "
                    f"{key}={value}; choose another output_dir"
                )
        load_module(self.module, checkpoint)
        self.masters.load(checkpoint.tensors())
        training = checkpoint.training()
        self.optimizer.load_state_dict(training["optimizer"])
        torch.set_rng_state(training["torch_rng"])
        if "cuda_rng" in training and torch.cuda.is_available():
            torch.cuda.set_rng_state(training["cuda_rng"])
        self.step = checkpoint.step
        self.counters = dict(checkpoint.counters)

    def save(self, name: str | None = None) -> Path:
        """Write this step's checkpoint, under the step's name unless another is given, and prune older ones."""
        folder = self.checkpoints / (name or checkpoint_name(self.step))
        save_checkpoint(folder, self.step, self.masters.tensors(), self.optimizer, self.owner, dict(self.counters))
        prune_checkpoints(self.checkpoints, self.config.keep_checkpoints)
        return folder

    def train_step(self) -> tuple[Tensor, list[Outcome], float]:
        """One optimiser step; a non-finite loss or gradient skips the update and is counted.

        Returns:
            counts_K, the outcomes of the micro-batches, and the gradient norm before clipping.
        Raises:
            UserError: `train.max_bad_steps` steps in a row were not finite.
        """
        config = self.config
        first = self.step * config.accumulation
        batches = [self.batches.batch(first + i).to(self.device) for i in range(config.accumulation)]
        counts_K = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        outcomes = []
        for batch in batches:
            outcome = self.objective(batch, counts_K)
            outcome.loss.backward()
            outcomes.append(outcome)
        self.masters.pull_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters.parameters, config.clip_norm)
        finite = math.isfinite(norm.item()) and all(math.isfinite(outcome.loss.item()) for outcome in outcomes)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
            self.optimizer.step()
            self.masters.push()
            self.counters["bad_steps_in_a_row"] = 0
        else:
            self._count_bad_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        self.step += 1
        self.counters["tokens"] += sum(int((batch.segment_BS > 0).sum()) for batch in batches)
        return counts_K, outcomes if finite else [], norm.item()

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
        """Train until `train.steps`, with progress, metrics and checkpoints."""
        self.module.train()
        totals, logged_at, tokens_at = Totals(), time.monotonic(), self.counters["tokens"]
        with Progress(self.label, self.config.steps, self.step) as progress:
            while self.step < self.config.steps:
                before = self.counters["tokens"]
                counts_K, outcomes, norm = self.train_step()
                if outcomes:
                    totals.add(counts_K, outcomes)
                progress.update(self.step, _figures(totals), self.counters["tokens"] - before)
                if self._is_due(self.config.log_every):
                    now = time.monotonic()
                    speed = (self.counters["tokens"] - tokens_at) / max(now - logged_at, 1e-9)
                    rate = learning_rate(self.step - 1, self.config)
                    extra = {"gradient_norm": norm, "learning_rate": rate, "tokens_per_second": speed}
                    log.write(self.step, {**totals.means(), **extra, **self.counters})
                    totals, logged_at, tokens_at = Totals(), now, self.counters["tokens"]
                if self.probe is not None and self._is_due(self.probe.every):
                    self._measure(self.probe, log)
                if self._is_due(self.config.checkpoint_every):
                    self.save()
        self.module.eval()
        if self.counters["skipped_steps"]:
            print(f"{self.counters['skipped_steps']} steps were skipped: not finite", file=sys.stderr)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _measure(self, probe: Probe, log: MetricsLog) -> None:
        metrics = probe.measure()
        log.write(self.step, metrics)
        if metrics[probe.score] > self.counters.get("best_score", -math.inf):
            self.counters.update(best_score=metrics[probe.score], best_step=self.step)
            self.save(BEST)


def _figures(totals: Totals) -> str:
    """Loss of the first step, and acceptance of every step where it is measured."""
    means = totals.means()
    parts = [f"loss {means['loss/step_1']:.3f}"] if "loss/step_1" in means else []
    alphas = [f"{value:.3f}" for name, value in means.items() if name.startswith("alpha/")]
    if alphas:
        parts.append("acceptance " + "/".join(alphas))
    return "  ".join(parts)
