"""What the servers do with an exported head, and the exports that they cannot load or misread.

Source: the loaders of vLLM 0.33.0 and SGLang 0.5.23, run on a CPU with exported folders; llama.cpp of 2026-10, read
(ggml-org/llama.cpp#25784).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtptrain.config import ExportForm, ExportTarget
from mtptrain.errors import UserError
from mtptrain.release.config import is_release, read_config_json, stored_scales, stored_scheme
from mtptrain.release.names import Scheme
from mtptrain.release.shards import Shards

# vLLM, vllm/config/speculative.py: a path or hub name with `eagle-` or one of the others changes the method or the
# architecture of the draft, even with "method": "mtp".
VLLM_HIJACKS = ("eagle3", "eagle", "dflash", "dspark")


@dataclass(frozen=True, slots=True)
class Server:
    """The rules of one server.

    Attributes:
        name: as its project writes it.
        checked: version whose rules these are.
        runs_stacked: whether it runs more than one module.
        sampling: what it does at a temperature above 0, and the switch.
        switch: of its command, for sampled drafts; empty if it has none.
        first_position: what it does with the embedding at position 0.
        numerics: what its modules compute differently from training, as `decoding.served_as` measures it.
    """

    name: str
    checked: str
    runs_stacked: bool
    sampling: str
    switch: str
    first_position: str
    numerics: str

    @property
    def draws_greedily(self) -> bool:
        """Whether it drafts greedily at any temperature."""
        return not self.switch


WITHOUT_SWITCH = "The head was measured with greedy drafts, so the command leaves the switch out."
AS_TRAINED = "reads the embedding at position 0, as in training"
SERVERS = {
    ExportTarget.vllm: Server(
        name="vLLM",
        checked="0.33.0",
        runs_stacked=True,
        sampling='At a temperature above 0, vLLM drafts greedily without `"draft_sample_method": "probabilistic"`, and '
        "keeps about half as many drafts (docs/export.md).",
        switch='"draft_sample_method": "probabilistic"',
        first_position="zeroes the embedding at position 0 at the first draft step; only the first tokens of a text "
        "are drafted worse",
        numerics="embedding at position 0 zeroed, keys and activations in FP8",
    ),
    ExportTarget.sglang: Server(
        name="SGLang",
        checked="0.5.23",
        runs_stacked=False,
        sampling="At a temperature above 0, SGLang drafts greedily without `--speculative-use-rejection-sampling`, and "
        "keeps about half as many drafts (docs/export.md).",
        switch="--speculative-use-rejection-sampling",
        first_position=AS_TRAINED,
        numerics="keys and activations in FP8",
    ),
    ExportTarget.llama_cpp: Server(
        name="llama.cpp",
        checked="of 2026-10",
        runs_stacked=False,
        sampling="At a temperature above 0, llama.cpp drafts greedily and has no switch for it; the figures of "
        "greedy drafts are its own.",
        switch="",
        first_position=f"{AS_TRAINED}, and keeps one more key there",
        numerics="one more key before the first",
    ),
}


def check_target(target: ExportTarget, form: ExportForm, scheme: Scheme, depth: int, shards: Shards) -> None:
    """Raise a `UserError` if the target cannot load the requested export.

    Args:
        target: the server.
        form: a full folder or a draft folder.
        scheme: storage of the head.
        depth: number of modules.
        shards: tensors of the backbone's folder.
    """
    name, backbone_scheme = target.value, stored_scheme(shards)
    if form is ExportForm.draft and target is not ExportTarget.vllm:
        raise UserError(f"export.form=draft: a draft folder is written for vLLM only; use export.form=full for {name}")
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
    if depth > 1 and not SERVERS[target].runs_stacked:
        raise UserError(
            f"target={name}: {SERVERS[target].name} runs exactly one MTP module and this head has {depth}; use "
            "target=vllm"
        )
    if form is ExportForm.draft:
        _check_draft(depth, shards)


def _check_draft(depth: int, shards: Shards) -> None:
    """Refuse a draft folder whose number of modules is not that of the model: vLLM takes it from the model's config."""
    stated = read_config_json(shards.folder, shards.setting).get("num_nextn_predict_layers")
    if stated != depth:
        raise UserError(
            f"export.form=draft: the head has {depth} module(s), and vLLM takes their number from config.json of the "
            f"model, which says {stated}: it would run others than were trained; use export.form=full"
        )


def check_path(target: ExportTarget, setting: str, path: str, is_forced: bool) -> str | None:
    """Return a warning if vLLM takes an export of this path for another kind of draft.

    Args:
        target: the server.
        setting: name of the setting that gives the path.
        path: the export's final path, with its parent folders, or its name on the hub.
        is_forced: whether `export.force` allows such a path.

    Raises:
        UserError: it does, and it is not forced.
    """
    word = next((word for word in VLLM_HIJACKS if word in path.lower()), None)
    if target is not ExportTarget.vllm or word is None:
        return None
    line = f"the path contains `{word}`, from which vLLM takes the folder for another kind of draft whatever the method"
    if not is_forced:
        raise UserError(
            f"{setting}={path}: {line}; choose another name, or set export.force=true and rename it before serving"
        )
    return f"{setting}={path}: {line}: rename it before serving"


def sampling_note(server: Server, has_switch: bool) -> str:
    """Return what a server does at a temperature above 0, and that its command lacks the switch if it does."""
    return server.sampling if has_switch or server.draws_greedily else f"{server.sampling} {WITHOUT_SWITCH}"


def warnings(target: ExportTarget, shards: Shards, depth: int) -> list[str]:
    """Return what a user must know before serving the export of a head with `depth` modules."""
    lines = []
    if target is ExportTarget.vllm and stored_scheme(shards) == "fp8" and stored_scales(shards) != torch.float32:
        lines.append(
            "the model's FP8 experts have E8M0 scales, which vLLM reads as the numbers of their bytes "
            "(vllm-project/vllm#43416); releases hold them as float32"
        )
    if target is ExportTarget.vllm and depth > 1:
        lines.append(
            f"num_speculative_tokens must be a multiple of {depth}, the number of modules; beyond {depth}, vLLM starts "
            "again with module 0 and overwrites its keys, and every position is kept less often"
        )
    return lines
