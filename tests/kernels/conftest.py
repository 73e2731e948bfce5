"""Fixtures of the kernels' tests."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import triton.language as tl
from triton.runtime import interpreter

from mtptrain.kernels.bench.__main__ import poisoned_memory

_patch_language = getattr(interpreter, "_patch_lang", None)
_PATCHED: set[int] = set()


def _patch_once(function: Any) -> Any:
    """Give the parts of Triton's language that a function uses their interpreted functions, which then stay.

    Triton does so for every launch, and for every call in a kernel, which takes half of a test's time.
    """
    used = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if not used <= _PATCHED:
        _patch_language(function)
        _PATCHED.update(used)
    return interpreter._LangPatchScope()


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once() -> Iterator[None]:
    has_names = _patch_language is not None and hasattr(interpreter, "_LangPatchScope")  # of the versions tried
    with patch.object(interpreter, "_patch_lang", _patch_once) if has_names else nullcontext():
        yield


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fill newly allocated memory with NaN, or with the largest integer.

    On a GPU the definitions need products and sums of which torch has no deterministic form, so it must not insist.
    """
    with poisoned_memory():
        yield
