"""The tensor names, shapes and dtypes that vLLM and SGLang load from an MTP head, compared with the release table."""

import re
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from mtptrain.backbone.build import preset_config
from mtptrain.export.folder import SHARED
from mtptrain.release.names import Row, Scheme, release_table
from tests.release.server_rules import LOADERS, NAMES, expected_dtype


def loaded_shapes(rows: list[Row], names: dict[str, str]) -> dict[str, list[int]]:
    """Return the shapes of the server's parameters once every tensor is loaded by its name, with experts stacked."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[names[row.released]].append(row)
    shapes = {}
    for name, part in parts.items():
        experts = {row.expert for row in part}
        assert len({row.dtype for row in part}) == 1
        first = [row for row in part if row.expert == part[0].expert]
        assert len(part) == len(first) * len(experts)
        shape = [sum(row.shape[0] for row in first), *first[0].shape[1:]]
        shapes[name] = shape if experts == {None} else [len(experts), *shape]
    return shapes


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8"])
@pytest.mark.parametrize(("rename", "parameters"), NAMES.values(), ids=NAMES)
def test_a_server_finds_all_its_parameters_and_no_tensor_is_left_over(
    rename: Callable[[str, Scheme], str], parameters: Callable[[Scheme], dict[str, list[int]]], scheme: Scheme
) -> None:
    rows = release_table(preset_config("v4_flash"), scheme)
    assert loaded_shapes(rows, {row.released: rename(row.released, scheme) for row in rows}) == parameters(scheme)


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8"])
@pytest.mark.parametrize("rename", [rename for rename, _ in NAMES.values()], ids=NAMES)
def test_every_tensor_has_the_dtype_of_the_parameter_that_takes_it(
    rename: Callable[[str, Scheme], str], scheme: Scheme
) -> None:
    for row in release_table(preset_config("v4_flash"), scheme):
        assert row.dtype == expected_dtype(rename(row.released, scheme), scheme)


@pytest.mark.parametrize("server", list(LOADERS))
def test_no_server_reads_embedding_and_lm_head_for_the_module(server: str) -> None:
    assert not [name for name in SHARED if re.fullmatch(LOADERS[server].module, name)]


def test_all_scales_of_a_release_have_one_dtype() -> None:
    flash = preset_config("v4_flash")
    assert {row.dtype for row in release_table(flash) if row.is_scale} == {torch.float8_e8m0fnu}
    assert {row.dtype for row in release_table(flash, "fp8") if row.is_scale} == {torch.float32}
