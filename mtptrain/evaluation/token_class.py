"""What kind of text a token is, read off the tokenizer's own text."""

from __future__ import annotations

from tokenizers import Tokenizer

LOOK_BACK = 8  # tokens before, enough to see the start of a line and the end of a word
CLASSES = ["word start", "inside word", "digits", "punctuation", "whitespace", "indentation", "part of a character"]


def classify(text: str, before: str) -> str:
    r"""The class of a token's text after some text.

    ("def", "\n") -> word start, ("ine", "def") -> inside word, ("    ", "x:\n") -> indentation

    Args:
        text: of the token.
        before: text before it, a few tokens at least.
    """
    if not text or "\ufffd" in text:
        return "part of a character"
    first = text.strip()[:1]
    if not first:
        opens_line = not before or ("\n" in before and not before.rpartition("\n")[2].strip())
        indents = text.rpartition("\n")[2] if "\n" in text else text * opens_line
        return "indentation" if indents else "whitespace"
    if first.isdigit():
        return "digits"
    if not (first.isalpha() or first == "_"):
        return "punctuation"
    goes_on = not text[0].isspace() and (before[-1:].isalnum() or before.endswith("_"))
    return "inside word" if goes_on else "word start"


def token_classes(tokenizer: Tokenizer, tokens: list[int], first: int) -> list[str]:
    """The class of every token of a text from place `first` on."""
    classes = []
    for place in range(first, len(tokens)):
        before = tokenizer.decode(tokens[max(0, place - LOOK_BACK) : place], skip_special_tokens=False)
        whole = tokenizer.decode(tokens[max(0, place - LOOK_BACK) : place + 1], skip_special_tokens=False)
        # A tokenizer may write a token differently at the start of a text, so the difference is taken.
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens[place : place + 1])
        classes.append(classify(text, before))
    return classes
