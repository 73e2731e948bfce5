"""Train a byte-level BPE tokenizer, save it, and load the tokenizer of a backbone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mtptrain.errors import UserError
from mtptrain.run.storage import write_json

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with id 0 = begin of text and id 1 = end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return read_special_tokens_as_text(tokenizer)


def read_special_tokens_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Encode special tokens spelt out in a text as characters; neither tokenizer.json nor a pickle stores this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and a tokenizer_config.json for `AutoTokenizer`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS},
    )


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a backbone folder.

    A truncation or padding stored in tokenizer.json is switched off: it is left over from an earlier use of the
    tokenizer, and transformers does not apply it either (`PreTrainedTokenizerFast.set_truncation_and_padding`).

    Args:
        folder: the folder, with tokenizer.json.
        vocab_size: rows of the backbone's embedding, the maximum size of the tokenizer's vocabulary.

    Raises:
        UserError: tokenizer.json is missing, unreadable or has a larger vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"backbone.path={folder}: holds no tokenizer.json; put the backbone's own tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"backbone.path={folder}: tokenizer.json cannot be read ({error})") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"backbone.path={folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens and the backbone's "
            f"embedding {vocab_size}; use the tokenizer that the backbone was trained with"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return read_special_tokens_as_text(tokenizer)
