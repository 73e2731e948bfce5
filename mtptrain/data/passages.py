"""Hashed passages of the training text, kept with a head, to find prompts that it was trained on.

A passage is `WINDOW` bytes in a row of a text without white space and in lower case. So copies under another name, with
other line breaks or cut from the middle of a document are found. At most `LIMIT` hashes are kept: those below a bound
that is halved whenever there are more. They are a uniform sample of the text's distinct passages, the same one in
whatever order and by however many processes the text was read.

Source: FracMinHash, Irber et al. 2022 (bioRxiv 2022.01.11.475838).
"""

# N bytes of a text, M = N - WINDOW + 1 passages, V vocabulary

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

WINDOW = 32  # bytes; a power of two
LIMIT = 2**19  # hashes, 4 MiB
CHUNK_TOKENS = 2**18  # hashed at once: about 1 MB of text and 8 MB of hashes
FOUND = 0.5  # least share of a prompt's passages among those of the training text for the prompt to count as trained on
MULTIPLIERS = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]


@dataclass(frozen=True, slots=True)
class Passages:
    """A sample of the passages of a text.

    Attributes:
        hashes: uint64, ascending, all below 2^(64 - bits).
        bits: one passage in 2^bits is kept.
    """

    hashes: np.ndarray
    bits: int = 0

    @classmethod
    def none(cls) -> Passages:
        """Return the passages of an empty text."""
        return cls(np.empty(0, np.uint64))

    def join(self, other: Passages) -> Passages:
        """Return the passages of both texts."""
        bits = max(self.bits, other.bits)
        hashes = _distinct(np.concatenate([_below(self.hashes, bits), _below(other.hashes, bits)]))
        while len(hashes) > LIMIT:
            bits += 1
            hashes = _below(hashes, bits)
        return Passages(hashes, bits)

    def share_of(self, prompt_M: np.ndarray) -> float | None:
        """Return the share of a prompt's passages that are among these; None if none of them would have been kept."""
        kept = _below(prompt_M, self.bits)
        # `np.isin` would sort all hashes for each prompt.
        first, end = np.searchsorted(self.hashes, kept, "left"), np.searchsorted(self.hashes, kept, "right")
        return float((first < end).mean()) if len(kept) else None

    def write(self, path: Path) -> None:
        """Write a file for `read_passages`."""
        np.savez(path, hashes=self.hashes, bits=np.int64(self.bits))


def join_passages(parts: list[Passages]) -> Passages:
    """Return the passages of several texts."""
    return reduce(Passages.join, parts, Passages.none())


def read_passages(path: Path) -> Passages:
    """Return the passages of a file of `Passages.write`."""
    with np.load(path) as stored:
        return Passages(stored["hashes"], int(stored["bits"]))


def _below(hashes: np.ndarray, bits: int) -> np.ndarray:
    kept: np.ndarray = hashes[hashes >> np.uint64(64 - bits) == 0] if bits else hashes
    return kept


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Return the distinct values in ascending order; `np.unique` of numpy 2.3 takes ten times as long."""
    hashes = np.sort(hashes)
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]


class PassageHasher:
    """Hashes the passages of tokens; special tokens do not count.

    Args:
        tokenizer: the backbone's.
        vocab_size: rows of the embedding, the maximum size of the tokenizer's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.boundary = tokenizer, vocab_size

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all tokens one after another, uint8, and their offsets; `boundary` is WINDOW zeros."""
        known = range(self.tokenizer.get_vocab_size())
        texts = self.tokenizer.decode_batch([[token] for token in known], skip_special_tokens=True)
        pieces = [self._normalise(token, text) for token, text in zip(known, texts, strict=True)]
        pieces += [b""] * (self.boundary - len(pieces)) + [bytes(WINDOW)]
        return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)])

    def _normalise(self, token: int, text: str) -> bytes:
        if "\ufffd" in text:  # a part of a character, which the vocabulary's own spelling tells from the others
            text = self.tokenizer.id_to_token(token) or ""
        return "".join(text.casefold().split()).replace("\0", "").encode("utf-8", "surrogatepass")

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """Return the normalised text of tokens, uint8 [N]."""
        data, offset_V = self._table
        size = np.diff(offset_V)[tokens]
        shift = offset_V[tokens] - (np.cumsum(size) - size)
        return data[np.repeat(shift, size) + np.arange(size.sum())]

    def documents(self, tokens: np.ndarray, starts: np.ndarray) -> Passages:
        """Return the passages of documents.

        Args:
            tokens: token ids, the documents one after another.
            starts: position of each document's first token, ascending. A passage that begins before it holds zeros
                there, so that a prompt shorter than a passage can be found at the start of a document.
        """
        passages = Passages.none()
        for begin in range(0, len(tokens), CHUNK_TOKENS):
            part = tokens[begin : begin + CHUNK_TOKENS]
            first, last = np.searchsorted(starts, [begin, begin + len(part)])
            inside = starts[first:last] - begin
            text_N = self.text(np.insert(part.astype(np.int64), inside, self.boundary))
            hash_M = passage_hashes(text_N)
            crosses_end_M = (text_N[: len(hash_M)] != 0) & (text_N[-len(hash_M) :] == 0) if len(hash_M) else []
            hash_M = np.delete(hash_M, np.flatnonzero(crosses_end_M))
            passages = passages.join(Passages(hash_M))
        return passages

    def prompt(self, tokens: list[int]) -> np.ndarray:
        """Return the hashes of a prompt's passages, uint64; a shorter prompt is the beginning of a document."""
        text_N = self.text(np.array(tokens, np.int64))
        if 0 < len(text_N) < WINDOW:
            text_N = np.concatenate([np.zeros(WINDOW - len(text_N), np.uint8), text_N])
        return passage_hashes(text_N)


def passage_hashes(text_N: np.ndarray) -> np.ndarray:
    """Return a hash of every `WINDOW` bytes in a row, uint64 [M]; equal bytes have equal hashes.

    Two halves are combined into a window of twice their size, so that the work is logarithmic in `WINDOW`.
    """
    if len(text_N) < WINDOW:
        return np.empty(0, np.uint64)
    hash_M = _mix(text_N.astype(np.uint64) + np.uint64(1))
    for level, multiplier in enumerate(MULTIPLIERS):
        half = 2**level
        hash_M = hash_M[:-half] * np.uint64(multiplier) + hash_M[half:]
    return _mix(hash_M)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return uint64 values with all bits mixed, one to one. Source: the finaliser of SplitMix64, Steele et al. 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prompt_digest(tokens: list[int]) -> str:
    """Return a short digest of a prompt's token ids, which tells prompts apart without their text."""
    return hashlib.sha256(np.array(tokens, np.int64).tobytes()).hexdigest()[:16]
