"""The text of tokens as they come, in pieces by the origin of the tokens."""

from __future__ import annotations

from tokenizers import Tokenizer

from mtptrain.decoding.results import NewTokens
from mtptrain.evaluation.head_result import Piece, PieceKind

INCOMPLETE = "\ufffd"  # a decoder writes one for the bytes of a character that is not complete


class Transcript:
    """Decodes tokens step by step; the pieces together are the text of all tokens, without special tokens.

    A character whose bytes are spread over tokens belongs to the token that completes it.

    Args:
        tokenizer: the backbone's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []  # tokens since the last whole character, and the one before them
        self.num_shown = 0  # characters of the window's text

    def pieces(self, new: NewTokens) -> list[Piece]:
        """Return the pieces of a pass: kept drafts, rejected drafts (no part of the text), the verifier's own token."""
        pieces = [Piece(self._add(new.accepted), PieceKind.accepted)]
        pieces.append(Piece(self._decode([*self.window, *new.rejected])[self.num_shown :], PieceKind.rejected))
        pieces.append(Piece(self._add(new.own), PieceKind.bonus))
        rejected = pieces[1].text.replace(INCOMPLETE, "") if new.rejected else ""
        pieces[1] = Piece(rejected, PieceKind.rejected)
        return [piece for piece in pieces if piece.text]

    def rest(self) -> list[Piece]:
        """Return the end of the text, with a replacement character if its last bytes are no character."""
        text = self._decode(self.window)[self.num_shown :]
        self.num_shown += len(text)
        return [Piece(text, PieceKind.bonus)] if text else []

    def _add(self, tokens: list[int]) -> str:
        self.window += tokens
        text = self._decode(self.window)
        # The window may begin with the end of a character, which was shown before.
        whole = text if len(text) == self.num_shown else text.removesuffix(INCOMPLETE)
        piece = whole[self.num_shown :]
        self.num_shown = len(whole)
        if whole == text:  # some decoders strip the space of a first token, so one stays before the next ones
            self.window = self.window[-1:]
            self.num_shown = len(self._decode(self.window))
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
