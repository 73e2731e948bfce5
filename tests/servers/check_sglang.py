"""`make test-servers`: SGLang's own MTP module, made and loaded on a CPU from its published wheel; outside CI.

The wheel is downloaded by name and not installed. A process of its own imports it, with `tests/servers/absent.py` in
place of the packages that are not here, makes the module with SGLang's constructors, and loads exported folders of
sizes that its kernels take. Every parameter is compared with the tensors of the file.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtptrain.backbone.build import build_model
from mtptrain.config import ReleaseVariant
from mtptrain.export.folder import write_shards
from mtptrain.export.miniature import SERVABLE, miniature_config, miniature_groups
from mtptrain.mtp.stack import fresh_stack
from mtptrain.release.names import Scheme
from mtptrain.release.shards import HEAD_PREFIX
from mtptrain.run.storage import write_json
from tests.export.folders import export_stack
from tests.release.server_rules import LOADERS, sglang_name
from tests.servers.wheels import download, unpack

REPOSITORY = Path(__file__).parents[2]
MSGSPEC = "msgspec==0.22.0"  # the one package that SGLang's settings need in earnest
# SGLang takes the first two from the model; scales of a key cache are in no release, and 1.
NOT_STORED = {"model.embed_tokens.weight", "lm_head.weight"}
NOT_STORED |= {f"model.decoder.self_attn.attn_mqa.{name}_scale" for name in "kv"}
KINDS = ("shared", "base", "draft", "stacked")


@pytest.fixture(scope="session")
def sglang_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel."""
    wheels, source = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("sglang")
    for name in (f"sglang=={LOADERS['sglang'].version}", MSGSPEC):
        unpack(download(name, wheels), source)
    return source


def export_all(where: Path) -> dict[str, Path]:
    """Return exported folders by kind."""
    model = build_model(SERVABLE, 0, torch.device("cpu"))
    for variant in (ReleaseVariant.release, ReleaseVariant.base):
        groups = miniature_groups(model, fresh_stack(model, 1, 0).state_dict(), variant)
        (where / variant.value).mkdir()
        write_shards(where / variant.value, groups)
        write_json(where / variant.value / "config.json", miniature_config(model.config, variant, 1))
    for kind in KINDS:
        source = where / ("base" if kind == "base" else "release")
        stack = fresh_stack(model, 2 if kind == "stacked" else 1, 1)
        export_stack(stack, source, where / f"X_{kind}", is_draft=kind == "draft")
    return {kind: where / f"X_{kind}" for kind in KINDS}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders by kind."""
    return export_all(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def loaded(sglang_source: Path, folders: dict[str, Path]) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """By kind: SGLang's config of the folder with its warnings, and its parameters."""
    command = [sys.executable, "-m", "tests.servers.sglang_module", str(sglang_source), *map(str, folders.values())]
    subprocess.run(command, check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    return {
        kind: (json.loads(Path(f"{folder}.json").read_text()), load_file(f"{folder}.parameters.safetensors"))
        for kind, folder in folders.items()
    }


def parameter_of(released: str, scheme: Scheme) -> str:
    """Return the parameter that takes a tensor; SGLang joins `wq_a` and `wkv` by default."""
    name = sglang_name(released, scheme)
    return name.replace("self_attn.wq_a.", "self_attn.wqkv_a.").replace("self_attn.wkv.", "self_attn.wqkv_a.")


def expected_parameters(head: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Return the parameters of SGLang's module from the tensors of one module, by released names."""
    parts: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(head, key=part_order):
        expert = name.split(".")[2] if ".experts." in name else ""
        parts[parameter_of(name, scheme)][expert].append(as_bytes(head[name]))
    return {name: join(by_expert) for name, by_expert in parts.items()}


def part_order(name: str) -> tuple[int, str]:
    """Return the place of a tensor in a joined parameter: w1 before w3, wq_a before wkv, experts by number."""
    expert = int(name.split(".")[2]) if ".experts." in name else -1
    return expert, name.replace("wq_a", "wa")


def as_bytes(tensor: Tensor) -> Tensor:
    """Return scales, which SGLang converts to float32, as float32, and packed weights as bytes."""
    if tensor.dtype is torch.float8_e8m0fnu:
        return tensor.float()
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def join(by_expert: dict[str, list[Tensor]]) -> Tensor:
    """Return the parts joined by rows, and experts stacked."""
    joined = {expert: torch.cat(parts) if len(parts) > 1 else parts[0] for expert, parts in by_expert.items()}
    return joined[""] if "" in joined else torch.stack(list(joined.values()))


def differing(parameters: dict[str, Tensor], head: dict[str, Tensor], scheme: Scheme) -> list[str]:
    """Return the parameters that are not what the tensors of a module say."""
    expected = expected_parameters(head, scheme)
    assert expected.keys() == parameters.keys() - NOT_STORED
    loaded = {
        name: as_bytes(parameters[name]).view(tensor.shape) for name, tensor in expected.items()
    }  # wo_a by groups
    return [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]


def module_tensors(folder: Path, module: int) -> dict[str, Tensor]:
    """Return the tensors of one module of a folder, by their names within it."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    prefix = f"{HEAD_PREFIX}{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["shared", "base", "draft"])
def test_sglang_loads_every_tensor_of_an_exported_head(
    kind: str, folders: dict[str, Path], loaded: dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
) -> None:
    config, parameters = loaded[kind]
    head = module_tensors(folders[kind], 0)
    assert config["architecture"] == "DeepseekV4ForCausalLMNextN"
    assert config["warnings"] == []
    assert differing(parameters, head, "fp8" if kind == "base" else "fp8_fp4") == []
    count = len(parameters) - len(NOT_STORED)
    print(f"\nSGLang {LOADERS['sglang'].version}, {kind}: {len(head)} tensors into {count} parameters, equal")


def test_sglang_puts_every_module_of_a_stacked_head_into_its_one(
    folders: dict[str, Path], loaded: dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
) -> None:
    """It sets the number of modules to 1 and drops the number from names: so a stacked head must not be exported."""
    config, parameters = loaded["stacked"]
    assert config["modules"] == 1
    assert differing(parameters, module_tensors(folders["stacked"], 0), "fp8_fp4") != []
    assert differing(parameters, module_tensors(folders["stacked"], 1), "fp8_fp4") == []  # read last
    print(f"\nSGLang {LOADERS['sglang'].version}, stacked: no error, and the last module alone is loaded")
