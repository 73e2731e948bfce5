"""`make test-servers`: run the `load_weights` of vLLM's published source on exported folders; outside CI.

The distribution is downloaded by name and not installed. The methods of its MTP module are taken from the source and
run as they are; the parameters are stand-ins, which record the tensors that reach them.
"""

import ast
import re
import subprocess
import sys
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtptrain.config import ReleaseVariant
from mtptrain.release.names import Scheme
from tests.conftest import VOCAB_SIZE, save_release
from tests.export.folders import export_stack
from tests.release.server_rules import LOADERS, NUM_LAYERS, vllm_name, vllm_parameters
from tests.tiny import random_backbone, random_stack

LAYERS = "vllm/model_executor/layers/fused_moe/"
MTP, EXPERTS = "vllm/models/deepseek_v4/nvidia/mtp.py", f"{LAYERS}routed_experts.py"
SPEC_LAYER = "vllm/model_executor/models/utils.py"
METHODS = {"_to_spec_layer_name", "load_weights", "_rewrite_spec_layer_name"}
MAPPINGS = {"make_expert_params_mapping", "build_expert_params_mapping"}


def definitions(source: str, names: set[str]) -> list[ast.stmt]:
    """Return the functions of these names, without decorators and annotations of packages that are not here."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in found} == names
    for node in found:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
    return list(found)


def run_definitions(source: str, names: set[str], **known: Any) -> dict[str, Any]:
    """Return the functions of a source, which see `known` as their module's names."""
    space = dict(known)
    exec(compile(ast.Module(definitions(source, names), []), "<vllm>", "exec"), space)
    return space


class Parameter:
    """A parameter that records the tensors that its loader takes."""

    def __init__(self) -> None:
        self.taken: list[Tensor] = []

    def weight_loader(self, _: Any, tensor: Tensor, *__: Any, **___: Any) -> bool:
        self.taken.append(tensor)
        return True


@pytest.fixture(scope="session")
def vllm_source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the wheel, by path."""
    folder = tmp_path_factory.mktemp("wheels")
    wheel = f"vllm=={LOADERS['vllm'].version}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*download, wheel, "--dest", str(folder)], check=True)
    with zipfile.ZipFile(next(folder.glob("vllm-*.whl"))) as archive:
        return {path: archive.read(path).decode() for path in (MTP, EXPERTS, SPEC_LAYER)}


def parameter_name(flash: str, layer: int) -> str:
    """Return the name that a parameter of Flash's module has in layer `layer` of a model."""
    return re.sub(r"(\.experts\.)(?=w)", r"\1routed_experts.", flash.replace(f".{NUM_LAYERS}.", f".{layer}."))


class Module:
    """vLLM's MTP module for a config: its own methods around recording parameters."""

    def __init__(self, source: dict[str, str], depth: int, num_layers: int, num_experts: int, scheme: Scheme) -> None:
        self.config = SimpleNamespace(
            num_hidden_layers=num_layers,
            num_nextn_predict_layers=depth,
            n_routed_experts=num_experts,
            expert_dtype="fp4" if scheme == "fp8_fp4" else "fp8",
        )
        ffn = SimpleNamespace(use_native_mega_moe=False, experts=None)
        layers = {str(num_layers + d): SimpleNamespace(mtp_block=SimpleNamespace(ffn=ffn)) for d in range(depth)}
        self.model = SimpleNamespace(layers=layers, mtp_start_layer_idx=num_layers, num_mtp_layers=depth)
        self.quant_config, self.pad_shared_expert = None, False
        self.parameters = {
            parameter_name(name, num_layers + d): Parameter() for d in range(depth) for name in vllm_parameters(scheme)
        }
        self._bind(source)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return iter(self.parameters.items())

    def _bind(self, source: dict[str, str]) -> None:
        eplb = SimpleNamespace(build_initial_global_physical_to_logical_map=lambda count, _: range(count))
        mappings = run_definitions(source[EXPERTS], MAPPINGS, torch=torch, EplbState=eplb)
        mappings["RoutedExperts"] = SimpleNamespace(**{name: mappings[name] for name in MAPPINGS})
        known = run_definitions(source[SPEC_LAYER], {"get_spec_layer_idx_from_weight_name"}, re=re)
        methods = run_definitions(
            source[MTP],
            METHODS,
            torch=torch,
            typing=typing,
            Callable=typing.Callable,
            _EXPERT_SCALE_RE=re.compile(r"\.experts\.\d+\.w[123]\.scale$"),
            default_weight_loader=None,
            is_mtp_completeness_check_enabled=lambda: True,
            fused_moe_make_expert_params_mapping=mappings["make_expert_params_mapping"],
            get_spec_layer_idx_from_weight_name=known["get_spec_layer_idx_from_weight_name"],
            logger=SimpleNamespace(info_once=lambda *_: None),
        )
        for name in METHODS:
            setattr(self, name, methods[name].__get__(self))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same bytes."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", ["shared", "stacked", "base", "draft"])
def test_vllm_loads_every_tensor_of_an_exported_head(kind: str, vllm_source: dict[str, str], tmp_path: Path) -> None:
    scheme: Scheme = "fp8" if kind == "base" else "fp8_fp4"
    model, depth = random_backbone(vocab_size=VOCAB_SIZE), 2 if kind == "stacked" else 1
    save_release(tmp_path / "R", ReleaseVariant.base if kind == "base" else ReleaseVariant.release)
    written = export_stack(random_stack(model, depth), tmp_path / "R", tmp_path / "X", is_draft=kind == "draft")
    config = model.config
    module: Any = Module(vllm_source, depth, config.num_hidden_layers, config.n_routed_experts, scheme)
    loaded = module.load_weights(iter(written.items()))
    head = {name: tensor for name, tensor in written.items() if name.startswith("mtp.")}
    assert loaded == set(module.parameters)
    for name, tensor in head.items():
        d, released = name.removeprefix("mtp.").split(".", 1)
        target = parameter_name(vllm_name(released, scheme), config.num_hidden_layers + int(d))
        assert any(same_bytes(one, tensor) for one in module.parameters[target].taken), name
    assert sum(len(parameter.taken) for parameter in module.parameters.values()) == len(head)
    print(f"\nvLLM {LOADERS['vllm'].version}, {kind}: {len(head)} tensors into {len(loaded)} parameters, bytes equal")
