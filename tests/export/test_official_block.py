"""The rollout equals DeepSeek's module as a server runs it, on the tensors of exported folders."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.batch import Batch
from mtptrain.config import ReleaseVariant
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.release.modules import from_release
from tests.conftest import VOCAB_SIZE, save_release
from tests.export.folders import export_stack
from tests.export.official_block import OfficialModule
from tests.tiny import random_backbone, random_stack

SLOTS, STEPS = 24, 4  # more slots than the window of 16


def served_logits(
    modules: list[OfficialModule], embedding_VD: Tensor, head_VD: Tensor, tokens: list[int], streams_SND: Tensor
) -> Tensor:
    """Return the draft logits [S - K, K, V] of a server that drafts the text's tokens at anchor after anchor."""
    anchors = []
    for anchor in range(SLOTS - STEPS):
        state_ND, drafted = streams_SND[anchor], []
        for step in range(1, STEPS + 1):
            module = modules[min(step, len(modules)) - 1]
            state_ND = module.step(embedding_VD[tokens[anchor + step]].float(), state_ND, anchor + step - 1)
            drafted.append(module.logits(state_ND, head_VD))
        anchors.append(torch.stack(drafted))
    return torch.stack(anchors)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "depth"), [(ReleaseVariant.release, 1), (ReleaseVariant.release, 2), (ReleaseVariant.base, 1)]
)
def test_the_rollout_equals_the_official_module_on_exported_tensors(
    variant: ReleaseVariant, depth: int, tmp_path: Path
) -> None:
    save_release(tmp_path / "R", variant)
    config = DeepseekV4Config.from_pretrained(tmp_path / "R")
    model = random_backbone(vocab_size=VOCAB_SIZE, sliding_window=16)
    written = export_stack(random_stack(model, depth, seed=5), tmp_path / "R", tmp_path / "X")
    stored = {name: written[name] for name in written if name.startswith("mtp.")}

    generator = torch.Generator().manual_seed(0)
    streams_1SND = torch.randn(1, SLOTS, config.hc_mult, config.hidden_size, generator=generator)
    tokens_1S = torch.randint(VOCAB_SIZE, (1, SLOTS), generator=generator)
    head_VD, embedding_VD = written["head.weight"], written["embed.weight"]
    modules = [OfficialModule(stored, config, d) for d in range(depth)]
    served_AKV = served_logits(modules, embedding_VD, head_VD, tokens_1S[0].tolist(), streams_1SND[0])

    state = from_release(stored, config, torch.float32)
    stack = stack_from_tensors(config, depth, state, "X").eval()
    assert isinstance(stack, MtpStack)
    batch = Batch(tokens_1S, torch.ones_like(tokens_1S), torch.arange(SLOTS)[None])
    hidden = rollout(stack, lambda token_BS: embedding_VD.float()[token_BS], streams_1SND, batch, STEPS)
    ours_AKV = torch.stack([x_BSD[0, : SLOTS - STEPS] @ head_VD.float().T for x_BSD in hidden], dim=1)
    difference_K = (ours_AKV - served_AKV).abs().amax((0, 2)) / served_AKV.std()
    assert difference_K.max() < 1e-4
