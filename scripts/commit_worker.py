"""One side of `benchmark_commits.py`: does the work that it reads from standard input with the commit on its path.

python scripts/commit_worker.py INPUTS.pt

Prompts and training batches come from a file, so both commits get the same. A line names a piece of work; the answer is
a line of JSON. `named` lists the places of a name at all commits: old ones last.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtptrain.backbone.decode import prefill
from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig, LossConfig, TrainConfig
from mtptrain.config.choices import EngineName
from mtptrain.data.batches import BatchSource
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.stack import stack_from_tensors

# B rows, L tokens of a pass

PROMPT_TOKENS, NEW_TOKENS, DRAFTED = 96, 64, 4
PASSES, STEPS = 10, 3  # a turn
TRAINING = {"steps": 300, "batch_size": 4, "learning_rate": 4e-3, "warmup_steps": 20}  # `+recipe=distill` at b47bb27
TRACES = ("mtptrain.backbone.traced", "mtptrain.decoding.traced")
TRAINED_STEPS = 3  # draft steps of the training rollout


def named(*places: str) -> Any:
    """Return the first of some `module:name` that this commit has.

    Raises:
        ImportError: it has none.
    """
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(import_module(f"mtptrain.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this commit has none of {', '.join(places)}")


Limits = named("decoding.results:Limits", "decoding.records:Limits")
MtpProposer = named("decoding.draft:MtpProposer", "decoding.draft:Drafter")
Batch = named("batch:Batch", "data.packing:Batch")
Trainer = named("training.trainer:Trainer", "trainer:Trainer")
make_engine = named("training.engine:make_engine", "engines.engine:make_engine")
place_on_device = named("mtp.start:place", "mtp.initial:place")
stock_tensors = named("mtp.start:stock_tensors", "mtp.initial:stock_tensors")
verify_step = named("decoding.steps:verify_step", "decoding.captured:captured_verify")


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count it."""
        out = operator(*args, **(kwargs or {}))
        given, made = (
            {tensor.untyped_storage().data_ptr() for tensor in tensors(values)}
            for values in ([*args, *(kwargs or {}).values()], [out])
        )
        name = operator.overloadpacket.__name__
        if name.endswith("_") or "out" in (kwargs or {}) or not made <= given:
            self.counts[name] += 1
        return out

    def figures(self) -> dict[str, float]:
        """Return the number of all launches and of those that copy."""
        copies = ("copy_", "clone", "_to_copy", "cat", "stack", "index_copy", "_foreach_copy_")
        return {"all": self.counts.total(), "copies": sum(self.counts[name] for name in copies)}


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operator, lists of tensors included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


class Clocks:
    """Seconds on the clock and of the processor, over the blocks run within."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self.wall -= time.perf_counter()
        self.processor -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.processor += time.process_time()


class TimedProposer:
    """A proposer with a clock on its drafts."""

    def __init__(self, proposer: Any, context: Any) -> None:
        self.proposer, self.context, self.drafts = proposer, context, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def draft(self, u_BK: Tensor | None) -> Any:
        """Return the proposer's draft."""
        self.drafts += 1
        with self.context:
            return self.proposer.draft(u_BK)


class GivenBatches(BatchSource):
    """Batches that were packed before."""

    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        self.batches = batches

    def batch(self, index: int) -> Any:
        """Return batch `index`; they repeat."""
        return Batch(*self.batches[index % len(self.batches)])


class Worker:
    """All work of one side.

    Args:
        inputs: `folder` of the backbone, `prompts` of one length, and training `batches` as tensors.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.prompts, self.turns = inputs["prompts"], Counter[str]()
        config = BackboneConfig(path=inputs["folder"])
        backbone = load_backbone(config, torch.device("cpu"), torch.float32)
        self.model = backbone.model
        stock = stock_tensors(backbone)
        self.stack, trained = (
            place_on_device(stack_from_tensors(self.model.config, 1, dict(stock), "stock"), backbone) for _ in range(2)
        )
        self.stack.eval()
        training = TrainConfig(**TRAINING)
        objective = RolloutObjective(self.model, trained.train(), LossConfig(), TRAINED_STEPS)
        engine = make_engine(EngineName.single, trained, training)
        self.trainer = Trainer(engine, objective, GivenBatches(inputs["batches"]), training, Path(), {})
        self.cache = allocate_cache(self.model, 1, PROMPT_TOKENS + 4 * (DRAFTED + 1), DRAFTED + 1)
        with torch.inference_mode():
            for _ in prefill(self.model, self.cache, torch.tensor(self.prompts[:1]), [PROMPT_TOKENS]):
                pass
            self.length_B, self.tokens_BL = self.cache.length_B.clone(), torch.tensor([self.prompts[1][: DRAFTED + 1]])
        self.verify = verify_step(self.model, self.cache)

    def run(self, work: str) -> dict[str, Any]:
        """Do a piece of work, and return its seconds and units, and its outcome if both sides must agree in it."""
        self.turns[work] += 1
        clocks = Clocks()
        name, _, batch = work.partition(" ")
        units, outcome = getattr(self, name)(clocks, *([int(batch)] if batch else []))
        return {"wall": clocks.wall, "processor": clocks.processor, "units": units, "outcome": outcome}

    def plain(self, clocks: Any, batch: int) -> tuple[int, object]:
        """Decode plainly; the unit is a token."""
        first = self.turns[f"plain {batch}"] % (len(self.prompts) - batch + 1)
        with clocks:
            rows = decode_speculative(self.model, None, self.prompts[first : first + batch], 0, Limits(NEW_TOKENS)).rows
        return batch * NEW_TOKENS, [row.tokens for row in rows]

    @torch.inference_mode()
    def passes(self, clocks: Any) -> tuple[int, object]:
        """Run verify passes; the unit is a pass."""
        for _ in range(PASSES):
            with clocks:
                _, logits_BLV = self.verify(self.tokens_BL)
            self.cache.rewind(self.length_B)
        return PASSES, logits_BLV.argmax(-1).tolist()

    def drafts(self, clocks: Any, new_tokens: int = NEW_TOKENS // 4) -> tuple[int, object]:
        """Decode speculatively, with a clock on the drafts; the unit is a draft."""
        proposer = TimedProposer(MtpProposer(self.model, self.stack), clocks)
        prompt = self.prompts[self.turns["drafts"] % len(self.prompts)]
        rows = decode_speculative(self.model, proposer, [prompt], DRAFTED, Limits(new_tokens)).rows
        return proposer.drafts, [row.tokens for row in rows]

    def steps(self, clocks: Any, count: int = STEPS) -> tuple[int, object]:
        """Train; the unit is a token of text."""
        before, losses = self.trainer.counters["tokens"], []
        for _ in range(count):
            with clocks:
                step = self.trainer.train_step()
            losses.append((step.sums_K["loss"] / step.counts_K).tolist())
        return self.trainer.counters["tokens"] - before, losses

    def launches(self, _: object) -> tuple[int, object]:
        """Count the launches of a verify pass, of a draft and of a training step, before anything is recorded."""
        with getattr(traced(), "repeated", nullcontext)(1):  # nothing is recorded while it is counted
            return 1, self._launches()

    def _launches(self) -> dict[str, dict[str, float]]:
        figures: dict[str, dict[str, float]] = {}
        with torch.inference_mode(), Launches() as counter:
            self.verify.function(self.tokens_BL)
        figures["verify pass"] = counter.figures()
        self.cache.rewind(self.length_B)
        counter = Launches()
        drafts, _texts = self.drafts(counter, 8)
        figures["draft"] = {name: count / drafts for name, count in counter.figures().items()}
        with Launches() as counter:
            self.steps(nullcontext(), 1)
        figures["training step"] = counter.figures()
        return figures


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # a print of the library is no answer
    with suppress(ImportError):
        named("run.memory:keep_freed_memory")()  # as a training does
    worker = Worker(torch.load(sys.argv[1]))
    expecting: Callable[[int], Any] = getattr(traced(), "repeated", nullcontext)
    with expecting(getattr(traced(), "BREAK_EVEN", 0)):
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(worker.run(line.strip())), file=answers, flush=True)


def traced() -> Any:
    """Return the module of traces, None at commits before it."""
    return next((import_module(name) for name in TRACES if find_spec(name)), None)


if __name__ == "__main__":
    main()
