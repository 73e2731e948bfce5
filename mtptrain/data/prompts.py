"""Prompts that the backbone continues, in its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from mtptrain.config import HELDOUT
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.messages import Message
from mtptrain.data.questions import Question
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: token ids, at least one.
        domain: what kind of text it is; figures are given by domain.
        group: prompts of one conversation share it; uncertainty is over groups, which are independent of each other.
    """

    tokens: list[int]
    domain: str
    group: int


@dataclass(frozen=True, slots=True)
class Opening:
    """A prompt, and how its conversation goes on.

    Attributes:
        prompt: what is asked first.
        messages: the conversation so far; empty where the prompt is a text.
        turns: what the user says after each answer.
    """

    prompt: Prompt
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)


def slice_prompts(
    corpus: TokenizedCorpus, count: int, length: int, name: str = HELDOUT, section: str = "evaluation"
) -> list[Prompt]:
    """Prompts of `length` tokens, spread evenly over a corpus; none crosses a document's end.

    Args:
        corpus: the documents.
        count: of prompts.
        length: tokens of each.
        name: of the corpus, their domain.
        section: of the settings that say count and length, for the error.

    Raises:
        UserError: the corpus holds fewer.
    """
    starts: list[int] = []
    for begin, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        starts.extend(range(begin, end - length + 1, length))
    if len(starts) < count:
        raise UserError(
            f"{section}.num_prompts={count}: the {name} text has {len(starts)} prompts of "
            f"{section}.prompt_tokens={length}; lower one of them"
        )
    chosen = np.linspace(0, len(starts) - 1, count).round().astype(int)
    tokens = (corpus.tokens[starts[i] : starts[i] + length].tolist() for i in chosen)
    return [Prompt(ids, name, number) for number, ids in enumerate(tokens)]


def encode_question(
    question: Question, group: int, tokenizer: Tokenizer, begin: list[int], chat: ChatTemplate | None
) -> Opening:
    """The prompt that a question begins with; a text gets the marks that open every training document.

    Raises:
        UserError: it is a conversation and there is no chat template.
    """
    if not question.messages:
        tokens = begin + tokenizer.encode(question.text, add_special_tokens=False).ids
    elif chat is not None:
        tokens = chat.encode(question.messages)
    else:
        raise UserError(
            f"{question.where} is a conversation and the backbone's tokenizer has no chat template; set "
            "data.chat_template to a jinja file, or write the text itself as `prompt`"
        )
    return Opening(Prompt(tokens, question.domain, group), question.messages, question.turns)
