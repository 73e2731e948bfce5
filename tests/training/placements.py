"""Compare the streams of a backbone that several processes share with those of a whole backbone.

python -m torch.distributed.run --nproc-per-node 2 -m tests.training.placements BACKBONE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mtptrain.backbone.load import load_backbone
from mtptrain.backbone.streams import backbone_streams
from mtptrain.config import PARTITIONED_PLACEMENTS, BackboneConfig, RunConfig, TrainConfig
from mtptrain.run.distributed import join, rank
from tests.tiny import random_batch

# The processes differ in their number of pieces, hence of forwards, and in the compressors whose windows fill.
ROWS = [[[24], [24]], [[1, 2, 5, 9], [24]], [[3], [2]]]


def main(backbone: Path, folder: Path) -> None:
    """Save the largest difference, and the share of an expert tensor in this process, by placement and dtype."""
    join(RunConfig(task="distill", train=TrainConfig(batch_size=2)), processes="any")
    torch.set_num_threads(1)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_backbone(BackboneConfig(path=str(backbone)), torch.device("cpu"), dtype).model
        order = [(turn, ROWS[(turn + rank()) % len(ROWS)]) for turn in range(len(ROWS))]
        batches = [random_batch(whole.config.vocab_size, rows, 24, seed=turn) for turn, rows in order]
        with torch.no_grad():
            expected = [backbone_streams(whole, batch) for batch in batches]
        for placement in PARTITIONED_PLACEMENTS:
            config = BackboneConfig(path=str(backbone), placement=placement)
            shared = load_backbone(config, torch.device("cpu"), dtype).model
            differences = []
            for batch, rights in zip(batches, expected, strict=True):
                with torch.no_grad():
                    pairs = zip(backbone_streams(shared, batch), rights, strict=True)
                differences.extend(((left - right).norm() / right.norm()).item() for left, right in pairs)
            experts = shared.model.layers[1].mlp.experts.gate_up_proj
            local = (experts.ds_tensor if hasattr(experts, "ds_tensor") else experts.to_local()).numel()
            share = local / whole.model.layers[1].mlp.experts.gate_up_proj.numel()
            results[placement.value, str(dtype)] = (max(differences), share)
    torch.save(results, folder / f"placements_{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
