"""The acceptance of a head before and after it was stored, and the bound on its loss."""

from __future__ import annotations

from transformers import DeepseekV4Config

from mtptrain.backbone.load import Backbone
from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.heads import count_chosen
from mtptrain.evaluation.metrics import acceptance_length, by_position, paired_gain
from mtptrain.export.record import Measured, drawn
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.mtp.start import has_stock, place
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import replay_head
from mtptrain.release.modules import from_release
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.traces.file import Trace
from mtptrain.training.selection import Selection


def replay_stock(session: Session, traces: list[Trace]) -> CountsByLength | None:
    """Return the counts of the head that came with the model; None if it has none, or one that cannot run."""
    if not has_stock(session.backbone):
        return None
    try:
        return replay_head(session, session.stock_head().stack, traces)
    except UserError as error:
        session.folder.print_status(f"no comparison with the model's own head: {error}")
        return None


def reload_head(backbone: Backbone, written: Shards) -> MtpStack:
    """Return the head as a server reads it from an exported folder."""
    config = DeepseekV4Config.from_pretrained(written.folder)  # says no more that the model came with DSpark blocks
    state = from_release(written.only(HEAD_PREFIX), config, backbone.model.lm_head.weight.dtype)
    depth = len({name.split(".")[1] for name in state})
    return place(stack_from_tensors(backbone.config, depth, state, str(written.folder)), backbone).eval()


def lengths(counts: CountsByLength) -> dict[int, float | None]:
    """Return the acceptance length by K."""
    return {k: acceptance_length(counts[k]) for k in counts}


def measure(
    session: Session,
    traces: list[Trace],
    before: CountsByLength,
    stored: tuple[CountsByLength, CountsByLength | None, CountsByLength | None],
    stock: CountsByLength | None,
    selection: Selection | None,
) -> Measured:
    """Return the acceptance of a head before and after it was stored, and its gain over the stock head.

    Args:
        session: of the run.
        traces: the texts.
        before: counts of the head before it was stored.
        stored: the result of `replay_stored`.
        stock: counts of the stock head, if there is one.
        selection: how the head was chosen as the best of its run, if it was.
    """
    (after, other, served), other_policy = stored, session.policy.with_other_drafts
    groups = [trace.prompt.group for trace in traces]
    gains = {} if stock is None else {k: paired_gain(stock[k], after[k], groups) for k in after}
    known = {k: gain for k, gain in gains.items() if gain is not None}
    return Measured(
        prompts=len(traces),
        policy=drawn(session.policy),
        before=lengths(before),
        after=lengths(after),
        positions=by_position(after[max(after)]).conditional,
        gain=known or None,
        other=(drawn(other_policy), lengths(other)) if other_policy and other else None,
        served=lengths(served) if served else None,
        chosen_on=count_chosen(selection, [trace.prompt.tokens for trace in traces]),
        samples=session.policy.is_greedy or not session.policy.draws_greedily,
    )


def check_drop(config: RunConfig, measured: Measured) -> None:
    """Refuse an encoding that costs more acceptance than `export.max_drop`."""
    for k, before in measured.before.items():
        after = measured.after[k]
        if before is None or after is None:  # every text ends at its first token
            continue
        drop = before - after
        if drop > config.export.max_drop:
            raise UserError(
                f"export.max_drop={config.export.max_drop}: storing the head costs {drop:.3f} tokens a pass at K={k} "
                f"({before:.3f} to {measured.after[k]:.3f}); train with mtp.quant_aware=true, or allow more. Nothing "
                "was written"
            )
