"""Rules of the servers: exports that they cannot load or misread, from their sources of 2026-11."""

from __future__ import annotations

from pathlib import Path

from mtptrain.config import ExportForm, ExportTarget
from mtptrain.errors import UserError
from mtptrain.release.config import is_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import Shards

# vLLM, vllm/config/speculative.py: guesses a draft's method from its path if that contains one of these.
VLLM_HIJACKS = ("eagle-", "eagle3", "dflash", "dspark")


def check_target(
    target: ExportTarget, form: ExportForm, scheme: Scheme, depth: int, shards: Shards, backbone_scheme: Scheme
) -> None:
    """Raise a `UserError` if the target cannot load the requested export.

    Args:
        target: the server.
        form: a full folder or a draft folder.
        scheme: storage of the head.
        depth: number of modules.
        shards: tensors of the backbone's folder.
        backbone_scheme: storage of the backbone.
    """
    name = target.value
    if form is ExportForm.draft and target is not ExportTarget.vllm:
        raise UserError(f"export.form=draft: only vLLM loads a separate draft folder; use export.form=full for {name}")
    if target is ExportTarget.hf:
        return
    if not is_release(shards):
        raise UserError(
            f"target={name}: {shards.folder} does not name its tensors as DeepSeek's releases do, which {name} "
            "requires; use target=hf, or make a release-format folder with +recipe=mini_release"
        )
    if scheme != backbone_scheme:
        raise UserError(
            f"export.scheme=bf16: {name} builds the head with the model's quantisation ({backbone_scheme}) and cannot "
            "load a bf16 head beside it; use export.scheme=target, or target=hf"
        )
    if target is ExportTarget.sglang and depth > 1:
        raise UserError(f"target=sglang: SGLang runs exactly one MTP module and this head has {depth}; use target=vllm")


def warnings(target: ExportTarget, folder: Path, depth: int) -> list[str]:
    """Return warnings for serving: a path that vLLM misreads, or more modules than its default proposer runs."""
    lines = []
    path = str(folder.absolute()).lower()
    hijacks = [word for word in VLLM_HIJACKS if word in path]
    if target is ExportTarget.vllm and hijacks:
        lines.append(
            f"output_dir contains `{hijacks[0]}`, from which vLLM infers another kind of draft; rename the "
            'folder, or give "method": "mtp" explicitly'
        )
    if target is ExportTarget.vllm and depth > 1:
        lines.append(
            f"vLLM's default proposer runs module 0 at every step; where its newer runner uses all {depth} modules, it "
            f"starts again with module 0 after step {depth}: serve at most num_speculative_tokens={depth}"
        )
    return lines
