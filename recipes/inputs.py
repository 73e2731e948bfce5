"""Checks of everything that a run reads and that needs no weights, in one order for all recipes.

A backbone of this kind takes minutes to load, so a wrong path, column, prompt or template must be found before that.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtptrain.backbone.load import keeps_quantised
from mtptrain.config import DataSource, did_you_mean
from mtptrain.config.reads import UNTRAINED, Settings
from mtptrain.errors import UserError
from mtptrain.mtp.numerics import served_numerics
from mtptrain.mtp.stack import check_shapes, num_modules
from mtptrain.mtp.start import check_start, check_stock, stored_head
from mtptrain.recipes.on_policy import check_texts
from mtptrain.recipes.session import Session
from mtptrain.recipes.streams import check_streams
from mtptrain.recipes.traces import check_prompts
from mtptrain.run.distributed import choose_device
from mtptrain.training.checkpoint import TENSORS, HeadIdentity

NO_PATH = ("stock", *UNTRAINED)  # heads that are not in a folder of their own


def check_inputs(session: Session, reads: Settings) -> None:
    """Check device, backbone's folder, chat template, heads, prompts and text, as far as the run reads them.

    Whatever names its backbone is compared with this one: by the fingerprint, if that is known without reading weights,
    and otherwise by its sizes.

    Args:
        session: of the run.
        reads: the settings that its recipe reads.

    Raises:
        UserError: the first fault.
    """
    config = session.config
    if not {"backbone.path", "device"} <= reads:  # no backbone is loaded, or it is trained first
        return
    device = choose_device(config.device)
    source = session.source
    if "data.chat_template" in reads:
        _ = session.chat
    check_heads(session, reads)
    if "mtp.init" in reads:
        check_start(config.mtp, source, keeps_quantised(config.backbone, source.config, device))
    if "prompts" in reads:
        check_prompts(session)
    if "evaluation.heldout_sequences" in reads:
        _ = session.heldout_corpus
    if "train.steps" in reads:
        check_training_text(session)


def check_heads(session: Session, reads: Settings) -> None:
    """Refuse a head that the backbone does not have, or whose folder holds no usable checkpoint of this backbone."""
    config = session.config
    paths = [path for group in config.compared for path in group] if "checkpoints" in reads else []
    if "checkpoint" in reads and "watch.minutes" not in reads:  # a watched run may have no checkpoint yet
        paths.append(str(config.checkpoint))
    for path in paths:
        if path == "stock" and config.task == "doctor":  # it examines incomplete heads, too
            stored_head(session.source)
        elif path == "stock":
            check_stock(session.source)
            _check_served(session, reads, num_modules(stored_head(session.source)))
        elif (identity := _check_head(session, path, "", NO_PATH[:1])) is not None:
            _check_served(session, reads, identity.depth)
    if "mtp.init" in reads:
        _check_head(session, config.mtp.init, f"mtp.init={config.mtp.init}: ", NO_PATH)
        _check_served(session, reads, config.mtp.depth)  # not at the end of the training


def _check_head(session: Session, path: str, setting: str, names: Sequence[str]) -> HeadIdentity | None:
    """Refuse a path that holds no usable checkpoint; return its identity, or None for a name of a head.

    Args:
        session: of the run.
        path: the path or name.
        setting: begins the error.
        names: of heads that are not in a folder of their own.
    """
    if path in names:
        return None
    known = session.known_fingerprint
    try:
        checkpoint = session.checkpoint(path)
        if known is None and session.config.task != "doctor":  # it names every tensor of a wrong shape
            check_shapes(checkpoint.stored(TENSORS).shapes, session.source.config, f"checkpoint={checkpoint.folder}")
        return checkpoint.head_identity(known)
    except UserError as error:
        raise UserError(f"{setting}{error}{did_you_mean(path, names)}") from None


def _check_served(session: Session, reads: Settings, depth: int) -> None:
    """Refuse `decoding.served_as` with a server that cannot run so many modules."""
    if "decoding.served_as" in reads:
        served_numerics(session.config.decoding.served_as, False, depth)


def check_training_text(session: Session) -> None:
    """Refuse a text, a stream cache or prompts that cannot be trained on."""
    data = session.config.data
    if data.source is DataSource.streams:
        check_streams(session)
    elif data.source is DataSource.on_policy:
        check_texts(session)
    else:
        _ = session.text_batches
