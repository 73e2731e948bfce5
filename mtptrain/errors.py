"""Exceptions that end a run in a known way: a mistake of the user, or preemption."""


class UserError(ValueError):
    """A wrong setting, file or value. The message names it, the rule that it breaks and the way out.

    The command line prints the message as one line and ends with exit code 2. Any other exception is a bug in mtptrain
    and keeps its traceback.
    """


class Preempted(Exception):
    """A signal preempted the run, and its state is saved."""
