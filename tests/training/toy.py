"""A training of a toy model, small and on numbered batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtptrain.batch import Batch
from mtptrain.config import MtpMode, TrainConfig
from mtptrain.data.batches import BatchSource
from mtptrain.losses.next_token import LossOutput
from mtptrain.run.tracking import MetricsLog, Trackers
from mtptrain.training.checkpoint import HeadIdentity
from mtptrain.training.data_parallel import ReplicatedEngine
from mtptrain.training.trainer import Trainer

# B rows, S tokens a row, V vocabulary, K draft steps

V, S = 11, 7
IDENTITY = HeadIdentity(
    task="distill",
    backbone="ab" * 32,
    mode=MtpMode.shared,
    depth=1,
    steps=3,
    start={"init": "stock", "sha256": "cd" * 32},
    quant_aware=None,
    data="ef" * 32,
    settings={"mtp.mode": "shared", "train.learning_rate": 0.05},
)
CONFIG = TrainConfig(
    steps=9, batch_size=2, learning_rate=0.05, warmup_steps=3, log_every=3, checkpoint_every=1, keep_checkpoints=99
)


class ToyModel(nn.Module):
    """Next-token scores from the token alone, with dropout so that the random state matters."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 13)
        self.norm = nn.LayerNorm(13)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(13, V)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.embed(tokens_BS))))


class ToyObjective:
    """Cross-entropy whose loss is NaN for the batches in `bad_batches`."""

    def __init__(self, model: nn.Module, bad_batches: frozenset[int] = frozenset()) -> None:
        self.model, self.bad_batches = model, bad_batches

    def counts(self, batch: Batch) -> Tensor:
        return batch.target_mask(0).sum().double().unsqueeze(0)

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        mask_BS = batch.target_mask(0)
        targets = batch.tokens_BS.roll(-1, dims=1)[mask_BS]
        nats = nn.functional.cross_entropy(self.model(batch.tokens_BS)[mask_BS].float(), targets, reduction="none")
        if int(batch.position_BS[0, -1]) in self.bad_batches:
            nats = nats * torch.nan
        return LossOutput(nats.sum() / counts_K[0].float(), {"loss": nats.detach().sum().double().unsqueeze(0)})


class ToyBatches(BatchSource):
    """Numbered rows of different lengths, t -> 3t + 2 mod V; the last position, in padding, is the batch number."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def batch(self, index: int) -> Batch:
        """Return rows `index * rows` onward, so that a smaller batch size splits the same rows more finely."""
        tokens, segments = [], []
        for row in range(index * self.rows, (index + 1) * self.rows):
            numbers = [row % V]
            while len(numbers) < S:
                numbers.append((3 * numbers[-1] + 2) % V)
            tokens.append(torch.tensor(numbers))
            segments.append((torch.arange(S) < 2 + row % (S - 2)).long())
        position_BS = torch.arange(S).repeat(self.rows, 1)
        position_BS[:, -1] = index
        return Batch(torch.stack(tokens), torch.stack(segments), position_BS)


def toy_trainer(
    folder: Path,
    config: TrainConfig = CONFIG,
    bad_batches: frozenset[int] = frozenset(),
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
) -> Trainer:
    torch.manual_seed(0)
    model = ToyModel(dropout).to(dtype)
    objective, batches = ToyObjective(model, bad_batches), ToyBatches(config.batch_size)
    return Trainer(ReplicatedEngine(model, config), objective, batches, config, folder / "checkpoints", IDENTITY)


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    assert isinstance(trainer.engine, ReplicatedEngine)
    return trainer.engine.optimizers[0]


class MemoryLog(MetricsLog):
    """Keeps the metrics rows in memory."""

    def __init__(self) -> None:
        super().__init__(None, Trackers())
        self.rows: list[dict[str, Any]] = []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append({"step": step, **metrics})


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}


def equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())
