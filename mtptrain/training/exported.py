"""Exported heads as checkpoints, from a folder or from the hub: tensors and identity, but no state to continue from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.mtp.tensors import HeadTensors
from mtptrain.release.modules import ReleasedModules, from_release
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.run.artifact import Kind, open_artifact
from mtptrain.run.hub import download_model
from mtptrain.training.checkpoint import EXPORT_MANIFEST, MANIFEST, OPTIMIZER, RANDOM, TENSORS, Checkpoint, HeadIdentity
from mtptrain.training.selection import SELECTION

EXPORTED: Kind[HeadIdentity, Any] = Kind(
    name="exported model",
    schema=3,
    identity=HeadIdentity,
    content=dict[str, Any],
    settings={"backbone": BACKBONE_CHOICE},
    manifest=EXPORT_MANIFEST,
    missing="give the folder of +recipe=export",
    damaged="export it anew",
    repair="export it anew",
)
OF_A_RUN = [f"{folder}{file}" for folder in ("", "*/") for file in (MANIFEST, RANDOM, f"{TENSORS}*", f"{OPTIMIZER}*")]


class ExportedHead(Checkpoint):
    """A head in the folder of an export, stored in the model's format."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, decoded to fp32."""
        return from_release(self._released(), DeepseekV4Config.from_pretrained(self.folder), torch.float32)

    def head(self) -> HeadTensors:
        """Return the stored tensors, decoded to fp32 when they are read."""
        return ReleasedModules(self._released(), DeepseekV4Config.from_pretrained(self.folder))

    def _released(self) -> Mapping[str, Tensor]:
        return Shards(self.folder, f"checkpoint={self.folder}").only(HEAD_PREFIX)


def open_exported(folder: Path) -> Checkpoint:
    """Return the head of an exported folder after verifying its manifest and the head's files.

    Raises:
        UserError: the folder is damaged, or no export of this version.
    """
    artifact = open_artifact(EXPORTED, "checkpoint", folder)
    artifact.verify(artifact.content["head_files"])
    return ExportedHead(folder, artifact.identity, 0, {SELECTION: artifact.content[SELECTION]})


def download_head(address: Path) -> Path:
    """Return the folder of a head on the hub: an export without its model's shards, or checkpoints of a run.

    Raises:
        UserError: the hub does not give it.
    """
    folder = download_model(address, [EXPORT_MANIFEST, *OF_A_RUN], "checkpoint")
    if (folder / EXPORT_MANIFEST).is_file():
        head_files = open_artifact(EXPORTED, "checkpoint", folder).content["head_files"]
        return download_model(address, [EXPORT_MANIFEST, "config.json", *head_files], "checkpoint")
    return folder
