"""`make test-servers`: hold exported folders and `collect.engine=vllm` against vLLM's published source; outside CI.

The distribution is downloaded by name and not installed. The methods of its MTP module are taken from the source and
run as they are; the parameters are stand-ins, which record the tensors that reach them. The names, arguments and
attributes that the collection of streams uses are looked up in the source.
"""

import ast
import re
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
from mtptrain.export.servers import VLLM_HIJACKS
from mtptrain.hidden_cache.vllm_engine import SAMPLING, VLLM, StreamKeeper, engine_options
from mtptrain.release.names import Scheme
from tests.conftest import VOCAB_SIZE, save_release
from tests.export.folders import FORMS, export_stack
from tests.release.server_rules import LOADERS, NUM_LAYERS, vllm_name, vllm_parameters
from tests.servers.wheels import download
from tests.tiny import random_backbone, random_stack

LAYERS = "vllm/model_executor/layers/fused_moe/"
MTP, EXPERTS = "vllm/models/deepseek_v4/nvidia/mtp.py", f"{LAYERS}routed_experts.py"
SPEC_LAYER = "vllm/model_executor/models/utils.py"
MODEL, LLM, ARGUMENTS = "vllm/models/deepseek_v4/nvidia/model.py", "vllm/entrypoints/llm.py", "vllm/engine/arg_utils.py"
WORKER_BASE, WORKER = "vllm/v1/worker/worker_base.py", "vllm/v1/worker/gpu_worker.py"
SAMPLING_PARAMS, PROMPTS, DRAFTS = "vllm/sampling_params.py", "vllm/inputs/llm.py", "vllm/config/speculative.py"
READ = (MTP, EXPERTS, SPEC_LAYER, MODEL, LLM, ARGUMENTS, WORKER_BASE, WORKER, SAMPLING_PARAMS, PROMPTS, DRAFTS)
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
    wheel = download(f"vllm=={LOADERS['vllm'].version}", tmp_path_factory.mktemp("wheels"))
    with zipfile.ZipFile(wheel) as archive:
        return {path: archive.read(path).decode() for path in READ}


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


@pytest.mark.parametrize("kind", FORMS)
def test_vllm_loads_every_tensor_of_an_exported_head(kind: str, vllm_source: dict[str, str], tmp_path: Path) -> None:
    scheme: Scheme = "fp8" if "base" in kind else "fp8_fp4"
    model, depth = random_backbone(vocab_size=VOCAB_SIZE), 2 if "stacked" in kind else 1
    save_release(tmp_path / "R", ReleaseVariant.base if "base" in kind else ReleaseVariant.release)
    written = export_stack(random_stack(model, depth), tmp_path / "R", tmp_path / "X", is_draft="draft" in kind)
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


def test_every_word_by_which_vllm_misreads_a_path_is_refused(vllm_source: dict[str, str]) -> None:
    words = re.findall(r'"([^"]+)" in self\.draft_model_config\.model\.lower\(\)', vllm_source[DRAFTS])
    assert len(words) >= 4
    assert all(any(known in word for known in VLLM_HIJACKS) for word in words)
    print(f"\nvLLM {VLLM}: takes a path with {', '.join(words)} for another kind of draft")


def class_of(source: dict[str, str], path: str, name: str) -> ast.ClassDef:
    """Return a class of a file."""
    tree = ast.parse(source[path])
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def method_of(owner: ast.ClassDef, name: str) -> ast.FunctionDef:
    """Return a method of a class."""
    return next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == name)


def arguments_of(function: ast.FunctionDef) -> set[str]:
    """Return the names of a function's arguments."""
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def fields_of(owner: ast.ClassDef) -> set[str]:
    """Return the annotated fields of a class."""
    return {
        node.target.id for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def assigned(function: ast.FunctionDef) -> set[str]:
    """Return what a function assigns to, such as `self.rank`."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.AnnAssign)]
    return {ast.unparse(target) for node in nodes for target in getattr(node, "targets", None) or [node.target]}


def members(owner: ast.ClassDef) -> set[str]:
    """Return the methods of a class and the attributes that they set."""
    methods = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
    return {method.name for method in methods} | {
        name.removeprefix("self.") for method in methods for name in assigned(method) if name.startswith("self.")
    }


def test_vllm_copies_the_streams_before_hc_head_into_the_buffer_that_the_extension_gives_it(
    vllm_source: dict[str, str],
) -> None:
    assert LOADERS["vllm"].version == VLLM
    model = class_of(vllm_source, MODEL, "DeepseekV4Model")
    assert model.decorator_list == []  # not compiled, so that it finds a buffer that it did not have at first
    made = assigned(method_of(model, "__init__"))
    assert {"self._mtp_hidden_buffer", "self.hc_dim", "self.hc_head_fn"} <= made
    lines = [ast.unparse(node) for node in method_of(model, "forward").body]
    copies = "self._mtp_hidden_buffer[:num_tokens].copy_(hidden_states.flatten(1))"
    copy = next(
        number for number, line in enumerate(lines) if line.startswith("if self._mtp_hidden_buffer is not None")
    )
    assert copies in lines[copy]
    assert "num_tokens = hidden_states.shape[0]" in lines[copy]
    assert lines[copy + 1].startswith("hidden_states = hc_head_fused_kernel_tilelang(")
    assert not any("hc_head" in line for line in lines[:copy])
    assert "mhc_post_tilelang" in "".join(lines[:copy])  # the last layer's streams, complete
    served = class_of(vllm_source, MODEL, "DeepseekV4ForCausalLM")
    assert "self.model" in assigned(method_of(served, "__init__"))
    returned = method_of(served, "get_mtp_target_hidden_states").body[-1]
    assert ast.unparse(returned) == "return getattr(self.model, '_mtp_hidden_buffer', None)"


def test_vllm_s_worker_has_what_the_extension_uses_and_no_method_of_its_name(vllm_source: dict[str, str]) -> None:
    base, worker = class_of(vllm_source, WORKER_BASE, "WorkerBase"), class_of(vllm_source, WORKER, "Worker")
    assert [ast.unparse(one) for one in worker.bases] == ["WorkerBase"]
    assert "get_model" in members(worker)
    assert {"rank", "vllm_config"} <= members(base)
    own = {name for name in vars(StreamKeeper) if not name.startswith("__")} | {"stream_shape", "kept_streams"}
    assert own & (members(base) | members(worker)) == set()
    extends = ast.unparse(method_of(class_of(vllm_source, WORKER_BASE, "WorkerWrapperBase"), "init_worker"))
    assert "resolve_obj_by_qualname(parallel_config.worker_extension_cls)" in extends
    assert "worker_class.__bases__ + (worker_extension_cls,)" in extends


def test_vllm_s_offline_engine_takes_the_arguments_that_it_is_given(vllm_source: dict[str, str]) -> None:
    engine = class_of(vllm_source, LLM, "LLM")
    options = arguments_of(method_of(engine, "__init__")) | fields_of(class_of(vllm_source, ARGUMENTS, "EngineArgs"))
    assert set(engine_options(Path("R"), 2, 32)) <= options
    assert {"prompts", "sampling_params", "use_tqdm"} <= arguments_of(method_of(engine, "generate"))
    assert {"method", "timeout", "args"} <= arguments_of(method_of(engine, "collective_rpc"))
    assert set(SAMPLING) <= fields_of(class_of(vllm_source, SAMPLING_PARAMS, "SamplingParams"))
    assert "prompt_token_ids" in fields_of(class_of(vllm_source, PROMPTS, "TokensPrompt"))
    print(f"\nvLLM {VLLM}: buffer, worker extension and arguments of collect.engine=vllm are as the code expects")
