"""The figures of a text while it is decoded, as lines."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtptrain.decoding.results import Decoded, NewTokens, Seconds

SHORTEST = 1e-9  # seconds: a broken clock must not end a run


@dataclass(slots=True)
class Figures:
    """Counts and time of a text so far.

    Attributes:
        draft_length: K; 0 for plain decoding.
        tokens: emitted; the first comes from the prompt's own pass, which is no verify pass.
        passes: verify passes.
        accepted, drafted: drafted tokens that were kept, and all of them.
        seconds: after the prompt's pass.
    """

    draft_length: int
    tokens: int = 0
    passes: int = field(default=-1)  # the prompt's pass is counted first
    accepted: int = 0
    drafted: int = 0
    seconds: float = 0.0

    def count(self, new: NewTokens, seconds: Seconds) -> None:
        """Count a pass; `seconds` are those of the run so far."""
        self.tokens += len(new.emitted)
        self.passes += 1
        self.accepted += len(new.accepted)
        self.drafted += len(new.accepted) + len(new.rejected)
        self.seconds = seconds.total - seconds.prefill

    @property
    def tokens_a_pass(self) -> float | None:
        """Mean tokens of a verify pass; None before the first."""
        return (self.tokens - 1) / self.passes if self.passes > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second after the prompt's pass; None before the first verify pass."""
        return (self.tokens - 1) / max(self.seconds, SHORTEST) if self.passes > 0 else None


def status_line(figures: Figures, plain: Figures | None) -> str:
    """Return the figures so far on one line; `plain` are those of plain decoding, to compare with."""
    rate = figures.tokens_per_second
    if rate is None:
        return ""
    parts = [f"{figures.tokens} tokens", f"{rate:.0f} tokens/s"]
    if figures.draft_length:
        parts.insert(1, f"{figures.tokens_a_pass:.2f} tokens a pass")
        parts += [f"{speed_up:.2f}x plain decoding"] if (speed_up := _speed_up(figures, plain)) else []
    return "  ".join(parts)


def summary_lines(figures: Figures, plain: Figures | None) -> list[str]:
    """Return the figures of a speculative text, and of the plain one that it is compared with."""
    length, rate = figures.tokens_a_pass, figures.tokens_per_second
    if length is None or rate is None:
        return ["the text ended with the prompt's own pass: nothing was drafted"]
    lines = [
        f"{figures.tokens} tokens in {figures.passes} passes after the prompt's: {length:.2f} tokens a pass at "
        f"K={figures.draft_length}; {figures.accepted} of {figures.drafted} drafts accepted"
    ]
    plain_rate = None if plain is None else plain.tokens_per_second
    speed_up = _speed_up(figures, plain)
    if plain is None or plain_rate is None or speed_up is None:
        return [*lines, f"{rate:.0f} tokens/s; plain decoding was not timed"]
    against = f"{rate:.0f} tokens/s, plain decoding {plain_rate:.0f} (over {plain.tokens} tokens)"
    return [*lines, f"speed-up {speed_up:.2f}x: {against}, both without the prompt's pass"]


def _speed_up(figures: Figures, plain: Figures | None) -> float | None:
    rate, plain_rate = figures.tokens_per_second, None if plain is None else plain.tokens_per_second
    return rate / plain_rate if rate and plain_rate else None


def comparison_line(speculative: Decoded, plain: Decoded, is_greedy: bool) -> str:
    """Return whether both texts are the same and, if not, where they part and why that may be."""
    count = len(speculative.tokens)
    if speculative.tokens == plain.tokens:
        return f"both texts are identical: {count} tokens"
    pairs = zip(speculative.tokens, plain.tokens, strict=False)
    first = next((at for at, (one, other) in enumerate(pairs) if one != other), min(count, len(plain.tokens)))
    if not is_greedy:
        return (
            f"the texts part at token {first + 1}: sampling uses its random draws in another order, so only the "
            "distribution of the texts is the same; at decoding.temperature=0 the texts are"
        )
    gap = plain.gaps[first] if first < len(plain.gaps) else 0.0
    return (
        f"THE TEXTS PART at token {first + 1}, where the backbone's two likeliest tokens differ by {gap:.2g} in their "
        "logits; +recipe=evaluate tells a tie in rounding from an error"
    )
