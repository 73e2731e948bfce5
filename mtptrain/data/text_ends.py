"""The tokens that begin, close and end a text, from all files of a model's folder that name them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mtptrain.errors import UserError
from mtptrain.run.typed_json import JsonObject

PROBE = "a"  # any text: only the tokens that the post-processor writes before it count


@dataclass(frozen=True, slots=True)
class TextEnds:
    """The special tokens at both ends of a text.

    Attributes:
        begin: ids before every training document and every prompt.
        close: ids after every training document.
        stop: ids that end a decoded text.
    """

    begin: list[int]
    close: list[int]
    stop: frozenset[int]


def read_text_ends(folder: Path, tokenizer: Tokenizer, begin: int | None, end: Any, vocab_size: int) -> TextEnds:
    """Return the ends of a text as a model's files define them.

    A text begins with the tokens that the tokenizer's post-processor writes, else with config.json's begin token. A
    document closes with the tokenizer's own `eos_token`, else with config.json's first end token. A decoded text ends
    at each of these end tokens and at every one of config.json and generation_config.json, as in vLLM
    (`SamplingParams.update_from_generation_config`).

    Args:
        folder: of the model, with config.json.
        tokenizer: from the same folder.
        begin: `bos_token_id` of config.json.
        end: `eos_token_id` of config.json: an id, a list of ids, or None.
        vocab_size: rows of the embedding; ids from there on cannot be emitted and do not count.

    Raises:
        UserError: a file is damaged, or an `eos_token_id` is neither an id nor a list of ids.
    """
    size = tokenizer.get_vocab_size()
    listed = _end_ids(folder, "config.json", end)
    own = tokenizer.token_to_id(_own_end_token(folder) or "")
    in_tokenizer = [one for one in [own, *listed] if one is not None and one < size]
    generation = _end_ids(
        folder, "generation_config.json", _read(folder / "generation_config.json").get("eos_token_id")
    )
    stop = [one for one in [*in_tokenizer[:1], *listed, *generation] if one < vocab_size]
    known_begin = [] if begin is None or begin >= size else [begin]
    return TextEnds(_written_before(tokenizer) or known_begin, in_tokenizer[:1], frozenset(stop))


def _written_before(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer's post-processor writes before a text."""
    encoding = tokenizer.encode(PROBE, add_special_tokens=True)
    marks = encoding.special_tokens_mask
    return encoding.ids[: marks.index(0)] if 0 in marks else []


def _own_end_token(folder: Path) -> str | None:
    """Return the `eos_token` of tokenizer_config.json."""
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _end_ids(folder: Path, file: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise UserError(
            f"backbone.path={folder}: eos_token_id of {file} is {value}; it must be a token id or a list of them"
        )
    return ids


def _read(path: Path) -> JsonObject:
    """Return the object of a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.path={path.parent}: {path.name} cannot be read ({error}); restore it") from None
    return value
