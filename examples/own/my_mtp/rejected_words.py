"""A recipe of one's own: count the words at which a head's drafts are rejected, by domain.

cd examples/own && python -m mtptrain --config-dir . +recipe=rejected_words prompts=../prompts
"""

from __future__ import annotations

from collections import Counter, defaultdict

from mtptrain.config import RunConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_traces, settings
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import open_prompts
from mtptrain.run.folder import FolderUse
from mtptrain.run.storage import write_json

FOLDER = FolderUse.result
SHOWN = 5  # words a domain


def reads(config: RunConfig) -> Settings:
    """Return the settings that this recipe reads; others are refused."""
    return ALWAYS | of_backbone(config) | of_traces(config) | settings("checkpoint") - {"evaluation.traces"}


def run(session: Session) -> None:
    """Decode the prompts with the head's drafts, write rejected.json, and print the most frequent words."""
    config, tokenizer = session.config, session.source.tokenizer
    head = session.head(config.checkpoint or "stock")
    conversations, _ = open_prompts(session, config.evaluation.num_prompts)
    prompts = [one.prompt for one in conversations]
    length, model, policy = config.decoding.draft_length, session.backbone.model, session.policy
    proposer = head_proposer(model, head.stack, policy, length)
    decoded = decode_speculative(model, proposer, [one.tokens for one in prompts], length, session.limits, policy)
    rejected: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for prompt, row in zip(prompts, decoded.rows, strict=True):
        words = [tokenizer.decode([token]) for token in row.rejected if token is not None]
        rejected[prompt.domain].update(words)
    session.folder.record()
    write_json(session.folder.path / "rejected.json", rejected)
    for domain, words in rejected.items():
        print(f"{domain}: {words.total()} rejected drafts, most often {words.most_common(SHOWN)}")
