"""`+recipe=distill` and `+recipe=pretrain`: train a head on a frozen backbone, then measure it.

python -m mtptrain +recipe=distill mtp.steps=3 loss.divergence=kl
python -m mtptrain +recipe=pretrain
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mtptrain.backbone.load import Backbone
from mtptrain.backbone.release_config import stored_scheme
from mtptrain.checkpoint import BEST, checkpoint_folders, find_checkpoint, newest_checkpoint
from mtptrain.config import SHARED_PLACEMENTS, DataSource, MtpConfig, RunConfig
from mtptrain.data.batches import BatchSource, PackedBatches
from mtptrain.data.feed.batches import StreamedBatches
from mtptrain.data.feed.feed import FeedPlan
from mtptrain.data.feed.lane import RowShape
from mtptrain.data.splits import training_documents
from mtptrain.data.streams.batches import StreamBatches
from mtptrain.data.streams.manifest import check_origin, check_shards, hash_tokenizer, read_manifest
from mtptrain.data.tokens import cache_folder, tokenize_corpus
from mtptrain.distributed import leave, on_first, rank
from mtptrain.engines.engine import make_engine
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.metrics import acceptance_length, by_position
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.fake_quantization import rows_by_tensor
from mtptrain.mtp.initial import describe_start, has_stock, initial_stack, place, stock_tensors
from mtptrain.mtp.stack import MtpStack, head_digest, stack_from_tensors
from mtptrain.mtp.trainable import freeze_untrained
from mtptrain.recipes.evaluate import evaluate_heads
from mtptrain.recipes.inputs import (
    can_decode,
    heldout_corpus,
    open_backbone,
    open_encoder,
    piece_length,
    stock_head,
)
from mtptrain.recipes.on_policy import on_policy_corpus
from mtptrain.recipes.publish import publish
from mtptrain.recipes.traces import check_prompts, gather_traces, replay_head
from mtptrain.run.typed_json import to_json
from mtptrain.run_folder import RunFolder
from mtptrain.trainer import Probe, Trainer
from mtptrain.wandb_mirror import WandbMirror

PROBE_PROMPTS = 16  # few enough that a replay costs about as much as two training steps


def training_batches(config: RunConfig, run_folder: RunFolder, backbone: Backbone, stack: MtpStack) -> BatchSource:
    """Packed training batches in the backbone's tokens; `stack` drafts them where the backbone has to write them."""
    data, size = config.data, config.train.batch_size
    if data.source is DataSource.streams:
        manifest = read_manifest(Path(str(data.path)))
        check_origin(manifest, backbone.fingerprint, hash_tokenizer(backbone.tokenizer))
        check_shards(manifest)
        dtype = backbone.model.lm_head.weight.dtype
        return StreamBatches(manifest, data.sequence_length, size, config.seed, dtype)
    longest = piece_length(config, backbone.config)
    if data.source is DataSource.on_policy:
        own = on_policy_corpus(config, run_folder, backbone, stack)
        return PackedBatches(own, data.sequence_length, size, config.seed, longest)
    encoder = open_encoder(config, backbone)
    if data.is_streamed:
        shape = RowShape(data.sequence_length, longest)
        plan = FeedPlan(data.sources(), data.weights(), encoder, shape, size, config.seed)
        return StreamedBatches(plan, data.workers)
    corpus = tokenize_corpus(training_documents(data), encoder, cache_folder(data.cache_dir))
    return PackedBatches(corpus, data.sequence_length, size, config.seed, longest)


def start_stack(config: MtpConfig, backbone: Backbone, seed: int) -> tuple[MtpStack, dict[str, Any]]:
    """The modules before training, from `mtp.init`, and what a checkpoint records of that start."""
    tensors: dict[str, Tensor] | None = None
    if config.init == "stock":
        tensors = stock_tensors(backbone)
    elif config.init not in ("fresh", "backbone"):
        try:
            start = find_checkpoint(Path(config.init))
        except UserError as error:
            raise UserError(f"mtp.init={config.init}: {error}") from None
        if start.owner.get("backbone") != backbone.fingerprint:
            raise UserError(f"mtp.init={config.init}: was trained on another backbone; set backbone.path to that one")
        tensors = start.tensors()
    stack = initial_stack(config, backbone, tensors, seed)
    return stack, describe_start(config, tensors) | {"sha256": head_digest(stack.state_dict())}


def make_probe(config: RunConfig, run_folder: RunFolder, backbone: Backbone, stack: MtpStack) -> Probe:
    """Replays a small, fixed set of traces while the head trains."""
    corpus, longest = heldout_corpus(config, backbone), config.decoding.draft_length
    count = min(PROBE_PROMPTS, config.evaluation.num_prompts)
    traces = gather_traces(config, run_folder, backbone, corpus, count).traces
    kept = min(PROBE_PROMPTS, len(traces))  # a trace set, or conversations, may give more
    traces = [traces[number * len(traces) // kept] for number in range(kept)]

    def measure() -> dict[str, float]:
        counts = replay_head(config, backbone, stack, traces)
        figures = {f"replay/acceptance_length_{k}": acceptance_length(counts[k]) for k in counts}
        for length, found in counts.items():
            for k, rate in enumerate(by_position(found).conditional, start=1):
                if rate is not None:
                    figures[f"replay/accepted_{k}_of_{length}"] = rate
        return figures

    return Probe(config.evaluation.every, measure, f"replay/acceptance_length_{longest}")


def make_trainer(
    config: RunConfig, run_folder: RunFolder, backbone: Backbone, stack: MtpStack, start: dict[str, Any]
) -> Trainer:
    """The trainer of a head, at the newest checkpoint when the run is resumed."""
    scheme = stored_scheme(backbone.shards) if config.mtp.quant_aware else None
    owner = {
        "task": config.task.value,
        "backbone": backbone.fingerprint,
        "mode": config.mtp.mode.value,
        "depth": config.mtp.depth,
        "steps": config.mtp.num_steps,
        "trainable": config.mtp.trainable,
        "optimizer": config.train.optimizer.value,
        "start": start,
        "quant_aware": scheme,
    }
    freeze_untrained(stack, config.mtp.trainable)
    stored = rows_by_tensor(backbone.config, scheme) if scheme else None
    steps, recompute = config.mtp.num_steps, config.train.recompute
    objective = RolloutObjective(backbone.model, stack, config.loss, steps, recompute, stored)
    batches = training_batches(config, run_folder, backbone, stack)
    folder = run_folder.path / "checkpoints"
    is_probed = config.evaluation.every > 0 and can_decode(config, backbone)
    probe = make_probe(config, run_folder, backbone, stack) if is_probed else None
    engine = make_engine(config.engine, stack, config.train, config.offload)
    trainer = Trainer(engine, objective, batches, config.train, folder, owner, config.task.value, probe)
    checkpoint = on_first(lambda: newest_checkpoint(folder, run_folder.say)) if config.resume == "auto" else None
    if checkpoint is not None:
        trainer.restore(checkpoint)
        run_folder.say(f"continuing from step {trainer.step}")
    return trainer


def train_head(config: RunConfig, run_folder: RunFolder, backbone: Backbone, mirror: WandbMirror) -> MtpStack:
    """Train the modules that `config.mtp` asks for; rank 0 returns them, whole and in eval mode."""
    stack, start = start_stack(config.mtp, backbone, config.seed)
    if "conversion" in start:
        run_folder.say(f"mtp.init={config.mtp.init}: {start['conversion']}")
    trainer = make_trainer(config, run_folder, backbone, stack, start)
    log = run_folder.open_log(mirror, trainer.step)
    try:
        trainer.run(log)
    finally:
        log.close()
    if config.tracking.checkpoints and rank() == 0:
        best = trainer.checkpoints / BEST
        kept = [checkpoint_folders(trainer.checkpoints)[-1], *([best] if best.is_dir() else [])]
        mirror.artifact("checkpoints", "model", kept)
    tensors = trainer.engine.tensors()
    if rank() > 0:
        return stack
    whole = stack_from_tensors(backbone.config, config.mtp.depth, tensors, "the trained head")
    return place(whole, backbone).eval()


def run(config: RunConfig, run_folder: RunFolder) -> None:
    """Train a head, then measure it beside the stock head."""
    with run_folder.open_mirror() as mirror:
        train_and_measure(config, run_folder, mirror)


def train_and_measure(config: RunConfig, run_folder: RunFolder, mirror: WandbMirror) -> None:
    """What `run` does while its mirror is open."""
    from_streams = config.data.source is DataSource.streams
    backbone = open_backbone(config, has_layers=not from_streams)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in backbone.model.parameters())  # whole, if shared
    held = ", its decoder layers left on disk" if from_streams else ""
    run_folder.say(f"backbone {config.backbone.name}: {num_parameters / 1e6:.2f} M parameters, frozen{held}")
    is_measured = config.backbone.placement not in SHARED_PLACEMENTS
    if config.evaluate_at_end and is_measured:  # before hours of training, not after them
        check_prompts(config, backbone, heldout_corpus(config, backbone))
    stack = train_head(config, run_folder, backbone, mirror)
    is_first = rank() == 0
    leave()  # the measuring is done by rank 0 alone
    if not is_measured and is_first:
        run_folder.say(
            f"backbone.placement={config.backbone.placement.value}: decodes nothing; measure the head in a run of its "
            f"own: python -m mtptrain +recipe=evaluate checkpoint={run_folder.path}"
        )
    if not config.evaluate_at_end or not is_measured or not is_first:
        return
    if from_streams:
        backbone = open_backbone(config)
    heads = [Head("trained", str(run_folder.path / "checkpoints"), config.mtp.mode.value, stack)]
    if config.evaluation.include_stock and has_stock(backbone):
        heads.insert(0, stock_head(backbone))
    publish(mirror, run_folder, to_json(evaluate_heads(config, run_folder, backbone, heads)))
