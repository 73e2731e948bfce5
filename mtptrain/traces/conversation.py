"""Conversations with the backbone: each user turn is asked after the backbone's own answers to those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from mtptrain.data.chat import ChatTemplate
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class ConversationTraces:
    """What came of the prompts.

    Attributes:
        traces: one for each turn that was asked, those of a conversation in a row.
        dropped: turns that were not asked, because the conversation had outgrown the context.
    """

    traces: list[Trace]
    dropped: int


def answer_text(tokenizer: Tokenizer, stop: frozenset[int]) -> Callable[[list[int]], str]:
    """Return a function from emitted tokens to the assistant's message: no special tokens, no stop token."""

    def answer(tokens: list[int]) -> str:
        kept = tokens[:-1] if tokens[-1] in stop else tokens
        return tokenizer.decode(kept, skip_special_tokens=True)

    return answer


def hold_conversations(
    conversations: list[Conversation],
    chat: ChatTemplate | None,
    record: Callable[[list[Prompt]], list[Trace]],
    answer: Callable[[list[int]], str],
    room: int,
) -> ConversationTraces:
    """Ask every turn, the first ones of all conversations together, then the second ones.

    Args:
        conversations: where each conversation starts; one without turns is a single prompt.
        chat: renders a conversation; needed where there are turns.
        record: continues prompts.
        answer: the text of emitted tokens, as it is put into the conversation.
        room: tokens that a prompt may have.
    """
    found: list[Trace] = []
    dropped = 0
    asked = conversations
    while asked:
        traces = record([conversation.prompt for conversation in asked])
        found += traces
        following = []
        for conversation, trace in zip(asked, traces, strict=True):
            if not conversation.turns or chat is None:
                continue
            said, turn, *later = answer(trace.tokens), *conversation.turns
            replies = [{"role": "assistant", "content": said}, {"role": "user", "content": turn}]
            messages = conversation.messages + replies
            prompt = Prompt(chat.encode(messages), conversation.prompt.domain, conversation.prompt.group)
            if len(prompt.tokens) > room:
                dropped += len(conversation.turns)
            else:
                following.append(Conversation(prompt, messages, later))
        asked = following
    return ConversationTraces(
        sorted(found, key=lambda trace: trace.prompt.group), dropped
    )  # sorting keeps turns in order
