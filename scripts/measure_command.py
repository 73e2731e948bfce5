"""Run a command and write its peak memory and its seconds as cells of a table: measure_command.py FILE COMMAND...

Ends with the command's exit code, and writes no file unless that is 0 or 3 (a result that failed its own check).
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

GIGABYTE = 1e9
SOUND = (0, 3)  # 3: doctor or the certificate found something; the command itself did all its work


def gpu_memory() -> float | None:
    """Return the memory in use on the first GPU, by all processes, in GB; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return int(answer.stdout) * 2**20 / GIGABYTE if answer.returncode == 0 else None


def main(file: Path, command: list[str]) -> int:
    """Run the command to its end, looking at the GPU twice a second."""
    begun, highest = time.monotonic(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        highest = max(highest, gpu_memory() or 0.0)
        time.sleep(0.5)
    seconds = time.monotonic() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    gpu = f"{highest:.1f} GB" if highest else "-"
    cpu = used.ru_utime + used.ru_stime
    if process.returncode in SOUND:
        file.write_text(f"{used.ru_maxrss * 1024 / GIGABYTE:.1f} GB | {gpu} | {cpu:.0f} | {seconds:.0f}")
    return 0 if process.returncode in SOUND else process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python scripts/measure_command.py FILE COMMAND...")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
