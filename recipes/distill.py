"""`+recipe=distill`: train a head on a frozen backbone's own next-token distribution, then measure it.

python -m mtptrain +recipe=distill mtp.steps=3 loss.divergence=tv
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

from mtptrain.backbone.placement import check_experts
from mtptrain.config import DataSource, DraftChoice, HeadExperts, PastDepth, Placement, RunConfig, ServedAs, require
from mtptrain.config.backbone import backbone_words
from mtptrain.config.reads import (
    ALWAYS,
    UNTRAINED,
    Settings,
    of_backbone,
    of_loss,
    of_measuring,
    of_probe,
    of_training,
    of_training_text,
    settings,
)
from mtptrain.data.batches import BatchSource, PackedBatches
from mtptrain.data.passages import Passages, prompt_digest
from mtptrain.data.recorded import RecordedBatches
from mtptrain.evaluation.heads import Head, heldout_figures, teacher_forced
from mtptrain.evaluation.metrics import acceptance_length, by_position
from mtptrain.evaluation.result import EVALUATION_FILE, Evaluation, read_evaluation
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.fake_quantization import rows_by_tensor
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import freeze_untrained, has_stock
from mtptrain.mtp.tensors import build_stack
from mtptrain.recipes.evaluate import evaluate_heads, require_certificate
from mtptrain.recipes.lead import lead
from mtptrain.recipes.on_policy import on_policy_corpus
from mtptrain.recipes.publish import publish
from mtptrain.recipes.resume import check_resumable, data_digest, head_settings, resume
from mtptrain.recipes.session import Session
from mtptrain.recipes.start import start_stack, whole_start
from mtptrain.recipes.streams import describe_streams, stream_batches
from mtptrain.recipes.traces import check_traces, gather_traces, print_seen_prompts, replay_head
from mtptrain.release.config import stored_scheme
from mtptrain.run.distributed import broadcast_object, leave, on_rank0, rank
from mtptrain.run.progress import waiting
from mtptrain.run.tracking import Trackers
from mtptrain.traces.file import Trace, record_traces
from mtptrain.training.checkpoint import (
    BEST,
    MANIFEST,
    HeadIdentity,
    checkpoint_folders,
    find_checkpoint,
    open_checkpoint,
)
from mtptrain.training.engine import make_engine
from mtptrain.training.trainer import Probe, Trainer

PROCESSES = "any"
EXPECTED = "replay/expected_length"  # at temperature 1
PROBE_PROMPTS, PROBE_ROWS = 16, 16  # few enough that each part of a probe costs about two to four training steps


def reads(config: RunConfig) -> Settings:
    """Return the settings that training a head and measuring it read."""
    used = ALWAYS | of_backbone(config) | of_training_text(config) | of_training(config) | of_loss(config)
    used |= settings("mtp", "evaluate_at_end")
    if is_measured(config):
        used |= of_measuring(config) | {"overwrite"}
    can_probe = config.data.source is not DataSource.streams and config.backbone.placement is not Placement.zero3
    return used | of_probe(config) if can_probe else used


def check(config: RunConfig) -> None:
    """Refuse a loss on data tokens, which is not distillation."""
    require(
        config.loss.divergence.value != "ce",
        "loss.divergence",
        "ce",
        "is training on data tokens, not distillation; use +recipe=pretrain",
    )


def training_batches(session: Session, stack: MtpStack) -> BatchSource:
    """Return the packed training batches; `stack`, whole, drafts for a backbone that has to write the texts itself."""
    config = session.config
    data, size = config.data, config.train.batch_size
    if data.source is DataSource.streams:
        return stream_batches(session)
    if data.source is DataSource.on_policy:
        corpus = on_policy_corpus(session, lambda: whole_start(session, stack))
        return PackedBatches(corpus, data.sequence_length, size, config.seed, session.piece_length)
    return session.text_batches


def describe_text(session: Session, batches: BatchSource) -> str:
    """Return the line that says what is trained on: the text's origin and size, and its held-out share."""
    data = session.config.data
    if data.source is DataSource.streams:
        return describe_streams(session)
    share = f"one document in {data.heldout_every} is held out"
    if isinstance(batches, PackedBatches):
        name = {DataSource.stdlib: "the standard library", DataSource.on_policy: "the backbone's own texts"}
        what = name.get(data.source, f"data.path={data.path}")
        corpus = batches.corpus
        return f"training on {what}: {len(corpus.offsets) - 1:,} documents, {len(corpus.tokens):,} tokens; {share}"
    total = sum(data.weights())
    parts = [f"{name} {weight / total:.0%}" for name, weight in zip(data.sources(), data.weights(), strict=True)]
    what = ", ".join(parts) if data.mixture else f"data.path={data.path}"
    return f"training on {what}, read and tokenised during training; {share}"


def shared_traces(session: Session, make: Callable[[], list[Trace]]) -> list[Trace]:
    """Return the traces that a function decodes on every process; it runs on rank 0 if they share the backbone."""
    if session.config.backbone.placement is not Placement.expert_parallel:
        return make()
    return broadcast_object(lead(session, make)) or []


def passages_before(session: Session) -> Passages:
    """Return the passages that the head of `mtp.init` was trained on, as far as they are known."""
    init = session.config.mtp.init
    known = None if init in ("stock", *UNTRAINED) else session.checkpoint(init).passages()
    return known or Passages.none()


def make_probe(session: Session, stack: MtpStack) -> Probe:
    """Return a probe that replays a small, fixed set of traces while the head trains."""
    config = session.config
    count = min(PROBE_PROMPTS, config.evaluation.num_prompts)
    gathered = shared_traces(session, lambda: gather_traces(session, count).traces)
    size = min(PROBE_PROMPTS, len(gathered))  # a trace set, or conversations, may hold more
    traces = [gathered[number * len(gathered) // size] for number in range(size)]
    longest = config.decoding.draft_length
    expected = sampled_session(session) if config.evaluation.best_by == "expected" else None
    texts = shared_traces(expected, lambda: continue_prompts(expected, traces)) if expected is not None else []
    served_as = config.decoding.served_as
    if served_as is not ServedAs.exact:
        session.folder.print_status(
            f"evaluation.every={config.evaluation.every}: a head in training is measured as it is trained; "
            f"decoding.served_as={served_as.value} holds from the end of the training on"
        )

    def measure() -> dict[str, float]:
        counts = replay_head(session, stack, traces)
        lengths = {k: acceptance_length(counts[k]) for k in counts}
        figures = {f"replay/acceptance_length_{k}": length for k, length in lengths.items() if length is not None}
        for length, prompts in counts.items():
            for k, rate in enumerate(by_position(prompts).conditional, start=1):
                if rate is not None:
                    figures[f"replay/accepted_{k}_of_{length}"] = rate
        if expected is not None:
            at_1 = acceptance_length(replay_head(expected, stack, texts)[longest])
            figures |= {} if at_1 is None else {f"{EXPECTED}_{longest}": at_1}
        corpus, rows = session.heldout_corpus, min(PROBE_ROWS, config.evaluation.heldout_sequences)
        model, steps = session.training_backbone.model, config.mtp.num_steps
        return figures | heldout_figures(teacher_forced(model, stack, corpus, session.piece_length, rows, steps))

    score = f"replay/acceptance_length_{longest}" if expected is None else f"{EXPECTED}_{longest}"
    prompts = [prompt_digest(trace.prompt.tokens) for trace in traces]
    return Probe(config.evaluation.every, measure, score, prompts)


def sampled_session(session: Session) -> Session | None:
    """Return the session with a decoding policy of temperature 1; None if it has one already."""
    decoding = session.config.decoding
    if decoding.temperature == 1:
        return None
    inner = copy(session)
    # Sampled drafts that wrap around have no replay, and at temperature 0 no kind of draft could be chosen.
    draft = DraftChoice.greedy if decoding.past_depth is PastDepth.wrap_around else decoding.draft
    inner.config = replace(session.config, decoding=replace(decoding, temperature=1.0, draft=draft))
    inner.__dict__.pop("policy", None)
    return inner


def continue_prompts(session: Session, traces: list[Trace]) -> list[Trace]:
    """Return new continuations of the prompts of some traces, under the policy of the session."""
    prompts = [trace.prompt for trace in traces]
    with waiting(f"continuing {len(prompts)} prompts at temperature {session.policy.temperature:g}"):
        return record_traces(session.backbone.model, prompts, session.limits, session.policy, session.config.seed)


def make_trainer(session: Session, stack: MtpStack, start: dict[str, Any]) -> Trainer:
    """Return the trainer of a head, restored from the newest checkpoint if the run is resumed."""
    config, backbone = session.config, session.training_backbone
    scheme = stored_scheme(backbone.shards) if config.mtp.quant_aware else None
    batches = training_batches(session, stack)
    data = batches.corpus.digest() if isinstance(batches, PackedBatches) else data_digest(session)
    identity = HeadIdentity(
        task=config.task,
        backbone=backbone.fingerprint,
        mode=config.mtp.mode,
        depth=config.mtp.depth,
        steps=config.mtp.num_steps,
        start=start,
        quant_aware=scheme,
        data=data,
        settings=head_settings(session),
    )
    freeze_untrained(stack, config.mtp.trainable)
    quantized_rows = rows_by_tensor(backbone.config, scheme) if scheme else None
    steps, recompute = config.mtp.num_steps, config.train.recompute
    make_objective = session.objective or RolloutObjective
    objective = make_objective(backbone.model, stack, config.loss, steps, recompute, quantized_rows)
    session.folder.print_status(describe_text(session, batches))
    batches = RecordedBatches(batches, session.hasher, passages_before(session))
    if is_measured(config) and not batches.is_stream:
        print_seen_prompts(session, batches.passages())
    folder = session.folder.path / "checkpoints"
    is_probed = config.evaluation.every > 0 and session.can_decode
    probe = make_probe(session, stack) if is_probed else None
    engine = make_engine(config.engine, stack, config.train, config.offload, config.deepspeed)
    trainer = Trainer(engine, objective, batches, config.train, folder, identity, config.task, probe)
    resume(session, trainer)
    return trainer


def train_head(session: Session, trackers: Trackers) -> MtpStack:
    """Train the modules of `config.mtp`. Rank 0 returns them whole and in eval mode, other ranks as they hold them."""
    config, backbone = session.config, session.training_backbone
    stack, start = start_stack(session)
    if "conversion" in start:
        session.folder.print_status(f"mtp.init={config.mtp.init}: {start['conversion']}")
    trainer = make_trainer(session, stack, start)
    log = session.folder.open_log(trackers, trainer.step)
    try:
        trainer.run(log)
    finally:
        log.close()
    if config.tracking.checkpoints and rank() == 0:
        best = trainer.checkpoints / BEST
        kept = [checkpoint_folders(trainer.checkpoints)[-1], *([best] if best.is_dir() else [])]
        trackers.artifact("checkpoints", "model", kept)
    if rank() > 0:
        return stack
    trained = checkpoint_folders(trainer.checkpoints)[-1]
    if not config.evaluate_at_end:
        session.folder.print_status(f"wrote {trained}; measure it with {way_to_measure(session)}")
    tensors, weight = open_checkpoint(trained).head(), backbone.model.lm_head.weight
    whole = build_stack(backbone.config, config.mtp.depth, tensors, str(trained), weight)
    return session.serve(whole.eval(), config.mtp.zero_first_embedding)


def run(session: Session) -> None:
    """Train a head, then measure it beside the stock head; the exit code is 3 if the certificate failed."""
    is_due = is_measured(session.config)
    with session.folder.open_trackers() as trackers:
        stack = train(session, trackers)
        evaluation = on_rank0(lambda: kept_evaluation(session)) if is_due else None
        if session.config.backbone.placement is not Placement.expert_parallel:
            is_rank0 = rank() == 0
            leave()  # rank 0 measures alone
            if not is_rank0:
                return
        if is_due and evaluation is None:
            evaluation = lead(session, lambda: measure(session, stack, trackers))
    if evaluation is not None:
        require_certificate(evaluation)


def kept_evaluation(session: Session) -> Evaluation | None:
    """Return the evaluation of an earlier start if it measures the last checkpoint; None if there has to be one."""
    path, print_status = session.folder.path / EVALUATION_FILE, session.folder.print_status
    if not path.exists():
        return None
    last = checkpoint_folders(session.folder.path / "checkpoints")[-1]
    if path.stat().st_mtime < (last / MANIFEST).stat().st_mtime:
        print_status(f"{path} measures an earlier checkpoint and is replaced")
    elif session.config.overwrite:
        print_status(f"{path} is replaced")
    else:
        print_status(f"{path} measures this head already; overwrite=true measures it again")
        return read_evaluation(path, "output_dir")
    return None


def is_measured(config: RunConfig) -> bool:
    """Return whether the trained head is measured at the end; a backbone partitioned by ZeRO-3 does not decode."""
    return config.evaluate_at_end and config.backbone.placement is not Placement.zero3


def train(session: Session, trackers: Trackers) -> MtpStack:
    """Check the prompts, print the backbone's size, and train."""
    config = session.config
    if config.deepspeed:
        from mtptrain.run.deepspeed import check_settings  # importing DeepSpeed takes seconds

        check_settings(config.deepspeed)
    if config.mtp.experts is HeadExperts.expert_parallel:
        check_experts(session.source.config.n_routed_experts, "mtp.experts", "replicate")
    check_resumable(session)
    if is_measured(config):  # before hours of training, not after them
        check_traces(session)
    model = session.training_backbone.model
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # whole, if shared
    note = ", its decoder layers left on disk" if config.data.source is DataSource.streams else ""
    session.folder.print_status(
        f"backbone {config.backbone.name}: {num_parameters / 1e6:.2f} M parameters, frozen{note}"
    )
    stack = train_head(session, trackers)
    if config.evaluate_at_end and not is_measured(config):
        session.folder.print_status(
            "backbone.placement=zero3: gathers every layer for every token and does not decode; measure the head in a "
            "run of its own, with backbone.placement=expert_parallel or in one process: "
            f"{way_to_measure(session)}"
        )
    return stack


def way_to_measure(session: Session) -> str:
    """Return the settings that measure the trained head in a run of its own."""
    backbone = session.config.backbone
    words = backbone_words(backbone.name, backbone.path)
    return shlex.join(["+recipe=evaluate", *words, f"checkpoint={session.folder.path}"])


def measure(session: Session, stack: MtpStack, trackers: Trackers) -> Evaluation:
    """Measure the trained head beside the stock head."""
    checkpoints = session.folder.path / "checkpoints"
    passages = find_checkpoint(checkpoints).passages()
    heads = [Head("trained", str(checkpoints), session.config.mtp.mode.value, stack, passages)]
    if session.config.evaluation.include_stock and has_stock(session.backbone):
        heads.insert(0, session.stock_head())
    evaluation = evaluate_heads(session, heads)
    publish(trackers, session.folder, evaluation)
    return evaluation
