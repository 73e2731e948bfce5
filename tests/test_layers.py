import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtptrain

PACKAGE = Path(mtptrain.__file__).parent

# From the bottom up: a folder imports from itself and from the layers before its own; so there is no circle.
LAYERS = [
    ["errors"],
    ["kernels"],
    ["config"],
    ["run"],
    ["batch", "release"],
    ["data"],
    ["data.streaming"],
    ["backbone"],
    ["mtp"],
    ["hidden_cache", "losses", "decoding"],
    ["training"],
    ["traces"],
    ["replay"],
    ["planning"],
    ["evaluation"],
    ["certificate", "doctor"],
    ["evaluation.report", "export"],
    ["recipes"],
    ["help"],
    ["cli"],
    ["__main__"],
]
FORBIDDEN = [("training", "evaluation"), ("data", "decoding")]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
LOOSE_FILES = 7  # at the top of the package, `__init__` among them


def sources() -> dict[str, Path]:
    """Every module of the package by its name below it; `kernels` and `recipes` are links that are followed."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder) / file
                found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return {name: path for name, path in found.items() if name.split(".")[0] not in ("__init__", "conf")}


SOURCES = sources()


def our_imports(name: str) -> Iterator[str]:
    """Modules of ours that a module imports anywhere, as names below the package."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            module = ".".join(["mtptrain", *parents, *filter(None, [node.module])]) if node.level else node.module
            # `from package import module` names the module itself in the alias.
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (full.removeprefix("mtptrain.") for full in found if full.startswith("mtptrain."))


def longest_listed(name: str) -> str | None:
    """The entry of `LAYERS` that a dotted name falls under."""
    parts = name.split(".")
    if parts[-1] == "__main__":  # a program, such as kernels.bench, which names the commit that it measures
        return "__main__"
    prefixes = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYER_OF), None)


def test_every_module_belongs_to_a_layer() -> None:
    assert [name for name in SOURCES if longest_listed(name) is None] == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_from_its_own_folder_or_a_lower_layer(name: str) -> None:
    own = longest_listed(name)
    assert own is not None
    entries = {imported: longest_listed(imported) for imported in our_imports(name)}
    wrong = [
        imported
        for imported, entry in entries.items()
        if entry is not None and entry != own and LAYER_OF[entry] >= LAYER_OF[own]
    ]
    assert wrong == []


def test_layers_are_folders_and_few_files_lie_loose() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert len(loose) <= LOOSE_FILES
    assert {name for name in LAYER_OF if not (PACKAGE / name.replace(".", "/")).is_dir()} <= loose


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN)
def test_some_imports_are_not_allowed_even_within_reach(importer: str, imported: str) -> None:
    names = [name for name in SOURCES if name.split(".")[0] == importer]
    assert names
    assert [name for name in names for target in our_imports(name) if target.split(".")[0] == imported] == []


def test_kernels_import_nothing_of_ours_but_kernels() -> None:
    bench = "kernels.bench."  # a program: it says which commit it measures
    names = [name for name in SOURCES if name.split(".")[0] == "kernels" and not name.startswith(bench)]
    assert names
    assert {target.split(".")[0] for name in names for target in our_imports(name)} <= {"kernels"}


def test_the_kernels_folder_is_no_package_of_its_own() -> None:
    assert (PACKAGE / "kernels").is_dir()
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["config", "cli"])
def test_the_command_line_starts_without_torch(name: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'deepspeed', 'wandb', 'numpy'}"
    program = f"import sys, mtptrain.{name}; sys.exit(' '.join({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == ""


def test_relative_and_absolute_imports_are_both_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "import torch\nimport mtptrain.config\nfrom mtptrain.errors import UserError\nfrom mtptrain import export\n"
        "from .records import Counts\nfrom ..mtp import stack\n\ndef late():\n    from mtptrain.cli import main\n"
    )
    monkeypatch.setitem(SOURCES, "decoding.plain", path)
    assert sorted(our_imports("decoding.plain")) == [
        "cli.main",
        "config",
        "decoding.records.Counts",
        "errors.UserError",
        "export",
        "mtp.stack",
    ]
