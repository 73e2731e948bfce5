"""Pieces of text join to the text of all tokens, whatever the passes, and no character is shown in parts."""

import random

import pytest
from tokenizers import Tokenizer

from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.decoding.results import NewTokens
from mtptrain.evaluation.head_result import Piece, PieceKind
from mtptrain.generation.transcript import INCOMPLETE, Transcript
from tests.conftest import VOCAB_SIZE, corpus_texts

TEXT = "naïve — «日本語» 👩‍👩‍👧 done\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Nearly all of its tokens are single bytes."""
    return train_tokenizer(corpus_texts(), VOCAB_SIZE)


def passes(tokens: list[int], seed: int) -> list[NewTokens]:
    """Cut tokens into passes of random lengths with random rejected drafts."""
    draw, cut = random.Random(seed), []
    while tokens:
        count = draw.randint(1, 5)
        new, tokens = tokens[:count], tokens[count:]
        cut.append(NewTokens(new[:-1], new[-1:], draw.choices(range(VOCAB_SIZE), k=draw.randint(0, 3))))
    return cut


def shown(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if piece.kind is not PieceKind.rejected)


@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, seed: int) -> None:
    transcript, pieces = Transcript(tokenizer), []
    for new in passes(tokenizer.encode(TEXT, add_special_tokens=False).ids, seed):
        pieces += transcript.pieces(new)
    assert not any(INCOMPLETE in piece.text for piece in pieces)
    assert shown(pieces + transcript.rest()) == TEXT


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_decodes_them(tokenizer: Tokenizer, seed: int) -> None:
    tokens = random.Random(seed).choices(range(VOCAB_SIZE), k=60)
    transcript, pieces = Transcript(tokenizer), []
    for new in passes(tokens, seed):
        pieces += transcript.pieces(new)
    assert shown(pieces + transcript.rest()) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_belongs_to_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é", add_special_tokens=False).ids
    wrong = tokenizer.encode("zé", add_special_tokens=False).ids[:2]
    pieces = Transcript(tokenizer).pieces(NewTokens([first], [second], wrong))
    assert pieces[-1] == Piece("é", PieceKind.bonus)
    assert [piece.text for piece in pieces[:-1]] == ["z"]  # the rejected draft, without its half character
