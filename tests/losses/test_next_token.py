"""The backbone's held-out loss is computed for a bounded number of logits at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mtptrain.data import packing
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.losses import next_token
from mtptrain.losses.next_token import bits_per_byte
from tests.tiny import random_backbone

LENGTH = 20


@pytest.mark.parametrize(("tokens", "logits"), [(20, 97), (60, 500), (4096, 1 << 26)])
def test_the_heldout_loss_depends_on_neither_bound(tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TOKENS_PER_FORWARD", tokens)
    monkeypatch.setattr(next_token, "LOGITS_AT_ONCE", logits)
    model = random_backbone()
    text = np.random.default_rng(0).integers(0, 97, 70).astype(np.int32)
    corpus = TokenizedCorpus(text, np.array([0, 20, 33, 50, 70]), 210, None)
    nats = []
    for begin, end in [(0, 20), (20, 33), (33, 50), (50, 70)]:
        ids = torch.from_numpy(text[begin:end].astype(np.int64)).unsqueeze(0)
        nats.append(F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none"))
    expected = torch.cat(nats).mean().item()
    loss, bits = bits_per_byte(model, corpus, LENGTH)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert bits == pytest.approx(expected * 66 / np.log(2) / 210, rel=1e-6)
