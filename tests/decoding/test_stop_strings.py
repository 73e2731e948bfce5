"""Texts that end with a string: at the token that completes it, whatever passes emit the tokens."""

import pytest
import torch
from tokenizers import Tokenizer

from mtptrain.config import DecodingConfig
from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits, StopStrings
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.errors import UserError
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.replay import replay_passes
from mtptrain.traces.conversation import answer_text
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.tiny import random_backbone, random_stack

TOKENIZER = train_tokenizer(["the cat and the hat"] * 3, 300)
SIZE = TOKENIZER.get_vocab_size()
MODEL = random_backbone(vocab_size=SIZE)
PROMPTS = torch.randint(2, SIZE, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def strings(*texts: str, tokenizer: Tokenizer = TOKENIZER) -> StopStrings:
    return StopStrings(texts, tokenizer)


def test_a_row_ends_with_the_first_token_that_completes_a_string() -> None:
    tokens = ids("the cat and a hat")
    for text in ("cat", "at and", "t a", "e"):
        end = strings(text).end([], tokens)
        assert end is not None
        assert text in TOKENIZER.decode(tokens[:end])
        assert text not in TOKENIZER.decode(tokens[: end - 1])
        for cut in range(end):  # however the tokens are divided into passes
            assert strings("zebra", text).end(tokens[:cut], tokens[cut:]) == end - cut
    assert strings("zebra").end([], tokens) is None


def test_characters_of_several_tokens_and_special_tokens_can_end_a_row() -> None:
    tokens = ids("a数b")
    assert len(tokens) == 5
    assert strings("数").end(tokens[:2], tokens[2:]) == 2
    assert strings("<|end_of_text|>").end(tokens, [1]) == 1


@pytest.mark.parametrize("policy", [Policy(), Policy(temperature=1.0)], ids=["greedy", "sampled"])
def test_every_loop_ends_a_text_where_plain_decoding_or_its_own_text_does(policy: Policy) -> None:
    whole = decode_plain(MODEL, PROMPTS, Limits(24), policy).rows
    # A string of two tokens of the first text: no single token is one.
    text = TOKENIZER.decode(whole[0].tokens[5:7], skip_special_tokens=False)
    limits = Limits(24, strings=strings(text))
    plain = decode_plain(MODEL, PROMPTS, limits, policy).rows
    stack = random_stack(MODEL)
    loop = decode_speculative(MODEL, MtpProposer(MODEL, stack), PROMPTS, 3, limits, policy).rows
    for uncut, row in zip(whole, plain, strict=True):
        assert row.tokens == uncut.tokens[: limits.strings.end([], uncut.tokens) if limits.strings else None]
    assert len(plain[0].tokens) <= 7
    for prompt, one, row in zip(PROMPTS, plain, loop, strict=True):
        assert strings(text).end([], row.tokens) in (None, len(row.tokens))
        assert sum(verify_pass.emitted for verify_pass in row.passes) == len(row.tokens) - 1
        if policy.is_greedy:
            assert row.tokens == one.tokens
            trace = Trace(Prompt(prompt, "", 0), row.tokens, row.gaps, row.probabilities)
            (drafts,) = draft_traces(MODEL, stack, [trace], 3, policy)
            assert replay_passes(drafts, policy, 3) == row.passes


def test_an_answer_ends_before_the_string() -> None:
    answer = answer_text(TOKENIZER, Limits(9, frozenset([1]), strings("and", "t a")))
    assert [answer([*ids(text), 1]) for text in ("the cat and", "the cat", "a hat and")] == [
        "the ca",
        "the cat",
        "a ha",
    ]


@pytest.mark.parametrize("value", [[""], [3], ["a", None]])
def test_a_stop_string_must_be_a_text(value: list[object]) -> None:
    with pytest.raises(UserError, match=r"decoding\.stop_strings=.*: must be a list of texts"):
        DecodingConfig(stop_strings=value)
