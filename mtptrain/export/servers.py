"""What servers accept, and what they misread: rules as data, read in their sources in 2026-11."""

from __future__ import annotations

from pathlib import Path

from mtptrain.config import ExportForm, ExportTarget
from mtptrain.errors import UserError
from mtptrain.release.config import is_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import Shards

# vLLM, vllm/config/speculative.py: a draft's method is guessed from its path where it holds one of these.
VLLM_HIJACKS = ("eagle-", "eagle3", "dflash", "dspark")


def check_target(target: ExportTarget, form: ExportForm, scheme: Scheme, depth: int, shards: Shards, own: str) -> None:
    """Raise a `UserError` where the target could not load what is asked for.

    Args:
        target: the server.
        form: a full folder or a draft's.
        scheme: how the head would be stored.
        depth: its modules.
        shards: the backbone's folder.
        own: how the backbone is stored.
    """
    name = target.value
    if form is ExportForm.draft and target is not ExportTarget.vllm:
        raise UserError(f"export.form=draft: only vLLM loads a separate draft folder; use export.form=full for {name}")
    if target is ExportTarget.hf:
        return
    if not is_release(shards):
        raise UserError(
            f"target={name}: {shards.folder} does not name its tensors as DeepSeek's releases do, which {name} asks "
            "for; use target=hf, or make a release-format folder with +recipe=mini_release"
        )
    if scheme != own:
        raise UserError(
            f"export.scheme=bf16: {name} builds the head with the model's quantisation ({own}) and cannot load a bf16 "
            "head beside it; use export.scheme=target, or target=hf"
        )
    if target is ExportTarget.sglang and depth > 1:
        raise UserError(f"target=sglang: SGLang runs exactly one MTP module and this head has {depth}; use target=vllm")


def warnings(target: ExportTarget, folder: Path, depth: int) -> list[str]:
    """What the person who serves the folder should know."""
    found = []
    path = str(folder.absolute()).lower()
    hijacks = [word for word in VLLM_HIJACKS if word in path]
    if target is ExportTarget.vllm and hijacks:
        found.append(
            f"output_dir holds `{hijacks[0]}`, from which vLLM takes the head for another kind of draft; rename the "
            'folder, or give "method": "mtp" explicitly'
        )
    if target is ExportTarget.vllm and depth > 1:
        found.append(
            f"vLLM's default proposer runs module 0 at every step; where its newer runner uses all {depth} modules, it "
            f"begins again with module 0 after step {depth}: serve at most num_speculative_tokens={depth}"
        )
    return found
