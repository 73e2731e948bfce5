r"""Print the host memory of every process while it loads a backbone and a head: its share, the peak and what remains.

Start it as a launcher starts a training:
python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/measure_load.py backbone.path=R \
    backbone.placement=expert_parallel precision=bf16

With `mtp.experts`, `mtp.init` (`stock`, `fresh` or `backbone`) or `mtp.depth` it goes on to load a head for training.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.config import BackboneConfig, Device, MtpConfig, Precision, RunConfig
from mtptrain.mtp.expert_parallel import whole_digest
from mtptrain.mtp.start import initial_stack, stock_head
from mtptrain.run.distributed import choose_device, choose_dtype, join, rank

MEGABYTE = 1e6


def anonymous_memory() -> float:
    """Return the memory of this process that no file backs, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / MEGABYTE


class Peak:
    """The highest anonymous memory inside a `with` block, above that at its beginning, in MB."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that a process keeps would hide new tensors
        self.begun = anonymous_memory()
        self.highest, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.after = anonymous_memory() - self.begun

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.highest = max(self.highest, anonymous_memory() - self.begun)
            time.sleep(0.001)


def share(model: torch.nn.Module) -> float:
    """Return the size of the parameters that this process holds, in MB."""
    local = [getattr(weight, "ds_tensor", weight) for weight in model.parameters()]
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in local]
    return sum(weight.numel() * weight.element_size() for weight in local) / MEGABYTE


def main(settings: list[str]) -> None:
    """Load what settings name, `backbone.*`, `mtp.*`, `precision` and `device`, and print this process's lines."""
    given = OmegaConf.from_dotlist(settings)
    if unread := sorted(given.keys() - {"backbone", "mtp", "precision", "device"}):
        sys.exit(f"measure_load: {unread[0]}: is not read; give backbone.*, mtp.*, precision or device")
    backbone, mtp = (
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given.get(name, {})))
        for name, kind in (("backbone", BackboneConfig), ("mtp", MtpConfig))
    )
    assert isinstance(backbone, BackboneConfig)
    assert isinstance(mtp, MtpConfig)
    precision, device_name = Precision(given.get("precision", "auto")), Device(given.get("device", "auto"))
    config = RunConfig(task="collect", backbone=backbone, precision=precision, device=device_name)
    join(config, "any")
    torch.set_num_threads(1)
    device = choose_device(config.device)
    with Peak() as peak:
        loaded = load_backbone(backbone, device, choose_dtype(config.precision, device))
    report(backbone.placement.value, loaded.model, peak)
    if "mtp" in given:
        load_head(loaded, mtp)


def load_head(backbone: Backbone, mtp: MtpConfig) -> None:
    """Load and identify a head as a training starts with it, and print this process's line."""
    with Peak() as peak:
        stack = initial_stack(mtp, backbone, stock_head(backbone) if mtp.init == "stock" else None, 0)
        whole_digest(stack)
    report(f"head, mtp.init={mtp.init}, {mtp.experts.value}", stack, peak)


def report(what: str, module: torch.nn.Module, peak: Peak) -> None:
    """Print this process's share of a module, and the memory that its loading took."""
    highest = max(peak.highest, peak.after)
    print(
        f"process {rank()}, {what}: share {share(module):.0f} MB, peak {highest:.0f} MB, after {peak.after:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
