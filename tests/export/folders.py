"""Exported folders written by the library's own functions, without a training run."""

from itertools import product
from pathlib import Path

from transformers import DeepseekV4Config

from mtptrain.config import ShardCopies
from mtptrain.export.folder import plan_layout, write_config, write_draft, write_full
from mtptrain.mtp.stack import MtpStack
from mtptrain.release.config import stored_scales, stored_scheme
from mtptrain.release.modules import to_release
from mtptrain.release.shards import Shards

# Every kind of folder: one module or two, in FP4 and FP8 or as -Base, a whole model or a draft folder.
FORMS = [" ".join(filter(None, words)) for words in product(("shared", "stacked"), ("", "base"), ("", "draft"))]


def export_stack(stack: MtpStack, source: Path, folder: Path, is_draft: bool = False) -> Shards:
    """Write a head as `+recipe=export` does, in the storage of the model in `source`; return the folder's tensors."""
    shards = Shards(source, "backbone.path")
    config = DeepseekV4Config.from_pretrained(source)
    head = to_release(stack.state_dict(), config, stored_scheme(shards), scale_dtype=stored_scales(shards))
    folder.mkdir(parents=True)
    if is_draft:
        write_draft(shards, head, folder, has_embeddings=False)
    else:
        write_full(shards, plan_layout(shards), head, folder, ShardCopies.hardlink)
    write_config(shards, folder, stack.depth, {})
    return Shards(folder, "folder")
