"""A training step on packed documents against the definition of the objective, in float64 (`definition`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.batch import Batch
from mtptrain.config import LossConfig, TrainConfig
from mtptrain.config.choices import LossName
from mtptrain.data.batches import PackedBatches
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.losses.next_token import NextTokenObjective
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.fake_quantization import rows_by_tensor
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.mtp.start import freeze_untrained
from mtptrain.release.modules import from_release, to_release
from mtptrain.release.names import Scheme
from mtptrain.training.checkpoint import BackboneIdentity
from mtptrain.training.trainer import MetricTotals, Step, Trainer
from tests.losses.definition import Drafts, Expected, Known, Piece, Settings, cut, draft, in_float64, objective, read
from tests.tiny import random_backbone, random_stack

ROW_LENGTH = 11
LENGTHS = [1, 3, 5, 9, 14, 2, 7]  # the fifth is cut into 11 and 4; the first has no target at all
SMALL = {
    "vocab_size": 11,
    "hidden_size": 16,
    "head_dim": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "index_head_dim": 8,
    "moe_intermediate_size": 8,
    "hc_sinkhorn_iters": 2,
    "sliding_window": 4,  # so short that every document but the shortest outgrows it
}
HEADS = {
    "shared": (1, 3),
    "one_step": (1, 1),
    "stacked": (3, 3),
    "stacked_and_repeated": (2, 4),
}  # modules, draft steps
# fp32 rounding through a layer whose activations are of order 10, relative to the largest entry.
TOLERANCE = 2e-4


Gradients = dict[str, Tensor | None]  # by tensor of the head


class RecordingEngine:
    """Adds up gradients and updates nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.loss = 0.0

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.loss += loss.item()

    def step(self, rate: float) -> float:
        return 1.0


class World(NamedTuple):
    """A backbone, a head and what the definition knows of them."""

    model: DeepseekV4ForCausalLM
    stack: MtpStack
    steps: int
    exact: MtpStack
    pieces: list[Piece]
    drafts: list[Drafts]


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(SMALL["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def masks(is_masked: bool) -> list[list[bool]] | None:
    """Conversations, with prompts of one or two tokens before answers of three to six, and a text; or no mask."""
    if not is_masked:
        return None
    generator = np.random.default_rng(7)
    sizes = [np.stack([generator.integers(1, 3, 9), generator.integers(3, 7, 9)], 1).ravel() for _ in LENGTHS]
    runs = [np.repeat(np.arange(18) % 2 == 1, size) for size in sizes]
    return [run[:length].tolist() for run, length in zip(runs[:-1], LENGTHS, strict=False)] + [[True] * LENGTHS[-1]]


@cache
def backbone() -> DeepseekV4ForCausalLM:
    return random_backbone(**SMALL)


@cache
def world(head: str, is_masked: bool) -> World:
    depth, steps = HEADS[head]
    model, stack = backbone(), random_stack(backbone(), depth)
    allowed = masks(is_masked) or [[True] * length for length in LENGTHS]
    pieces = [
        read(model, list(tokens), list(mask))
        for text, may in zip(documents(), allowed, strict=True)
        for tokens, mask in zip(cut(text, ROW_LENGTH), cut(may, ROW_LENGTH), strict=True)
    ]
    exact = in_float64(stack)
    return World(model, stack, steps, exact, pieces, [draft(model, exact, piece, steps) for piece in pieces])


def expected(of: World, *several: Settings) -> list[tuple[Expected, Gradients]]:
    """The definition's step under each of several settings, and its gradient by tensor.

    All gradients run back through the drafts together, which takes a tenth of the time.
    """
    known: Known = {}
    steps = [objective(of.pieces, of.drafts, of.steps, settings, known) for settings in several]
    logits = [logits_V for drafts in of.drafts for logits_V in drafts.values()]
    grad = partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    at_logits = zip(*(grad(step.loss, logits, materialize_grads=True) for step in steps), strict=True)
    parameters = dict(of.exact.named_parameters())
    together = grad(logits, list(parameters.values()), [torch.stack(one) for one in at_logits], is_grads_batched=True)
    return [
        (step, {name: None if one is None else one[i] for name, one in zip(parameters, together, strict=True)})
        for i, step in enumerate(steps)
    ]


@cache
def expected_by_settings(head: str, is_masked: bool, several: tuple[Settings, ...]) -> Mapping[Settings, Any]:
    """Return `expected` of a world."""
    return dict(zip(several, expected(world(head, is_masked), *several), strict=True))


@cache
def streams_of(tokens: tuple[int, ...]) -> Tensor:
    return read(backbone(), list(tokens)).streams.float()


class CachedBatches(PackedBatches):
    """Batches that bring the backbone's streams along, as a cache on disk does."""

    def batch(self, index: int) -> Batch:
        batch = super().batch(index)
        streams_BSND = torch.zeros(*batch.tokens_BS.shape, 2, SMALL["hidden_size"])
        for row, number in itertools.product(range(len(batch.tokens_BS)), range(1, ROW_LENGTH)):
            slots = batch.segment_BS[row] == number
            if slots.any():
                streams_BSND[row, slots] = streams_of(tuple(batch.tokens_BS[row, slots].tolist()))
        return replace(batch, streams_BSND=streams_BSND)


def batches(is_masked: bool, source: type[PackedBatches] = PackedBatches) -> PackedBatches:
    """Four rows, which two micro-batches of two read once each."""
    allowed = masks(is_masked)
    mask = None if allowed is None else np.concatenate([np.array(one, bool) for one in allowed])
    tokens, offsets = np.concatenate([np.array(one, np.int32) for one in documents()]), np.cumsum([0, *LENGTHS])
    packed = source(TokenizedCorpus(tokens, offsets, 0, mask), ROW_LENGTH, 2, seed=3)
    assert len(packed.order.rows) == 4, "one step must read every row once"
    return packed


def train(
    of: World, settings: Settings, is_masked: bool, source: type[PackedBatches] = PackedBatches, **options: object
) -> tuple[Step, float, Gradients]:
    """One optimiser step on all documents, in two micro-batches of two rows: counts and sums, loss, gradients."""
    of.stack.zero_grad()
    loss = LossConfig(
        divergence=LossName(settings.divergence),
        temperature=settings.temperature,
        step_decay=settings.step_decay,
        scale=settings.scale,
    )
    engine, config = RecordingEngine(of.stack), TrainConfig(batch_size=2, accumulation=2)
    head = RolloutObjective(of.model, of.stack, loss, of.steps, **options)
    identity = BackboneIdentity("test", "ab" * 32, {})
    step = Trainer(engine, head, batches(is_masked, source), config, Path("unused"), identity).train_step()
    return step, engine.loss, {name: parameter.grad for name, parameter in of.stack.named_parameters()}


def assert_equal(
    ours: tuple[Step, float, Gradients], of: World, settings: Settings, wanted: tuple[Expected, Gradients] | None = None
) -> None:
    (step, loss, gradients), (want, wanted_gradients) = ours, wanted or expected(of, settings)[0]
    assert step.counts_K.tolist() == want.counts
    assert loss == pytest.approx(want.loss.item(), rel=TOLERANCE)
    assert step.sums_K["top1_match"].tolist() == want.sums["top1_match"]
    for name in ("loss", "alpha"):
        assert step.sums_K[name].tolist() == pytest.approx(want.sums[name], rel=TOLERANCE)
    totals = MetricTotals()
    totals.add(step)
    for number, (total, count) in enumerate(zip(want.sums["alpha"], want.counts, strict=True), start=1):
        assert totals.means()[f"alpha/step_{number}"] == pytest.approx(total / max(count, 1), rel=TOLERANCE)
    for name, gradient in wanted_gradients.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any()
            continue
        atol = TOLERANCE * max(gradient.abs().max().item(), 1e-3 * settings.scale)
        torch.testing.assert_close(
            gradients[name].double(), gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(parameter.grad is None for parameter in of.model.parameters())


ODD = {"temperature": 0.6, "step_decay": 0.5, "scale": 0.3}
WITH_ODD = tuple(Settings(divergence.value, **ODD) for divergence in LossName)
COMBINATIONS = tuple(
    Settings(divergence.value, *rest)
    for divergence in LossName
    for rest in itertools.product((1.0, 0.6), (1.0, 0.5), (1.0, 0.3))
)


@pytest.mark.parametrize("divergence", LossName)
def test_every_combination_of_loss_settings_equals_the_definition(divergence: LossName) -> None:
    of, wanted = world("shared", True), expected_by_settings("shared", True, COMBINATIONS)
    of_it = [settings for settings in COMBINATIONS if settings.divergence == divergence.value]
    assert len(of_it) == 8
    for settings in of_it:
        assert_equal(train(of, settings, True, CachedBatches), of, settings, wanted[settings])


@pytest.mark.parametrize("divergence", LossName)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_and_loss_equals_the_definition(head: str, divergence: LossName) -> None:
    of, settings = world(head, False), Settings(divergence.value, **ODD)
    wanted = expected_by_settings(head, False, WITH_ODD)[settings]
    assert_equal(train(of, settings, False), of, settings, wanted)


@pytest.mark.parametrize("head", HEADS)
def test_recomputed_steps_equal_the_definition(head: str) -> None:
    of, settings = world(head, True), Settings("chain", **ODD)
    assert_equal(train(of, settings, True, CachedBatches, recompute=True), of, settings)


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8", "bf16"])
def test_quantisation_aware_training_equals_the_definition_on_the_exported_head(scheme: Scheme) -> None:
    of, settings = world("stacked_and_repeated", True), Settings("kl", **ODD)
    config = of.model.config
    exported = from_release(to_release(of.stack.state_dict(), config, scheme), config, torch.float32)
    exact = in_float64(stack_from_tensors(config, 2, exported, "here"))
    drafts = [draft(of.model, exact, piece, of.steps) for piece in of.pieces]
    ours = train(of, settings, True, CachedBatches, stored=rows_by_tensor(config, scheme))
    assert_equal(ours, of._replace(exact=exact, drafts=drafts), settings)


def test_frozen_tensors_get_no_gradient_and_the_others_that_of_the_definition() -> None:
    of, settings = world("stacked", True), Settings("tv", **ODD)
    frozen = copy.deepcopy(of.stack)
    freeze_untrained(frozen, "no_experts")
    step, loss, gradients = train(of._replace(stack=frozen), settings, True, CachedBatches)
    whole = train(of, settings, True, CachedBatches)[2]
    experts = {name for name in gradients if ".mlp.experts." in name}
    assert experts
    assert all(gradients[name] is None for name in experts)
    assert_equal((step, loss, {**gradients, **{name: whole[name] for name in experts}}), of, settings)


def test_next_token_training_equals_the_cross_entropy_of_every_document_alone() -> None:
    model = copy.deepcopy(backbone()).requires_grad_(True)
    engine, config = RecordingEngine(model), TrainConfig(batch_size=2, accumulation=2)
    step = Trainer(
        engine,
        NextTokenObjective(model),
        batches(True),
        config,
        Path("unused"),
        BackboneIdentity("test", "ab" * 32, {}),
    ).train_step()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    losses = []
    for piece in world("shared", True).pieces:
        log_q = model(input_ids=torch.tensor([piece.tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        losses += [-log_q[i, piece.tokens[i + 1]] for i in range(len(piece.tokens) - 1) if piece.allowed[i + 1]]
    mean = sum(losses) / len(losses)
    assert step.counts_K.tolist() == [len(losses)]
    assert engine.loss == pytest.approx(mean.item(), rel=TOLERANCE)
    assert step.sums_K["loss"].item() == pytest.approx(mean.item() * len(losses), rel=TOLERANCE)
    wanted = dict(zip(ours, torch.autograd.grad(mean, list(model.parameters()), allow_unused=True), strict=True))
    for name, gradient in wanted.items():
        if gradient is not None:
            atol = TOLERANCE * max(gradient.abs().max().item(), 1e-3)
            torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
