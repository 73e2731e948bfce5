"""SGLang's MTP module on a CPU, as its draft worker makes it: constructors and `load_weights` of the published wheel.

python -m tests.servers.sglang_module SOURCE FOLDER...

SOURCE holds the wheel's files and msgspec; a FOLDER is an exported model. FOLDER.parameters.safetensors holds every
parameter after loading, FOLDER.json the config that SGLang made of the folder, and its warnings. It runs in a process
of its own, since SGLang keeps global state and changes transformers.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import is_torchvision_available

from tests.servers.absent import install

# Packages and modules that loading weights does not use. Without a GPU there are no wheels of the kernels (sgl_kernel,
# tvm_ffi) to use either.
ABSENT = ["sgl_kernel", "tvm_ffi", "torchvision", "compressed_tensors", "gguf", "sentencepiece", "aiohttp", "starlette"]
ABSENT += ["orjson", "pybase64", "zmq", "IPython", "traitlets"]
ABSENT += ["sglang.srt.constrained", "sglang.srt.entrypoints"]
RANKS = ["tp_rank", "pp_rank", "attn_tp_rank", "attn_dp_rank", "attn_cp_rank"]
RANKS += ["moe_ep_rank", "moe_dp_rank", "moe_tp_rank"]


class Warnings(logging.Handler):
    """Keeps the warnings of SGLang's loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder, shard by shard, as SGLang's iterator over safetensors does."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name)


def begin() -> None:
    """Give SGLang its settings and process groups of one."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import get_context, get_parallel

    get_context().override_server_args(device="cpu").install()
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    init_distributed_environment(1, 0, meeting, 0, "gloo")
    initialize_model_parallel()
    get_parallel().override_permanently(**dict.fromkeys(RANKS, 0))


def make_module(folder: Path) -> tuple[Any, Any]:
    """Return the config of SGLang's draft model and its module.

    The storage is set as in `_get_quantization_config` of its loader, which would import every model of SGLang.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.models import deepseek_v4
    from sglang.srt.models.deepseek_v4_nextn import DeepseekV4ForCausalLMNextN

    model = ModelConfig(str(folder), is_draft_model=True, dtype="bfloat16", speculative_algorithm="EAGLE")
    storage = Fp8Config.from_config(model.hf_config.quantization_config)
    storage.is_fp4_experts, storage.is_dsv4_fp4_experts = model.is_fp4_experts, True
    deepseek_v4.get_rope_wrapper = lambda **_: None  # it has no parameters, and none for a CPU without YaRN
    torch.set_default_dtype(torch.bfloat16)
    return model, DeepseekV4ForCausalLMNextN(model.hf_config, storage)


def load(folder: Path) -> None:
    """Make the module of a folder, load the folder, and write what is in the module."""
    heard = Warnings()
    logging.getLogger("sglang").addHandler(heard)
    model, module = make_module(folder)
    heard.lines.clear()  # those about a missing GPU
    module.load_weights(stored_tensors(folder))
    logging.getLogger("sglang").removeHandler(heard)
    parameters = {name: parameter.detach().contiguous() for name, parameter in module.named_parameters()}
    save_file(parameters, f"{folder}.parameters.safetensors")
    config = {"modules": model.hf_config.num_nextn_predict_layers, "architecture": model.hf_config.architectures[0]}
    Path(f"{folder}.json").write_text(json.dumps({**config, "warnings": heard.lines}), encoding="utf-8")


def main(source: str, *folders: str) -> None:
    """Load every folder."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.path.insert(0, source)
    is_torchvision_available()  # remembered, so transformers does not take the stand-in for the package
    install(ABSENT)
    begin()
    for folder in folders:
        load(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
