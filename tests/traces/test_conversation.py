"""Multi-turn prompts."""

from pathlib import Path

from mtptrain.data.chat import ChatTemplate
from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.traces.conversation import ConversationTraces, record_conversations
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Conversation, Prompt
from tests.conftest import CHAT_TEMPLATE, corpus_texts

TOKENIZER = train_tokenizer(corpus_texts(), 300)
CHAT = ChatTemplate(CHAT_TEMPLATE, Path("template"), {"bos_token": "^"}, TOKENIZER, [0])


def conversation(group: int, *turns: str) -> Conversation:
    messages = [{"role": "user", "content": turns[0]}]
    return Conversation(Prompt(CHAT.encode(messages), "talk", group), messages, list(turns[1:]))


def answer_in_rounds(conversations: list[Conversation], room: int = 10_000) -> ConversationTraces:
    """Answer every prompt with its number of tokens."""

    def record(prompts: list[Prompt]) -> list[Trace]:
        words = [TOKENIZER.encode(str(len(prompt.tokens)), add_special_tokens=False).ids for prompt in prompts]
        return [Trace(prompt, ids, [1.0], [1.0]) for prompt, ids in zip(prompts, words, strict=True)]

    return record_conversations(conversations, CHAT, record, TOKENIZER.decode, room)


def text_of(trace: Trace) -> str:
    return TOKENIZER.decode(trace.prompt.tokens)


def test_a_turn_follows_the_answers_to_the_earlier_turns() -> None:
    traces = answer_in_rounds([conversation(0, "a", "b", "c")]).traces
    answers = [TOKENIZER.decode(trace.tokens) for trace in traces]
    assert text_of(traces[2]).endswith(
        f"<user>a</user><assistant>{answers[0]}</assistant><user>b</user><assistant>{answers[1]}</assistant>"
        "<user>c</user><assistant>"
    )


def test_the_turns_of_a_conversation_come_in_a_row_and_share_a_group() -> None:
    conversations = [conversation(0, "a", "b"), Conversation(Prompt([5, 6], "text", 1)), conversation(2, "c", "d")]
    traces = answer_in_rounds(conversations).traces
    assert [trace.prompt.group for trace in traces] == [0, 0, 1, 2, 2]
    assert [len(trace.prompt.tokens) < len(traces[4].prompt.tokens) for trace in traces[:4]] == [
        True,
        False,
        True,
        True,
    ]


def test_turns_after_the_context_is_full_are_dropped_and_counted() -> None:
    conversations = [conversation(0, "a", "b", "c", "d"), conversation(1, "a")]
    second = answer_in_rounds(conversations).traces[1]
    limited = answer_in_rounds(conversations, room=len(second.prompt.tokens))
    assert [trace.prompt.group for trace in limited.traces] == [0, 0, 1]
    assert limited.dropped == 2
