"""The inputs of a measurement: a head and its teacher-forced figures, and the prompts and policy as results."""

# K draft steps, T targets

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.config import DraftChoice, LossConfig, ServedAs
from mtptrain.data.packing import pack_corpus, split_rows, spread_rows
from mtptrain.data.passages import FOUND, PassageHasher, Passages, prompt_digest
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.head_result import ChosenOn, SeenPrompts, TeacherForced
from mtptrain.evaluation.result import PolicyResult, PromptsResult
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.stack import MtpStack
from mtptrain.traces.file import TraceSet
from mtptrain.training.selection import Selection


@dataclass(frozen=True, slots=True)
class Head:
    """A head under measurement.

    Attributes:
        name: `stock` or `trained`.
        checkpoint: folder of the checkpoint, or `stock`.
        mode: `shared` or `stacked`.
        stack: its modules, in eval mode.
        passages: of the text that it was trained on; None if unknown.
        selection: how it was chosen as the best of its run; None if it was not, or this is unknown.
        backbone: fingerprint of its backbone; None if the head was not loaded but has just been trained.
    """

    name: str
    checkpoint: str
    mode: str
    stack: MtpStack
    passages: Passages | None = None
    selection: Selection | None = None
    backbone: str | None = None

    def __repr__(self) -> str:
        size = f"{self.mode}, depth {self.stack.depth}, {self.num_parameters / 1e6:.2f} M parameters"
        return f"<Head {self.name}: {size}, from {self.checkpoint}>"

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all modules."""
        return sum(p.numel() for p in self.stack.parameters())


@torch.no_grad()
def teacher_forced(
    model: DeepseekV4ForCausalLM, stack: MtpStack, corpus: TokenizedCorpus, row_length: int, max_rows: int, steps: int
) -> TeacherForced:
    """Return the acceptance sum_v min(p, q) and the share of top-1 matches on a corpus, by draft step.

    Args:
        model: the backbone.
        stack: the modules.
        corpus: held-out documents.
        row_length: tokens a row.
        max_rows: rows used, spread evenly over the corpus.
        steps: draft steps K.
    """
    rows = spread_rows(pack_corpus(corpus, row_length), max_rows)
    objective = RolloutObjective(model, stack, LossConfig(), steps)
    counts_K = torch.zeros(steps, dtype=torch.float64)
    alpha_K, top1_match_K = counts_K.clone(), counts_K.clone()
    for batch in split_rows(corpus.tokens, rows, row_length):
        result, _ = objective.per_token(batch.to(model.lm_head.weight.device))
        counts_K += objective.counts(batch)
        alpha_K += result.alpha_KT.double().sum(1).cpu()
        top1_match_K += result.top1_match_KT.double().sum(1).cpu()
    tokens = [int(count) for count in counts_K]
    alpha, top1 = (
        [total / count if count else None for total, count in zip(totals, tokens, strict=True)]
        for totals in (alpha_K.tolist(), top1_match_K.tolist())
    )
    return TeacherForced(alpha, top1, tokens)


def heldout_figures(forced: TeacherForced) -> dict[str, float]:
    """Return the figures on held-out text by name, as metrics of a training step; not a number without tokens."""
    by_name = {"alpha": forced.alpha, "top1_match": forced.top1}
    return {
        f"heldout/{name}_{k}": math.nan if value is None else value
        for name, values in by_name.items()
        for k, value in enumerate(values, start=1)
    }


def count_seen(passages: Passages | None, hasher: PassageHasher, prompts: list[list[int]]) -> SeenPrompts | None:
    """Return the number of prompts at least half of whose passages were trained on; None if no passages are known.

    Args:
        passages: of a head's training text.
        hasher: hashes the prompts.
        prompts: token ids.
    """
    if passages is None:
        return None
    shares = [share for tokens in prompts if (share := passages.share_of(hasher.prompt(tokens))) is not None]
    return SeenPrompts(prompts=len(prompts), checked=len(shares), seen=sum(share >= FOUND for share in shares))


def count_chosen(selection: Selection | None, prompts: list[list[int]]) -> ChosenOn | None:
    """Return how many prompts chose a head as the best of its run; None if it was not chosen.

    Args:
        selection: of the head's checkpoint.
        prompts: token ids.
    """
    if selection is None:
        return None
    used = set(selection.prompts)
    shared = sum(prompt_digest(tokens) in used for tokens in prompts)
    return ChosenOn(prompts=len(prompts), shared=shared, by=selection.by)


def describe_prompts(traces: TraceSet) -> PromptsResult:
    """Return the origin and the size of a trace set."""
    return PromptsResult(
        source=", ".join(source.name for source in traces.header.sources),
        sources=traces.header.sources,
        count=len(traces.traces),
        conversations=len({trace.prompt.group for trace in traces.traces}),
        dropped_turns=traces.header.dropped,
        prompt_tokens=max(len(trace.prompt.tokens) for trace in traces.traces),
        new_tokens=traces.header.max_new_tokens,
    )


def describe_policy(policy: Policy, served_as: ServedAs) -> PolicyResult:
    """Return a policy and the numerics of the heads as a result stores them; greedy decoding drafts greedily."""
    return PolicyResult(
        temperature=policy.temperature,
        top_k=policy.top_k,
        top_p=policy.top_p,
        draft=DraftChoice.greedy if policy.draws_greedily else policy.draft,
        verification=policy.verification,
        min_confidence=policy.min_confidence,
        min_p=policy.min_p,
        repetition_penalty=policy.penalties.repetition,
        frequency_penalty=policy.penalties.frequency,
        presence_penalty=policy.penalties.presence,
        past_depth=policy.past_depth,
        served_as=served_as,
    )
