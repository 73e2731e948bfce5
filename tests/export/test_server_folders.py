"""Exported folders, tensor by tensor, against the rules of the loaders of vLLM and SGLang."""

import re
from collections import Counter
from pathlib import Path

import pytest

from mtptrain.config import ReleaseVariant
from mtptrain.release.names import Scheme
from tests.conftest import VOCAB_SIZE, save_release
from tests.export.folders import FORMS, export_stack
from tests.release.server_rules import LOADERS, NAMES, expected_dtype
from tests.tiny import random_backbone, random_stack

SHARED_WITH_MODEL = {"embed.weight", "head.weight"}
LOADED = [
    (server, kind)
    for server, rules in LOADERS.items()
    for kind in FORMS
    if ("stacked" not in kind or rules.num_modules is None) and ("draft" not in kind or rules.loads_draft)
]


def tensors_in(parameter: str, num_experts: int) -> int:
    """Return the number of tensors that a parameter holds."""
    parts = 2 if re.search(r"gate_up_proj|fused_wqa_wkv|experts\.w13_", parameter) else 1
    return parts * num_experts if ".experts." in parameter else parts


@pytest.mark.parametrize(("server", "kind"), LOADED)
def test_every_parameter_of_a_server_is_filled_from_an_exported_folder(server: str, kind: str, tmp_path: Path) -> None:
    scheme: Scheme = "fp8" if "base" in kind else "fp8_fp4"
    model, depth = random_backbone(vocab_size=VOCAB_SIZE), 2 if "stacked" in kind else 1
    save_release(tmp_path / "R", ReleaseVariant.base if "base" in kind else ReleaseVariant.release)
    written = export_stack(random_stack(model, depth), tmp_path / "R", tmp_path / "X", is_draft="draft" in kind)

    rename, parameters = NAMES[server]
    filled: dict[str, Counter[str]] = {}
    skipped = set()
    for name in written:
        match = re.fullmatch(LOADERS[server].module, name)
        if match is None:
            skipped.add(name)
            continue
        parameter = rename(match[2], scheme)
        assert written[name].dtype == expected_dtype(parameter, scheme)
        filled.setdefault(match[1], Counter())[parameter] += 1
    whole = {name: tensors_in(name, model.config.n_routed_experts) for name in parameters(scheme)}
    assert filled == {str(d): whole for d in range(depth)}
    assert not [name for name in skipped if name.startswith("mtp.")]
    assert (skipped & SHARED_WITH_MODEL == SHARED_WITH_MODEL) == ("draft" not in kind)
