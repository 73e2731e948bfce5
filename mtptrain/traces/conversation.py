"""Multi-turn prompts: each user turn follows the backbone's own answers to the earlier turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from mtptrain.data.chat import ChatTemplate
from mtptrain.decoding.results import Limits
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class ConversationTraces:
    """Traces of conversations.

    Attributes:
        traces: one for each turn, ordered by conversation.
        dropped: number of turns left out because their conversation had outgrown the context.
    """

    traces: list[Trace]
    dropped: int


def answer_text(tokenizer: Tokenizer, limits: Limits) -> Callable[[list[int]], str]:
    """Return a function from emitted tokens to the assistant's message: no special tokens, no stop token or string."""

    def answer(tokens: list[int]) -> str:
        kept = tokens[:-1] if tokens[-1] in limits.stop else tokens
        output = tokenizer.decode(kept, skip_special_tokens=True)
        return output if limits.strings is None else limits.strings.cut(output)

    return answer


def record_conversations(
    conversations: list[Conversation],
    chat: ChatTemplate | None,
    record: Callable[[list[Prompt]], list[Trace]],
    answer: Callable[[list[int]], str],
    room: int,
) -> ConversationTraces:
    """Record every turn: first the first turns of all conversations together, then the second turns, and so on.

    Args:
        conversations: the beginnings; a conversation without further turns is a single prompt.
        chat: renders conversations; may be None only if no conversation has further turns.
        record: continues prompts.
        answer: returns the text of emitted tokens, as inserted into the conversation.
        room: maximum tokens of a prompt.
    """
    traces: list[Trace] = []
    dropped = 0
    active = conversations
    while active:
        recorded = record([conversation.prompt for conversation in active])
        traces += recorded
        following = []
        for conversation, trace in zip(active, recorded, strict=True):
            if not conversation.turns or chat is None:
                continue
            turn, *later = conversation.turns
            reply = {"role": "assistant", "content": answer(trace.tokens)}
            messages = [*conversation.messages, reply, {"role": "user", "content": turn}]
            prompt = Prompt(
                chat.encode(messages, conversation.tools), conversation.prompt.domain, conversation.prompt.group
            )
            if len(prompt.tokens) > room:
                dropped += len(conversation.turns)
            else:
                following.append(Conversation(prompt, messages, later, conversation.tools))
        active = following
    traces.sort(key=lambda trace: trace.prompt.group)  # a stable sort, so turns keep their order
    return ConversationTraces(traces, dropped)
