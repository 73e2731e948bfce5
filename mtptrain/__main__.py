"""Entry point of `python -m mtptrain`."""

import atexit
import os
import sys

from mtptrain.cli import main


def run() -> int:
    """Run the program and return its exit code."""
    try:
        main()
    except SystemExit as ending:
        if not isinstance(ending.code, int):
            raise
        return ending.code
    return 0


code = run()
if "RANK" in os.environ:
    # One of several processes: threads that libraries leave behind can abort Python's teardown ("terminate called
    # without an active exception", pytorch issue 190489), and the launcher would report a finished run as failed.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
