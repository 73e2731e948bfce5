"""`+recipe=mini_release`: write a small backbone and its head in the official release format, to try import and export.

python -m mtptrain +recipe=mini_release output_dir=R
python -m mtptrain +recipe=distill backbone.path=R
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.build import build_model
from mtptrain.backbone.load import SHIPPED, load_backbone, open_source
from mtptrain.config import ReleaseSize, RunConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, settings
from mtptrain.export.folder import copy_companions, write_shards
from mtptrain.export.miniature import SERVABLE, miniature_config, miniature_groups
from mtptrain.mtp.stack import fresh_stack, num_modules
from mtptrain.mtp.start import check_stock, stock_tensors
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.storage import write_json

FOLDER = FolderUse.whole


def reads(config: RunConfig) -> Settings:
    """Return the settings that a miniature reads: of a random one its shape and seed, otherwise its backbone."""
    if config.release.size is ReleaseSize.servable:
        return ALWAYS | settings("release", "seed")
    if config.release.random:
        return ALWAYS | settings("backbone.shape", "release", "seed")
    unread = {"seed", "device", "precision", "threads", "backbone.weights", "release.size"}
    return ALWAYS | (settings("release") | of_backbone(config)) - unread


def check(config: RunConfig) -> None:
    """Refuse sizes of which no random backbone can be built."""
    if config.release.random:
        config.backbone.shape.require_computable()


def run(session: Session) -> None:
    """Write the folder, whole or not at all."""
    config, run_folder = session.config, session.folder
    cpu = torch.device("cpu")
    head: dict[str, Tensor]
    if config.release.random:
        shape = SERVABLE if config.release.size is ReleaseSize.servable else config.backbone.shape
        model: DeepseekV4ForCausalLM = build_model(shape, config.seed, cpu)
        head, companions = fresh_stack(model, 1, config.seed).state_dict(), SHIPPED / "tiny"
    else:
        source = open_source(config.backbone)
        check_stock(source)
        backbone = load_backbone(config.backbone, cpu, torch.float32, source=source)
        model, head, companions = backbone.model, stock_tensors(backbone), backbone.folder
    groups = miniature_groups(model, head, config.release.variant)
    folder = run_folder.path
    with run_folder.write_whole() as temporary:
        write_shards(temporary, groups)
        write_json(temporary / "config.json", miniature_config(model.config, config.release.variant, num_modules(head)))
        copy_companions(companions, temporary)
    count = sum(len(tensors) for tensors in groups)
    run_folder.print_status(
        f"wrote {count} tensors in {len(groups)} shards to {folder}; use it with backbone.path={folder}"
    )
