"""The training and held-out documents that the data settings mean."""

from __future__ import annotations

from pathlib import Path

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.documents import Document, Split
from mtptrain.data.stdlib import package_documents, stdlib_documents
from mtptrain.data.streams.manifest import open_cache
from mtptrain.data.text import text_documents


def _is_text(config: DataConfig) -> bool:
    """Whether the documents are the user's own text and not the standard library's."""
    return config.source is DataSource.text or (config.source is DataSource.on_policy and config.path is not None)


def training_documents(config: DataConfig) -> list[Document]:
    """Documents to train on; of `on_policy`, those that prompts are cut from."""
    if _is_text(config):
        return text_documents(config, Split.train)
    library = stdlib_documents(Split.train, config.heldout_every)
    if not config.packages:
        return library
    return library + package_documents(config.packages, library, heldout_documents(config))


def heldout_documents(config: DataConfig) -> list[Document]:
    """Documents that no training of ours sees; of a stream cache, those of the source that it was made of.

    Those of a mixture are all its sources', in their order.
    """
    if config.mixture:
        return [document for part in config.sources().values() for document in heldout_documents(part)]
    if config.source is DataSource.streams:
        return heldout_documents(open_cache(Path(str(config.path))).identity.data.config())
    if _is_text(config):
        return text_documents(config, Split.heldout)
    return stdlib_documents(Split.heldout, config.heldout_every)
