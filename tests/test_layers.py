import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtptrain

PACKAGE = Path(mtptrain.__file__).parent

# From the bottom up: a folder imports from itself and from earlier layers, so imports have no cycles.
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
    ["certificate", "doctor", "serving", "generation"],
    ["evaluation.report", "export"],
    ["recipes"],
    ["help"],
    ["cli"],
    ["api"],
    ["__main__"],
]
FORBIDDEN = [("training", "evaluation"), ("data", "decoding")]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
LOOSE_FILES = 6  # at the top of the package, `__init__` among them


def sources() -> dict[str, Path]:
    """Return the path of every module by its name below the package; follow the links `kernels` and `recipes`."""
    modules = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder) / file
                modules[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return {name: path for name, path in modules.items() if name.split(".")[0] not in ("__init__", "conf")}


SOURCES = sources()


def package_imports(name: str) -> Iterator[str]:
    """Yield the modules of mtptrain that a module imports anywhere, as names below the package."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            module = ".".join(["mtptrain", *parents, *filter(None, [node.module])]) if node.level else node.module
            # `from package import module` names the module itself in the alias.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (full.removeprefix("mtptrain.") for full in names if full.startswith("mtptrain."))


def longest_listed(name: str) -> str | None:
    """Return the longest entry of `LAYERS` that a dotted name belongs to."""
    parts = name.split(".")
    if parts[-1] == "__main__":  # a program, such as kernels.bench, which records the commit
        return "__main__"
    prefixes = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYER_OF), None)


def test_every_module_belongs_to_a_layer() -> None:
    assert [name for name in SOURCES if longest_listed(name) is None] == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_from_its_own_folder_or_a_lower_layer(name: str) -> None:
    folder = longest_listed(name)
    assert folder is not None
    entries = {imported: longest_listed(imported) for imported in package_imports(name)}
    wrong = [
        imported
        for imported, entry in entries.items()
        if entry is not None and entry != folder and LAYER_OF[entry] >= LAYER_OF[folder]
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
    assert [name for name in names for target in package_imports(name) if target.split(".")[0] == imported] == []


def test_kernels_import_only_kernels_of_this_package() -> None:
    bench = "kernels.bench."  # a program, which records the commit
    names = [name for name in SOURCES if name.split(".")[0] == "kernels" and not name.startswith(bench)]
    assert names
    assert {target.split(".")[0] for name in names for target in package_imports(name)} <= {"kernels"}


def test_the_kernels_folder_is_not_a_regular_package() -> None:
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
    assert sorted(package_imports("decoding.plain")) == [
        "cli.main",
        "config",
        "decoding.records.Counts",
        "errors.UserError",
        "export",
        "mtp.stack",
    ]
