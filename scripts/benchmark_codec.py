"""Time the codecs that read and write a released MTP module, and measure their memory.

python scripts/benchmark_codec.py [threads] [experts]

The module has DeepSeek-V4-Flash's sizes with fewer experts and random codes. MB are 1e6 bytes of packed weights with
their scales. Memory is the growth of the process, as a multiple of the decoded module.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.backbone.build import preset_config
from mtptrain.release.modules import from_release, iterate_release
from mtptrain.release.names import Row, release_table
from mtptrain.release.shards import Shards


def random_stored(row: Row, generator: torch.Generator) -> Tensor:
    """Return a random stored tensor of a row, with scales in the range of trained weights."""
    low, high = (118, 124) if row.is_scale else (0, 127) if row.scale == "fp8" else (0, 256)
    if row.scale == "none":
        return torch.randn(row.shape, generator=generator).to(row.dtype)
    return torch.randint(low, high, row.shape, generator=generator, dtype=torch.uint8).view(row.dtype)


def write_module(folder: Path, config: DeepseekV4Config) -> None:
    """Write one released module."""
    generator = torch.Generator().manual_seed(0)
    rows = release_table(config)
    save_file({f"mtp.0.{row.released}": random_stored(row, generator) for row in rows}, folder / "mtp.safetensors")


def peak_memory() -> int:
    """Return the peak resident size of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(work: str, packed: int, start: tuple[float, float, int], decoded: int) -> None:
    """Print MB per second of wall time and of CPU time, and the memory peak."""
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = (peak_memory() - start[2]) / decoded
    print(
        f"{work}: {packed / 1e6 / wall:.0f} MB/s, {packed / 1e6 / cpu:.0f} MB a CPU second, peak {peak:.2f} x decoded"
    )


def main(threads: int, experts: int) -> None:
    """Read and write the module once each."""
    config = preset_config("v4_flash")
    config.n_routed_experts = experts
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        if (process := os.fork()) == 0:  # a process of its own, whose memory does not count
            write_module(Path(name), config)
            os._exit(0)
        os.waitpid(process, 0)
        shards = Shards(Path(name), "benchmark")
        packed = sum(entry.end - entry.begin for entry in shards.entries.values())
        start = (time.perf_counter(), time.process_time(), peak_memory())
        state = from_release(shards, config)
        decoded = sum(tensor.nbytes for tensor in state.values())
        print(f"{packed / 1e9:.2f} GB packed, {decoded / 1e9:.2f} GB decoded, {threads} thread(s)")
        report("decode", packed, start, decoded)
        start = (time.perf_counter(), time.process_time(), start[2])
        for _ in iterate_release(state, config, "fp8_fp4"):
            pass
        report("encode", packed, start, decoded)


if __name__ == "__main__":
    main(*(int(text) for text in [*sys.argv[1:], *["2", "16"][len(sys.argv) - 1 :]]))
