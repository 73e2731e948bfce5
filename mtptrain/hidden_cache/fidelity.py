"""Compare streams of another engine with those of transformers, on the same documents and weights.

Both streams go through the same `hc_head`, norm and lm_head, so a difference of logits is one of streams.
"""

# T tokens of a document, N residual streams, D model width, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4ForCausalLM

from mtptrain.config import CollectConfig
from mtptrain.data.packing import Piece
from mtptrain.errors import UserError
from mtptrain.hidden_cache.writer import ShardDocuments

GATE_DOCUMENTS = 64
TOKENS_AT_ONCE = 256  # their logits over V4's vocabulary take 130 MB in fp32


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of an engine with transformers.

    Attributes:
        engine: name and version.
        documents, tokens: compared.
        cosine: between the streams of a token; mean over tokens and streams of the document in which it is lowest.
        agreement: share of tokens with the same most likely next token.
        kl: KL divergence of the engine's distribution of the next token from that of transformers, nats a token.
    """

    engine: str
    documents: int
    tokens: int
    cosine: float
    agreement: float
    kl: float


class Readout:
    """The modules of a backbone behind its decoder layers. The layers themselves may be freed.

    Args:
        model: the backbone.
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.hc_head, self.norm, self.lm_head = model.model.hc_head, model.model.norm, model.lm_head

    def log_probs(self, streams_TND: Tensor) -> Iterator[Tensor]:
        """Yield log-probabilities of the next token, fp32 [T', V], of successive parts of a document."""
        weight = self.lm_head.weight
        for part_TND in streams_TND.split(TOKENS_AT_ONCE):
            streams_1TND = part_TND.to(weight.device, weight.dtype).unsqueeze(0)
            yield self.lm_head(self.norm(self.hc_head(streams_1TND)))[0].float().log_softmax(-1)


def gate_pieces(shards: Sequence[ShardDocuments]) -> list[Piece]:
    """Return the first pieces of up to `GATE_DOCUMENTS` documents, evenly spread."""
    documents = [parts for shard in shards for parts in shard]
    count = min(GATE_DOCUMENTS, len(documents))
    return [documents[number * len(documents) // count][0] for number in range(count)]


def measure_fidelity(engine: str, documents: Iterable[tuple[Tensor, Tensor]], readout: Readout) -> Fidelity:
    """Return the agreement of an engine with transformers.

    Args:
        engine: name and version.
        documents: streams [T, N, D] of transformers and of the engine, for each document.
        readout: of transformers' backbone.
    """
    cosines: list[float] = []
    tokens = agreeing = 0
    divergence = 0.0
    for expected_TND, actual_TND in documents:
        cosines.append(float(F.cosine_similarity(expected_TND.float(), actual_TND.float(), dim=-1).mean()))
        for log_p_TV, log_q_TV in zip(readout.log_probs(expected_TND), readout.log_probs(actual_TND), strict=True):
            tokens += len(log_p_TV)
            agreeing += int((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum())
            divergence += float(F.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="sum"))
    return Fidelity(engine, len(cosines), tokens, min(cosines), agreeing / tokens, divergence / tokens)


def describe_fidelity(fidelity: Fidelity) -> str:
    """Return the agreement in one line."""
    return (
        f"{fidelity.engine} against transformers on {fidelity.documents} documents: cosine {fidelity.cosine:.4f} in "
        f"the worst, top-1 agreement {fidelity.agreement:.2%}, KL {fidelity.kl:.2g} nats a token"
    )


def check_fidelity(fidelity: Fidelity, config: CollectConfig) -> None:
    """Refuse an engine whose streams differ from those of transformers by more than the bounds.

    Raises:
        UserError: lists the figures beyond their bounds.
    """
    beyond = [
        f"{name} {value:.4g} (collect.{setting}={bound})"
        for name, value, setting, bound, is_within in (
            ("cosine", fidelity.cosine, "min_cosine", config.min_cosine, fidelity.cosine >= config.min_cosine),
            (
                "top-1 agreement",
                fidelity.agreement,
                "min_agreement",
                config.min_agreement,
                fidelity.agreement >= config.min_agreement,
            ),
            ("KL", fidelity.kl, "max_kl", config.max_kl, fidelity.kl <= config.max_kl),
        )
        if not is_within
    ]
    if beyond:
        raise UserError(
            f"collect.engine={config.engine.value}: the streams of {fidelity.engine} are not those of transformers on "
            f"{fidelity.documents} documents: {', '.join(beyond)}; set collect.engine=transformers, or other bounds"
        )
