"""Decode texts with a loaded backbone, alone or with the drafts of a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mtptrain.api.backbone import STOCK, LoadedBackbone, check_head, open_session, own_settings
from mtptrain.api.composed import Settings, arguments_of, compose_run
from mtptrain.certificate.loop import text_pieces
from mtptrain.config.reads import SAMPLING, TEMPLATE
from mtptrain.config.reads import settings as settings_of
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.results import Decoded, DecodedBatch
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.errors import UserError
from mtptrain.evaluation.head_result import Piece, PieceKind
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.speedup import tokens_per_second
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import check_room
from mtptrain.traces.conversation import answer_text
from mtptrain.traces.prompts import PromptRow, encode_prompt_row

Message = Mapping[str, Any]  # of a conversation: {"role": "user", "content": "..."}
TextPrompt = str | Sequence[int] | Sequence[Message]
READ = (settings_of("decoding", "seed", *TEMPLATE)) - {"decoding.served_as"}
STYLES = {
    PieceKind.accepted: "background:#d7f0dc;color:#000",
    PieceKind.bonus: "",
    PieceKind.rejected: "color:#b00020;text-decoration:line-through",
}


@dataclass(frozen=True, slots=True)
class DecodedText:
    """A prompt and its continuation.

    Attributes:
        prompt: the prompt as text, special tokens included.
        text: the continuation, without special tokens, its stop token or stop string.
        pieces: the continuation by the origin of its tokens: accepted drafts, the backbone's own tokens and, in front
            of these, the rejected drafts, which are no part of the text.
        record: token ids and verify passes.
    """

    prompt: str
    text: str
    pieces: list[Piece] = field(repr=False)
    record: Decoded = field(repr=False)

    @property
    def tokens(self) -> list[int]:
        """The emitted token ids."""
        return self.record.tokens

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a verify pass emitted, the backbone's own included; None without drafts."""
        return _mean_emitted([self.record])

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """Return the text for a notebook, accepted drafts marked and rejected ones struck out."""
        parts = [f'<span style="{STYLES[piece.kind]}">{escape(piece.text)}</span>' for piece in self.pieces]
        prompt = f'<span style="opacity:.6">{escape(self.prompt)}</span>'
        return f'<pre style="white-space:break-spaces">{prompt}{"".join(parts)}</pre>'


@dataclass(frozen=True, slots=True)
class DecodedTexts(Sequence[DecodedText]):
    """Continuations of prompts that were decoded together, in the order of the prompts.

    Attributes:
        texts: the continuations.
        batch: the records of the loop, with the seconds of its phases.
    """

    texts: list[DecodedText]
    batch: DecodedBatch = field(repr=False)

    def __getitem__(self, index: Any) -> Any:
        """Return the text of a prompt, or the texts of a slice."""
        return self.texts[index]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a verify pass emitted, over all texts; None without drafts."""
        return _mean_emitted(self.batch.rows)

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over the wall time, the prefill included."""
        return tokens_per_second([self.batch])

    def _repr_html_(self) -> str:
        """Return all texts for a notebook, below a line of figures."""
        length = self.tokens_per_pass
        passes = "" if length is None else f"{length:.2f} tokens a pass, "
        figures = f"<p>{passes}{self.tokens_per_second:,.0f} tokens/s</p>"
        return figures + "".join(text._repr_html_() for text in self.texts)


def _mean_emitted(records: list[Decoded]) -> float | None:
    passes = [one for record in records for one in record.passes]
    return sum(one.emitted for one in passes) / len(passes) if passes else None


def decode(
    backbone: LoadedBackbone,
    prompts: TextPrompt | Sequence[TextPrompt],
    head: Head | None = None,
    *,
    settings: Settings | None = None,
) -> DecodedTexts:
    """Continue prompts, all in one batch. A head's drafts change the passes, never the distribution of the text.

    Args:
        backbone: writes or verifies the texts.
        prompts: a prompt or several. A prompt is a text, token ids, or a conversation that the chat template renders.
        head: drafts; None decodes plainly. The settings of drafts then have no effect, so that the same settings serve
            both.
        settings: those of `decoding`, `seed` and the chat template, such as {"decoding.max_new_tokens": 64,
            "decoding.draft_length": 3, "decoding.temperature": 1.0}.

    Raises:
        UserError: a prompt is empty, too long or of another vocabulary, a conversation has no template, the head is one
            of another backbone, or a setting is not read.

    Example:
        >>> texts = mtptrain.decode(backbone, "def add(a, b):", mtptrain.load_head(backbone))
        >>> print(texts[0], texts.tokens_per_pass)
    """
    given = own_settings(backbone, {"checkpoint": STOCK, **(settings or {})})
    _check_read(settings or {})
    if head is not None:
        check_head(backbone, head)
    session = open_session(compose_run(arguments_of("evaluate", given)), backbone)
    tokens = [_encode(session, prompt, number) for number, prompt in enumerate(_several(prompts), start=1)]
    batch = _decode(session, tokens, head)
    answer, tokenizer = answer_text(session.source.tokenizer, session.limits), session.source.tokenizer
    texts = [
        DecodedText(backbone.text(prompt), answer(record.tokens), text_pieces(tokenizer, record), record)
        for prompt, record in zip(tokens, batch.rows, strict=True)
    ]
    return DecodedTexts(texts, batch)


def _decode(session: Session, tokens: list[list[int]], head: Head | None) -> DecodedBatch:
    """Decode under the policy and the limits of a session."""
    model, limits, policy = session.backbone.model, session.limits, session.policy
    seeds = [row_seed(session.config.seed, number) for number in range(len(tokens))]
    if head is None:
        return decode_plain(model, tokens, limits, policy, seeds)
    length = session.config.decoding.draft_length
    proposer = head_proposer(model, head.stack, policy, length)
    return decode_speculative(model, proposer, tokens, length, limits, policy, seeds)


def _check_read(settings: Settings) -> None:
    """Refuse the first setting that decoding a text does not read; at temperature 0 also those of sampling."""
    is_greedy = not settings.get("decoding.temperature")
    for name, value in settings.items():
        section = ".".join(name.split(".")[:2])
        if section not in READ:
            raise UserError(f"{name}={value}: decode does not read it; it reads decoding.*, seed and {TEMPLATE[0]}")
        if is_greedy and name in SAMPLING:
            raise UserError(f"{name}={value}: it matters at a decoding.temperature above 0; set one")


def _several(prompts: Any) -> Sequence[Any]:
    """Return the prompts; a single one as a list."""
    holds_parts = isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int | Mapping)
    is_one = isinstance(prompts, str) or not isinstance(prompts, Sequence) or holds_parts
    return [prompts] if is_one else prompts


def _encode(session: Session, prompt: Any, number: int) -> list[int]:
    """Return the token ids of prompt `number`, counted from 1.

    Raises:
        UserError: it is no prompt, cannot be rendered or does not fit in the context.
    """
    where = f"prompts: prompt {number}"
    if isinstance(prompt, str):
        row = PromptRow(where, "", prompt)
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(one, Mapping) for one in prompt):
        row = PromptRow(where, "", "", [dict(one) for one in prompt])
    elif isinstance(prompt, Sequence) and all(isinstance(one, int) for one in prompt):
        check_room(where, list(prompt), session.prompt_room)
        return list(prompt)
    else:
        raise UserError(f"{where} is a {type(prompt).__name__}; give a text, token ids or a list of messages")
    tokenizer, begin = session.source.tokenizer, session.source.bos_eos[0]
    tokens = encode_prompt_row(row, number - 1, tokenizer, begin, session.chat).prompt.tokens
    check_room(where, tokens, session.prompt_room)
    return tokens
