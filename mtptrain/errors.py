"""Exceptions that end a run in a known way: a mistake of the user, or preemption."""

# Exit codes. 3: the result is written and says that something is wrong, a fault of a head or a certificate that failed.
# 75 is EX_TEMPFAIL of sysexits.h: try again later; 130 is that of a shell after SIGINT.
USER_MISTAKE, CHECK_FAILED, PREEMPTED, INTERRUPTED = 2, 3, 75, 130


class UserError(ValueError):
    """A wrong setting, file or value. The message names it, the rule that it breaks and the way out.

    The command line prints the message as one line and ends with exit code 2. Any other exception is a bug in mtptrain
    and keeps its traceback.
    """


class SharedMistake(UserError):
    """A mistake that every process of the run meets by itself, so none has to be told of it."""


class Preempted(Exception):
    """A signal ended the run after its work was saved. The message is a sentence about the work on disk.

    Args:
        kept: the message.
        is_by_user: whether the signal was Ctrl-C; otherwise a scheduler preempted the run.
    """

    def __init__(self, kept: str, is_by_user: bool = False) -> None:
        super().__init__(kept)
        self.is_by_user = is_by_user
