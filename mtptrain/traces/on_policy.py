"""The backbone's own texts: prompts continued in batches, and the texts as training documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mtptrain.backbone.load import Backbone
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits, StopStrings
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.mtp.stack import MtpStack
from mtptrain.run.artifact import find_parts, finish, total_counts
from mtptrain.traces.file import Source, Trace, TraceHeader
from mtptrain.traces.folder import PENALTIES, TEXTS, TextContent, TextIdentity, TextMaking
from mtptrain.traces.prompts import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that the backbone continues.

    Attributes:
        conversations: shortest prompt first, so that prompts of similar length are decoded together.
        sources: of the prompts.
        chat: renders their conversations.
        too_long: prompts left out because nothing could be emitted after them in the backbone's context.
        room: tokens that a prompt may have.
    """

    conversations: list[Conversation]
    sources: list[Source]
    chat: ChatTemplate | None
    too_long: int
    room: int


def text_limits(identity: TextIdentity, tokenizer: Tokenizer) -> Limits:
    """Return the end of the texts."""
    strings = StopStrings(tuple(identity.stop_strings), tokenizer) if identity.stop_strings else None
    return Limits(identity.max_new_tokens, frozenset(identity.stop), strings)


def text_recorder(
    backbone: Backbone, head: MtpStack | None, identity: TextIdentity, making: TextMaking
) -> Callable[[list[Prompt]], list[Trace]]:
    """Return a function that continues prompts in one batch; random draws depend on a prompt's number alone."""
    limits = text_limits(identity, backbone.tokenizer)
    policy = Policy(
        temperature=identity.temperature,
        top_k=identity.top_k,
        top_p=identity.top_p,
        min_p=identity.min_p,
        penalties=Penalties(*(getattr(identity, name) for name in PENALTIES)),
    )
    proposer, length = (None, 0) if head is None else (MtpProposer(backbone.model, head), making.draft_length)

    def record(prompts: list[Prompt]) -> list[Trace]:
        seeds = [row_seed(making.seed, prompt.group) for prompt in prompts]
        run = decode_speculative(
            backbone.model, proposer, [prompt.tokens for prompt in prompts], length, limits, policy, seeds
        )
        return [
            Trace(prompt, row.tokens, row.gaps, row.probabilities)
            for prompt, row in zip(prompts, run.rows, strict=True)
        ]

    return record


def describe_batch(identity: TextIdentity, making: TextMaking, prompts: PromptSet, dropped: int) -> TraceHeader:
    """Return the header of a batch's trace set."""
    return TraceHeader(
        **{name: value for name, value in asdict(identity).items() if name != "prompts"},
        seed=making.seed,
        chat_template=prompts.chat.sha256 if prompts.chat else None,
        sources=prompts.sources,
        dropped=dropped,
    )


def finish_texts(folder: Path, identity: TextIdentity, making: TextMaking, names: list[str], too_long: int) -> None:
    """Write the manifest once all files `names` exist; `too_long` prompts were left out."""
    files = find_parts(folder, names)
    assert len(files) == len(names)
    counts = total_counts(files)
    counts |= {"prompts": counts["prompts"] + too_long, "too_long": too_long}
    finish(TEXTS, folder, identity, files, TextContent(making, counts))


def describe_counts(counts: dict[str, int]) -> str:
    """Return a line on the outcome of the prompts."""
    failed = counts["empty"] + counts["too_long"] + counts["dropped_turns"]
    return (
        f"{counts['texts']} texts of {counts['tokens']:,} tokens from {counts['prompts']} prompts: {counts['stopped']} "
        f"ended at a stop token or string, {counts['full']} at on_policy.max_new_tokens; {failed} failed "
        f"({counts['empty']} gave nothing, {counts['too_long']} were too long for the context, "
        f"{counts['dropped_turns']} turns outgrew it)"
    )


def as_corpus(traces: list[Trace]) -> TokenizedCorpus:
    """Return every prompt with its text as a document; only tokens of the text may be targets."""
    sizes = [len(trace.prompt.tokens) + len(trace.tokens) for trace in traces]
    loss_mask = [[False] * len(trace.prompt.tokens) + [True] * len(trace.tokens) for trace in traces]
    return TokenizedCorpus(
        tokens=np.concatenate([np.asarray(trace.prompt.tokens + trace.tokens, np.int32) for trace in traces]),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
        num_bytes=0,  # nothing reports a loss by the byte for these
        loss_mask=np.concatenate([np.asarray(part, bool) for part in loss_mask]),
    )
