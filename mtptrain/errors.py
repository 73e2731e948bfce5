"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A wrong setting, file or value: the message names it, the rule it breaks and the way out.

    The command line prints the message as one line and ends with exit code 2. Everything else that is raised is a
    fault of ours and keeps its traceback.
    """


class Preempted(Exception):
    """The run was asked to leave, and has saved its state."""
