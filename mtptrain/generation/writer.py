"""Decoding of one prompt on a screen, with a head and plainly, by the loop that evaluations certify."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from tokenizers import Tokenizer
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded, Limits
from mtptrain.decoding.speculative import Decoding, begin_decoding
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.generation.figures import Figures, comparison_line, status_line, summary_lines
from mtptrain.generation.screen import Screen
from mtptrain.generation.transcript import Transcript
from mtptrain.mtp.stack import MtpStack

WARM_UP_PASSES, TIMED_PASSES = 3, 32  # of the plain decoding that a text without a plain one is compared with


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue.

    Attributes:
        shown: its text, as the screen shows it.
        tokens: its token ids.
        seed: of its random draws.
    """

    shown: str
    tokens: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes continuations of prompts onto a screen.

    Attributes:
        model: the backbone.
        stack: the head.
        tokenizer: the backbone's.
        limits: end of the texts.
        policy: of all texts.
        draft_length: K.
        screen: shows them.
    """

    model: DeepseekV4ForCausalLM
    stack: MtpStack
    tokenizer: Tokenizer
    limits: Limits
    policy: Policy
    draft_length: int
    screen: Screen

    def time_plain(self, request: Request) -> Figures:
        """Return the figures of some passes of plain decoding, which are not shown, after warming up both ways."""
        for draft_length in (self.draft_length, 0):
            for _ in islice(self._begin(request, draft_length).passes(), WARM_UP_PASSES):
                pass
        decoding, figures = self._begin(request, 0), Figures(0)
        for (new,) in islice(decoding.passes(), TIMED_PASSES):
            assert new is not None
            figures.count(new, decoding.clock.so_far())
        return figures

    def write(self, request: Request, plain: Figures, plain_text: Decoded | None = None) -> None:
        """Show a text while it is decoded with the head, then its figures.

        Args:
            request: the prompt.
            plain: figures of plain decoding, to compare with.
            plain_text: the text of plain decoding, to compare with.
        """
        title = "" if plain_text is None else "with the head:"
        figures, text = self._show(request, self.draft_length, title, plain)
        for line in summary_lines(figures, plain):
            self.screen.print_line(line)
        if plain_text is not None:
            self.screen.print_line(comparison_line(text, plain_text, self.policy.is_greedy))

    def write_plainly(self, request: Request) -> tuple[Figures, Decoded]:
        """Show a text while it is decoded plainly; return its figures and its record."""
        return self._show(request, 0, "plain decoding:", None)

    def _show(self, request: Request, draft_length: int, title: str, plain: Figures | None) -> tuple[Figures, Decoded]:
        decoding, figures = self._begin(request, draft_length), Figures(draft_length)
        transcript = Transcript(self.tokenizer)
        self.screen.begin(title, request.shown)
        try:
            for (new,) in decoding.passes():
                assert new is not None
                figures.count(new, decoding.clock.so_far())
                self.screen.show(transcript.pieces(new), status_line(figures, plain))
            self.screen.show(transcript.rest(), status_line(figures, plain))
        finally:
            self.screen.end()
        return figures, decoding.finish().rows[0]

    def _begin(self, request: Request, draft_length: int) -> Decoding:
        proposer = head_proposer(self.model, self.stack, self.policy, draft_length) if draft_length else None
        return begin_decoding(
            self.model, proposer, [request.tokens], draft_length, self.limits, self.policy, [request.seed]
        )
