"""The shifted target control: a head's drafts must not agree with a text that its input does not hold yet.

Each text is cut at one position of its continuation and goes on as another text from the same position on. A draft for
that position has read only its own text, so to it one other text is as good as another: the futures were dealt at
random, and the agreement with them must look like that of any other dealing of the same futures. The control counts
the random dealings that agree at least as much. This is a randomisation test: its p-value is exact for every head and
every set of texts, however alike they are, because only the dealing is assumed to be random.

A high agreement means that drafts depend on tokens which a server does not have yet. The acceptance is then too high.
"""

# R texts cut at one position, S slots, K draft steps, V vocabulary, C dealings

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.batch import Batch
from mtptrain.evaluation.certificate_result import Outcome, ShiftedTargetControl
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import Rollout, trace_batch
from mtptrain.run.progress import counted
from mtptrain.traces.file import Trace

LEVEL = 1e-5  # false alarms of one head: evaluations run often, and each costs trust
MOST_DEALINGS = 99_999  # none of them agreeing as much gives p = 1e-5
FEWEST_DEALINGS, ENOUGH = 100, 10  # drawing ends once so many agree as much, and doubles the dealings until then
MAX_TEXTS, MAX_ROWS = 32, 64  # texts, and rows of all splices together, that a control reads


@dataclass(frozen=True, slots=True)
class Splice:
    """Texts that go on as other texts from one position on.

    Attributes:
        position: m; the continuation's token m is the first of the other text.
        rows: numbers of the texts, int64 [R].
        futures: for each row the row whose text it goes on with, int64 [R], a permutation without fixed points.
    """

    position: int
    rows: np.ndarray
    futures: np.ndarray


@dataclass(frozen=True, slots=True)
class Matches:
    """Drafts of a splice compared with all of its futures.

    Attributes:
        count_RR: steps of row i that drafted the token of row j, int64.
        futures: see `Splice`.
        drafted: drafted tokens of all rows.
    """

    count_RR: np.ndarray
    futures: np.ndarray
    drafted: int


def plan_splices(texts: list[list[int]], generator: np.random.Generator) -> list[Splice]:
    """Return splices at the positions where the texts differ most, up to `MAX_ROWS` rows.

    Args:
        texts: continuations.
        generator: source of all randomness.
    """
    longest = max((len(text) for text in texts), default=0)
    cuts = {m: np.array([row for row, text in enumerate(texts) if len(text) > m]) for m in range(1, longest)}
    chances = {m: _same_dealing([texts[row][m] for row in rows]) for m, rows in cuts.items()}
    splices: list[Splice] = []
    room = MAX_ROWS
    # Positions that differ alike are taken in random order: the sort is stable.
    for m in sorted((generator.permutation(longest - 1) + 1).tolist() if longest > 1 else [], key=chances.__getitem__):
        size = len(cuts[m])
        if chances[m] < 1 and size <= room:
            splices.append(Splice(m, cuts[m], derangements(generator, 1, size)[0]))
            room -= size
    return splices


def is_tested(texts: list[list[int]], splices: list[Splice]) -> bool:
    """Return whether the texts differ enough for a head that reads its target to fail at `LEVEL`."""
    chance = math.prod(_same_dealing([texts[row][one.position] for row in one.rows]) for one in splices)
    return chance <= LEVEL


def _same_dealing(tokens: list[int]) -> float:
    """Return a bound on the chance that two dealings without fixed points give every row the same token; at most 1."""
    size = len(tokens)
    if size < 3:
        return 1.0
    count = round(math.factorial(size) / math.e)  # permutations of `size` without fixed points
    return min(1.0, math.prod(math.factorial(copies) for copies in Counter(tokens).values()) / count)


def derangements(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return random permutations without fixed points, each as likely as another, int64 [count, size]; size >= 2."""
    deranged = np.empty((0, size), dtype=np.int64)
    while len(deranged) < count:
        drawn = generator.random((3 * (count - len(deranged)) + 8, size)).argsort(1)
        deranged = np.concatenate([deranged, drawn[(drawn != np.arange(size)).all(1)]])
    return deranged[:count]


@torch.inference_mode()
def draft_splice(
    model: DeepseekV4ForCausalLM,
    stacks: Mapping[str, MtpStack],
    traces: list[Trace],
    splice: Splice,
    steps: int,
    draft: Rollout = rollout,
) -> dict[str, np.ndarray]:
    """Return every head's drafts of the token at the splice, int64 [R, min(K, m)]: no pass begins before the text.

    Args:
        model: the backbone.
        stacks: heads by name.
        traces: the texts that the splice numbers.
        splice: the cut.
        steps: draft steps K.
        draft: the rollout, or one with a fault, to show that the control finds it.
    """
    cut = splice.position
    own = [traces[row] for row in splice.rows]
    spliced = [
        replace(trace, tokens=trace.tokens[:cut] + own[future].tokens[cut:])
        for trace, future in zip(own, splice.futures, strict=True)
    ]
    batch = trace_batch(spliced, model.lm_head.weight.device)
    streams_BSND, _ = run_backbone(model, batch.tokens_BS)
    slot_R = torch.tensor([len(trace.prompt.tokens) + cut for trace in own], device=batch.tokens_BS.device)
    return {
        name: _drafts_at(model, stack, streams_BSND, batch, slot_R, min(steps, cut), draft)
        for name, stack in stacks.items()
    }


def _drafts_at(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    streams_BSND: Tensor,
    batch: Batch,
    slot_R: Tensor,
    steps: int,
    draft: Rollout,
) -> np.ndarray:
    """Return each step's draft of the token at a slot of every row, int64 [R, K]."""
    states = draft(stack, model.model.embed_tokens, streams_BSND, batch, steps)
    row_R = torch.arange(len(slot_R), device=slot_R.device)
    # Step k at anchor i drafts token i + k + 1.
    hidden = [state_BSD[row_R, slot_R - step - 1] for step, state_BSD in enumerate(states, start=1)]
    logits_RKV = model.lm_head(torch.stack(hidden, dim=1).to(model.lm_head.weight.dtype))
    return logits_RKV.argmax(-1).cpu().numpy()


def match(drafts_RK: np.ndarray, splice: Splice, texts: list[list[int]]) -> Matches:
    """Compare the drafts of every row with the tokens of all rows at the splice."""
    token_R = np.array([texts[row][splice.position] for row in splice.rows])
    count_RR = np.equal(drafts_RK[:, :, None], token_R).sum(1)
    return Matches(count_RR, splice.futures, drafts_RK.size)


def p_value(matches: list[Matches], generator: np.random.Generator) -> float:
    """Return the share of random dealings that agree with the drafts at least as much as the actual one.

    Dealings are drawn until ten agree as much, and at most `MOST_DEALINGS`; the actual one is counted among them.

    Source: Besag and Clifford 1991, Sequential Monte Carlo p-values.
    """
    actual = sum(int(_dealt(one, one.futures[None])[0]) for one in matches)
    as_much, drawn = 0, 0
    while drawn < MOST_DEALINGS and as_much < ENOUGH:
        count = min(max(FEWEST_DEALINGS, drawn), MOST_DEALINGS - drawn)
        agreed_C = sum(_dealt(one, derangements(generator, count, len(one.futures))) for one in matches)
        as_much += int(np.count_nonzero(agreed_C >= actual))
        drawn += count
    return (as_much + 1) / (drawn + 1)


def _dealt(matches: Matches, futures_CR: np.ndarray) -> np.ndarray:
    """Return the drafted tokens that agree under each dealing, int64 [C]."""
    return matches.count_RR[np.arange(len(matches.count_RR)), futures_CR].sum(1)


def judge(matches: list[Matches], positions: list[int], generator: np.random.Generator) -> ShiftedTargetControl:
    """Return the control of one head from the drafts of all splices, at `positions`."""
    drafted = sum(one.drafted for one in matches)
    own = sum(int(one.count_RR.trace()) for one in matches)
    others = sum(float((one.count_RR.sum() - one.count_RR.trace()) / (len(one.futures) - 1)) for one in matches)
    dealt = sum(int(_dealt(one, one.futures[None])[0]) for one in matches)
    chance = p_value(matches, generator)
    return ShiftedTargetControl(
        outcome=Outcome.passed if chance > LEVEL else Outcome.failed,
        texts=max(len(one.futures) for one in matches),
        positions=positions,
        drafted=drafted,
        agreement=own / drafted,
        shifted=dealt / drafted,
        chance=others / drafted,
        p_value=chance,
        level=LEVEL,
    )


def not_tested(texts: int) -> ShiftedTargetControl:
    """Return the control of texts that are too few or too much alike."""
    return ShiftedTargetControl(
        outcome=Outcome.not_tested,
        texts=texts,
        positions=[],
        drafted=0,
        agreement=None,
        shifted=None,
        chance=None,
        p_value=None,
        level=LEVEL,
    )


def text_generator(texts: list[list[int]]) -> np.random.Generator:
    """Return a source of randomness that depends on the texts alone, so that an evaluation can be repeated."""
    return np.random.default_rng([len(texts), *(token for text in texts for token in text)])


def shifted_target_control(
    model: DeepseekV4ForCausalLM,
    stacks: Mapping[str, MtpStack],
    traces: list[Trace],
    steps: int,
    draft: Rollout = rollout,
) -> dict[str, ShiftedTargetControl]:
    """Return the control of every head; `not tested` if the texts are too few or too much alike.

    Args:
        model: the backbone.
        stacks: heads by name.
        traces: texts of the backbone; the first 32 are used.
        steps: draft steps K.
        draft: the rollout, or one with a fault, to show that the control finds it.
    """
    used = traces[:MAX_TEXTS]
    texts = [trace.tokens for trace in used]
    generator = text_generator(texts)
    splices = plan_splices(texts, generator)
    if not is_tested(texts, splices):
        return {name: not_tested(len(used)) for name in stacks}
    matches: dict[str, list[Matches]] = {name: [] for name in stacks}
    for splice in counted("control: drafting at shifted targets", splices):
        for name, drafts_RK in draft_splice(model, stacks, used, splice, steps, draft).items():
            matches[name].append(match(drafts_RK, splice, texts))
    positions = [splice.position for splice in splices]
    return {name: judge(of_head, positions, generator) for name, of_head in matches.items()}
