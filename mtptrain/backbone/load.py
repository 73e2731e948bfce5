"""Open a backbone: folder, config and tokenizer with `open_source`, the frozen weights with `load_backbone`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import DeepseekV4Config
from transformers.utils import logging as transformers_logging

from mtptrain.backbone.frozen import DeepseekV4ForCausalLM
from mtptrain.backbone.memory import check_room, weight_bytes
from mtptrain.backbone.modules import replace_experts
from mtptrain.backbone.placement import check_experts, is_shared, partition, placement_options
from mtptrain.config import BackboneConfig, Placement, StoredWeights, require
from mtptrain.data.text_ends import TextEnds, read_text_ends
from mtptrain.data.tokenizer import load_tokenizer
from mtptrain.errors import UserError
from mtptrain.release.config import check_config, check_scales, read_config_json
from mtptrain.release.family import check_family
from mtptrain.release.fingerprint import fingerprint
from mtptrain.release.shards import Shards, head_name
from mtptrain.run.distributed import on_rank0
from mtptrain.run.hub import HUB_ID, summary
from mtptrain.run.lost import lost_process_reason
from mtptrain.run.progress import waiting

SHIPPED = Path(__file__).parent / "shipped"
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
# The config fields that describe the decoder layers, with their values for a model without any.
LAYER_FIELDS: dict[str, Any] = {"num_hidden_layers": 0, "layer_types": [], "mlp_layer_types": []}
# Prefixes of their tensors, as transformers saves them and as DeepSeek releases them.
LAYER_PREFIXES = ("model.layers.", "layers.")


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """A backbone's folder with its config, tokenizer and list of tensors, before any weight is read.

    Attributes:
        folder: holds config.json, the tokenizer and the weights.
        config: transformers' config.
        tokenizer: from the same folder.
        ends: the tokens at both ends of a text.
        shards: every tensor of the folder, including those of a head.
    """

    folder: Path
    config: DeepseekV4Config
    tokenizer: Tokenizer
    ends: TextEnds
    shards: Shards

    @property
    def bos_eos(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after a training document."""
        return self.ends.begin, self.ends.close


def open_source(config: BackboneConfig) -> BackboneSource:
    """Open a backbone's folder without reading its weights.

    Raises:
        UserError: the folder is missing; its config, its tokenizer or a header of its files is missing, damaged or of
            another model; or `backbone.weights=keep` has nothing to keep.
    """
    folder = backbone_folder(config)
    model_config = read_model_config(folder)
    require(
        config.weights is not StoredWeights.keep or hasattr(model_config, "quantization_config"),
        "backbone.weights",
        config.weights.value,
        f"keeps FP8 and FP4 weights as they are stored, and {folder} holds none; leave it at auto",
    )
    size, end = model_config.vocab_size, model_config.eos_token_id
    tokenizer = load_tokenizer(folder, size)
    ends = read_text_ends(folder, tokenizer, model_config.bos_token_id, end, size)
    shards = Shards(folder, f"backbone.path={folder}")
    check_config(shards)
    check_scales(shards)
    return BackboneSource(folder, model_config, tokenizer, ends, shards)


def read_model_config(folder: Path) -> DeepseekV4Config:
    """Read config.json as a DeepSeek-V4 config.

    Raises:
        UserError: the file is damaged, or describes another model or a quantisation that is not read.
    """
    setting = f"backbone.path={folder}"
    check_family(read_config_json(folder, setting), folder, setting)
    try:
        return DeepseekV4Config.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        summary = " ".join(str(error).split())[:300]
        raise UserError(f"{setting}: config.json is not DeepSeek-V4's ({summary})") from error


def backbone_folder(config: BackboneConfig) -> Path:
    """Return the folder of the configured backbone; download a hub id unless the hub's cache already has it.

    Raises:
        UserError: the folder does not exist, or the preset is not shipped and no path was given.
    """
    if config.path is None:
        folder = SHIPPED / config.name
        if not folder.is_dir():
            raise UserError(
                f"backbone={config.name}: is not shipped; train it with `+recipe=backbone backbone={config.name}` and "
                "set backbone.path to the folder that it writes"
            )
        return folder
    folder = Path(config.path)
    if not folder.exists() and HUB_ID.fullmatch(config.path):
        folder = _from_hub(config.path, config.revision)
    if not (folder / "config.json").is_file():
        trained = folder / "backbone"  # of +recipe=backbone
        hint = f"; did you mean backbone.path={trained}?" if (trained / "config.json").is_file() else ""
        raise UserError(
            f"backbone.path={folder}: holds no config.json; give the folder of a DeepSeek-V4 checkpoint{hint}"
        )
    return folder


def smaller_backbone(config: BackboneConfig) -> BackboneConfig:
    """Return the backbone that a deeper one begins with: `backbone.grow_from`, a shipped name or a path."""
    name = str(config.grow_from)
    is_shipped = (SHIPPED / name).is_dir()
    return BackboneConfig(name=name) if is_shipped else BackboneConfig(path=name)


def _from_hub(name: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's client raises its own, the network's and the system's types
        raise UserError(
            f"backbone.path={name}: is no folder here and could not be downloaded from the hub at "
            f"backbone.revision={revision} ({summary(error)}); download it on a machine with a "
            "network and give the folder"
        ) from None


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen backbone.

    Attributes:
        model: transformers' model in eval mode; no parameter requires a gradient.
        source: its folder, config, tokenizer and list of tensors.
        fingerprint: hash of config and weights without `mtp.*`; heads trained on this backbone carry it.
    """

    model: DeepseekV4ForCausalLM
    source: BackboneSource
    fingerprint: str

    @property
    def shards(self) -> Shards:
        """Every tensor of the folder, including those of a head."""
        return self.source.shards

    @property
    def folder(self) -> Path:
        """The folder that the weights were read from."""
        return self.source.folder

    @property
    def config(self) -> DeepseekV4Config:
        """The model's config."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The backbone's tokenizer."""
        return self.source.tokenizer


def load_backbone(
    config: BackboneConfig,
    device: torch.device,
    dtype: torch.dtype,
    has_layers: bool = True,
    source: BackboneSource | None = None,
) -> Backbone:
    """Load a backbone and freeze it.

    FP8 and FP4 weights of a release either stay in the form that transformers computes on, or are decoded while they
    are read (`backbone.weights`).

    Args:
        config: path, revision, placement and handling of quantised weights.
        device: device of the model.
        dtype: torch.bfloat16 or torch.float32, of all weights that are not kept quantised.
        has_layers: False reads embedding, hc_head, final norm and lm_head only.
        source: result of `open_source`; None opens it here.

    Raises:
        UserError: files are missing or damaged, or a tensor has no counterpart in the model or in the files.
    """
    source = source or open_source(config)
    folder, shards = source.folder, source.shards
    if has_layers:
        _check_layers(config, source, device, dtype)
    model = _load_model(config, folder, device, dtype, has_layers)
    model.eval().requires_grad_(False)
    if has_layers and config.placement is Placement.zero3:
        partition(model, device)
    if not is_shared(model):
        replace_experts(model)
    return Backbone(model, source, on_rank0(lambda: fingerprint(shards)))


def _check_layers(config: BackboneConfig, source: BackboneSource, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, before any weight is read, a placement of the layers that this machine cannot have."""
    num_experts = source.config.n_routed_experts
    if config.placement is Placement.expert_parallel:
        check_experts(num_experts, "backbone.placement", "zero3, which does not decode")
    is_kept = keeps_quantised(config, source.config, device)
    require(
        not (is_kept and config.placement is Placement.zero3 and device.type == "cpu"),
        "backbone.weights",
        "keep",
        "leaves FP8 tensors, which processes without a GPU cannot send to each other as backbone.placement=zero3 does; "
        "set backbone.weights=dequantize, or backbone.placement=expert_parallel",
    )
    is_decoded = not is_kept and hasattr(source.config, "quantization_config")
    sizes = weight_bytes(source.shards, None if is_kept else dtype)
    check_room(sizes, config.placement, num_experts, device, is_decoded)


def _load_model(
    config: BackboneConfig, folder: Path, device: torch.device, dtype: torch.dtype, has_layers: bool
) -> DeepseekV4ForCausalLM:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model_config = whole_config = _set_quantisation(config, read_model_config(folder), device)
    if not has_layers:
        model_config = copy.deepcopy(whole_config)
        for name, value_without_layers in LAYER_FIELDS.items():
            setattr(model_config, name, value_without_layers)
    placement = config.placement if has_layers else Placement.replicate
    options = placement_options(placement, device, int(model_config.num_hidden_layers))
    try:
        with _counting_weights(f"loading the backbone from {folder}"):
            loaded: Any = DeepseekV4ForCausalLM.from_pretrained(
                folder,
                config=model_config,
                dtype=dtype,
                **options,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report then lists them, and the check below refuses them
            )
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many types
        if lost_process_reason(error) is not None:
            raise
        summary = " ".join(str(error).split())[:300]
        raise UserError(f"backbone.path={folder}: cannot be loaded as DeepSeek-V4 ({summary})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_report(report, folder, has_layers, whole_config.num_hidden_layers)
    if not has_layers:
        model.config = copy.deepcopy(model.config)  # keeps settings that loading added, e.g. the experts' kernels
        for name in LAYER_FIELDS:
            setattr(model.config, name, getattr(whole_config, name))
    if dtype == torch.float32:  # transformers leaves the bf16 tensors of a quantised release in bf16
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
    return model


@contextmanager
def _counting_weights(label: str) -> Iterator[None]:
    """Wait for transformers to read weights, with its own count of them as the share that is done."""
    share = 0.0

    def count(_: Callable[..., Any], arguments: tuple[Any, ...], __: dict[str, Any]) -> Iterator[Any]:
        nonlocal share
        steps = list(arguments[0])
        for done, step in enumerate(steps):
            share = done / len(steps)
            yield step

    previous = transformers_logging.set_tqdm_hook(count)
    try:
        with waiting(label, lambda: share):
            yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _check_report(report: dict[str, Any], folder: Path, has_layers: bool, num_layers: int) -> None:
    """Raise a `UserError` for keys of transformers' loading report that only the model or only the files have.

    A head's tensors are not the model's; transformers ignores those below `mtp.` and reports other prefixes.
    """
    for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report.get(problem) or [] if head_name(str(name), num_layers) is None)
        if not has_layers:
            names = [name for name in names if not name.startswith(LAYER_PREFIXES)]
        if names:
            raise UserError(
                f"backbone.path={folder}: {len(names)} {problem.replace('_', ' ')}, e.g. {', '.join(names[:3])}; "
                "config.json and the weights do not belong together"
            )


def _set_quantisation(config: BackboneConfig, model_config: DeepseekV4Config, device: torch.device) -> DeepseekV4Config:
    """Set in a model's config whether quantised weights are decoded while they are read, or when they are used."""
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return model_config
    if keeps_quantised(config, model_config, device):
        from mtptrain.backbone.kept import METHOD  # registers it

        model_config.quantization_config = {**quantization, "dequantize": False, "quant_method": METHOD}
    else:
        model_config.quantization_config = {**quantization, "dequantize": True}
    return model_config


def keeps_quantised(config: BackboneConfig, model_config: DeepseekV4Config, device: torch.device) -> bool:
    """Return whether FP8 and FP4 weights stay in memory as they are stored."""
    is_chosen = config.weights is StoredWeights.keep or (config.weights is StoredWeights.auto and device.type != "cpu")
    return is_chosen and hasattr(model_config, "quantization_config")
