"""`+recipe=generate`: show a text while a head drafts and the backbone verifies it.

python -m mtptrain +recipe=generate prompt="def mean(" checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from mtptrain.backbone.traced import BREAK_EVEN, repeated
from mtptrain.config import RunConfig
from mtptrain.config.reads import TEMPLATE, Settings, of_backbone, of_decoding, settings
from mtptrain.decoding.draws import row_seed
from mtptrain.errors import UserError
from mtptrain.generation.prompts import is_typed, read_lines
from mtptrain.generation.screen import Screen, open_screen
from mtptrain.generation.writer import Request, Writer
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import check_room
from mtptrain.run.folder import FolderUse
from mtptrain.run.tables import open_console
from mtptrain.traces.prompts import PromptRow, encode_prompt_row

PROCESSES = "led"
FOLDER = FolderUse.none


def reads(config: RunConfig) -> Settings:
    """Return the settings that a generation reads; it writes no file, so it has no output folder."""
    used = settings("task", "prompt", "checkpoint", "generate") | of_backbone(config) | of_decoding(config)
    return used if config.generate.raw else used | settings(*TEMPLATE)


def check(config: RunConfig) -> None:
    """Refuse a generation without a head."""
    if config.checkpoint is None:
        raise UserError("checkpoint=null: generate needs a head; give a run folder, a step_* folder, or `stock`")


def encode(session: Session, prompt: str, number: int) -> Request:
    """Return a prompt as tokens: a conversation's first turn if there is a chat template, else a text as it is.

    Raises:
        UserError: the prompt is empty or too long, or the template rejects it.
    """
    if not prompt.strip():
        raise UserError("prompt=: is empty; give a text to continue")
    chat = None if session.config.generate.raw else session.chat
    messages = [{"role": "user", "content": prompt}] if chat else []
    row = PromptRow("prompt", "prompt", "" if chat else prompt, messages)
    source = session.source
    tokens = encode_prompt_row(row, 0, source.tokenizer, source.bos_eos[0], chat).prompt.tokens
    check_room("prompt", tokens, session.prompt_room)
    return Request("" if chat else prompt, tokens, row_seed(session.config.seed, number))


def requests(session: Session) -> Iterator[Request]:
    """Yield the prompt of the settings, or one for each line of standard input; a typed one may be refused.

    Raises:
        UserError: the prompt cannot be continued, or standard input holds none.
    """
    prompt = session.config.prompt
    if prompt is not None:
        yield encode(session, prompt, 0)
        return
    for number, line in enumerate(read_lines(sys.stdin)):
        try:
            yield encode(session, line, number)
        except UserError as error:
            if not is_typed(sys.stdin):
                raise UserError(f"prompt {number + 1} of standard input: {error}") from None
            print(f"mtptrain: {error}", file=sys.stderr)


def write_all(session: Session, screen: Screen) -> None:
    """Continue every prompt on the screen."""
    config, plain_figures = session.config, None
    if config.prompt is not None:
        encode(session, config.prompt, 0)  # before weights are loaded
    head = session.head(str(config.checkpoint))
    writer = Writer(
        model=session.backbone.model,
        stack=head.stack,
        tokenizer=session.source.tokenizer,
        limits=session.limits,
        policy=session.policy,
        draft_length=config.decoding.draft_length,
        screen=screen,
    )
    screen.legend()
    for request in requests(session):
        plain_figures = plain_figures or writer.time_plain(request)
        if config.generate.plain:
            figures, text = writer.write_plainly(request)
            writer.write(request, figures, text)
        else:
            writer.write(request, plain_figures)


def run(session: Session) -> None:
    """Write the texts until the prompts end; a reader that closes the pipe ends them, too."""
    generate = session.config.generate
    screen = open_screen(generate.show, generate.pace, open_console())
    try:
        with repeated(BREAK_EVEN):  # steps are recorded at once, plain and speculative ones alike
            write_all(session, screen)
    except BrokenPipeError:
        leave_pipe()


def leave_pipe() -> None:
    """Send what is left of standard output to nowhere: Python flushes it once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
