"""Undocumented names of other packages that the code relies on, each with its reason and a check that it exists."""

import ast
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mtptrain
from tests.command import ROOT

FOLDERS = [Path(mtptrain.__file__).parent, ROOT / "kernels", ROOT / "recipes", ROOT / "scripts"]
PYTHONS_OWN = {*dir(type), *dir(Exception), *dir(importlib), "__getitem__", "__slots__", "__stderr__", "__version__"}
PYTHONS_OWN |= {"_asdict", "_exit", "_replace"}  # documented: of named tuples, and of os


class Relied(NamedTuple):
    """An undocumented name, and why nothing documented serves.

    Attributes:
        module: that defines it.
        within: the class that sets it, or nothing: the module itself.
        name: attribute of the module, or of the class or its instances.
        why: what it is needed for.
    """

    module: str
    within: str
    name: str
    why: str


RELIED = [
    Relied(
        "transformers.models.deepseek_v4",
        "DeepseekV4PreTrainedModel",
        "_keep_in_fp32_modules_strict",
        "random weights have the dtypes of loaded ones; only from_pretrained applies the list",
    ),
    Relied("deepspeed.utils.groups", "", "_WORLD_GROUP", "DeepSpeed keeps a group that the run has destroyed"),
    Relied("deepspeed.ops", "", "__compatible_ops__", "no setting keeps its CPU collectives from compiling"),
    Relied("atexit", "", "_run_exitfuncs", "os._exit, which a process of several ends with, skips what is registered"),
    Relied(
        "transformers.models.deepseek_v4",
        "DeepseekV4PreTrainedModel",
        "_init_weights",
        "a new head is initialised like the backbone's own layers; init_weights() does whole models only",
    ),
    Relied(
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "fp32_partitioned_groups_flat",
        "the flat masters, whose AdamW state has to exist before a checkpoint is loaded",
    ),
    Relied(
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "persistent_parameters",
        "small tensors are to be whole before the first step too",
    ),
    Relied(
        "deepspeed.runtime.zero.partition_parameters",
        "Init",
        "all_gather",
        "gathers them for good; GatheredParameters lets go of them again",
    ),
    Relied(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer",
        "_hp_mapping",
        "the part of a parameter's master on this process; the documented functions gather whole masters",
    ),
    Relied(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer",
        "scaled_global_norm",
        "clipping counts the experts that DeepSpeed does not hold; its own mixture of experts averages norms",
    ),
    *(
        Relied("torch._C", "", name, "torch.jit.trace keeps all traces for the life of the process; these are freed")
        for name in ("_create_graph_by_tracing", "_create_function_from_graph")
    ),
    Relied("torch", "", "_C", "holds both of them"),
    Relied("torch.utils", "", "_python_dispatch", "its mode sees the operators of a decoding step; torch documents it"),
    *(
        Relied("torch.nn.modules.module", "Module", name, "a trace runs no hooks, so modules with hooks are not traced")
        for name in ("_forward_hooks", "_forward_pre_hooks")
    ),
]


def named(node: ast.AST) -> Iterator[str]:
    """Names that an import or an attribute access mentions, but for `self` and `cls`."""
    if isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))
    elif isinstance(node, ast.ImportFrom):
        yield from (node.module or "").split(".")
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield node.attr


def defined(node: ast.AST) -> Iterator[str]:
    """Names that a statement of ours defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.id if isinstance(node, ast.Name) else node.attr


def sources() -> dict[str, list[ast.AST]]:
    """Every node of every source file, by its path; links are followed."""
    nodes = {}
    for top in FOLDERS:
        for folder, _, files in os.walk(top, followlinks=True):
            for path in sorted(Path(folder, file).resolve() for file in files if file.endswith(".py")):
                nodes[str(path.relative_to(ROOT))] = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return nodes


def test_no_other_private_name_of_a_package_is_used() -> None:
    files = sources()
    ours = {name for nodes in files.values() for node in nodes for name in defined(node)}
    known = ours | PYTHONS_OWN | {"__future__", *(relied.name for relied in RELIED)}
    used = {(file, name) for file, nodes in files.items() for node in nodes for name in named(node)}
    assert len(files) > 100
    assert sorted((file, name) for file, name in used if name.startswith("_") and name not in known) == []


@pytest.mark.parametrize("relied", RELIED, ids=lambda relied: relied.name)
def test_a_name_that_we_rely_on_still_exists(relied: Relied) -> None:
    module = importlib.import_module(relied.module)
    holder = getattr(module, relied.within) if relied.within else module
    exists = hasattr(holder, relied.name)
    if not exists and relied.within:  # set on instances, or by the class on the parameters it converts
        exists = any(f"{relied.name}{sign} " in inspect.getsource(holder) for sign in (" =", ":"))
    assert exists, f"{relied.module}.{relied.name} is gone, which we need: {relied.why}; see where it is used"
