"""`+recipe=evaluate`: measure heads: acceptance, the certificate, speed on the clock.

python -m mtptrain +recipe=evaluate checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mtptrain.certificate.controls import run_controls
from mtptrain.certificate.greedy import certify_texts
from mtptrain.certificate.logits import certify_logits
from mtptrain.certificate.loop import certify_sampled_runs, loop_runs, loop_totals, sample_texts
from mtptrain.certificate.passes import certify_passes
from mtptrain.certificate.sampler import sampler_certificate
from mtptrain.config import RunConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_curve, of_measuring, of_tracking, settings
from mtptrain.config.rules import as_written
from mtptrain.decoding.policy import GREEDY
from mtptrain.errors import CHECK_FAILED, UserError
from mtptrain.evaluation.breakdown import break_down, calibrate, sweep_thresholds
from mtptrain.evaluation.certificate_result import Certificate
from mtptrain.evaluation.compare import CountsByLength, compare_with_stock
from mtptrain.evaluation.head_result import HeadResult
from mtptrain.evaluation.heads import Head, count_chosen, count_seen, describe_policy, describe_prompts, teacher_forced
from mtptrain.evaluation.metrics import by_domain, summarize, totals
from mtptrain.evaluation.plausibility import summarize_heads
from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.tables import print_summary
from mtptrain.evaluation.report.training_page import training_of
from mtptrain.evaluation.result import (
    EVALUATION_FILE,
    SCHEMA,
    Evaluation,
    StepLatency,
    read_evaluation,
    write_evaluation,
)
from mtptrain.evaluation.speedup import (
    BatchRuns,
    batch_length,
    cut_batches,
    machine_load,
    run_interleaved,
    tokens_per_second,
)
from mtptrain.evaluation.steptime import describe_times, measure_steps
from mtptrain.mtp.start import has_stock
from mtptrain.recipes.curve import CurveBuilder, UnreadableError, chosen_to_decode, session_in
from mtptrain.recipes.publish import publish
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prepare_traces
from mtptrain.replay.replay import replay_lengths, replay_other_drafts
from mtptrain.run.folder import FolderUse
from mtptrain.run.progress import Progress
from mtptrain.run.tables import open_console
from mtptrain.traces.file import Trace, TraceSet
from mtptrain.training.checkpoint import checkpoint_name, open_checkpoint
from mtptrain.training.run_checkpoints import checkpoints_of_run

PROCESSES = "led"
FOLDER = FolderUse.result
STEP_REPETITIONS = 20
GREEDY_PROMPTS = 2  # decoded greedily for the certificate of a run that samples


def run_loops(session: Session, heads: list[Head], traces: list[Trace]) -> dict[int, list[BatchRuns]]:
    """Decode some prompts with every head and K; return the runs by batch size."""
    config, model = session.config, session.backbone.model
    sizes, lengths = config.evaluation.batch_sizes, list(range(1, config.decoding.draft_length + 1))
    stacks = {head.name: head.stack for head in heads}
    batches = {size: cut_batches(traces, size, config.evaluation.timed_prompts) for size in sizes}
    runs: dict[int, list[BatchRuns]] = {}
    done = 0
    with Progress("decoding batches", sum(map(len, batches.values())), unit="batches") as progress:
        for size in sizes:

            def report(number: int, note: str, before: int = done) -> None:
                progress.update(before + number, note, 1)

            runs[size] = run_interleaved(
                model, stacks, batches[size], lengths, session.limits, session.policy, config.seed, report
            )
            done += len(batches[size])
    return runs


def make_certificate(
    session: Session, heads: list[Head], traces: list[Trace], runs: dict[int, list[BatchRuns]]
) -> Certificate:
    """Return the certificate: every check that must pass before a figure counts."""
    model, policy, longest = session.backbone.model, session.policy, session.config.decoding.draft_length
    stacks = {head.name: head.stack for head in heads}
    greedy = [run for of_size in runs.values() for run in of_size]
    sampled, pass_counts = [], None
    if not policy.is_greedy:
        if policy.draws_greedily:  # given the text, nothing about its passes is left to chance
            sampled = loop_runs(model, stacks, greedy, policy)
        else:
            pass_counts = certify_sampled_runs(model, stacks, greedy, policy)
        policy, seed = replace(GREEDY, past_depth=policy.past_depth), session.config.seed
        few = [[trace] for trace in traces[:GREEDY_PROMPTS]]
        greedy = run_interleaved(model, stacks, few, [longest], session.limits, policy, seed, lambda *_: None)
    loops = loop_runs(model, stacks, greedy, policy)
    logits, drafts = certify_logits(model, stacks, traces, session.limits, longest, loops)
    identity, replay = certify_texts(loops, logits.backbone.gap), certify_passes([*loops, *sampled], drafts)
    sampler = sampler_certificate(device=model.lm_head.weight.device)
    controls = run_controls(model, stacks, traces, longest)
    parts = [logits.passed, identity.passed, replay.passed, sampler.passed, controls.passed]
    return Certificate(
        passed=all(parts) and (pass_counts is None or pass_counts.passed),
        logits=logits,
        greedy_identity=identity,
        replay_equals_loop=replay,
        pass_count_test=pass_counts,
        sampler=sampler,
        controls=controls,
    )


def measure_times(session: Session, heads: list[Head], runs: list[BatchRuns]) -> dict[str, StepLatency]:
    """Return, by head, the step times on the prompts of a batch and the speed-ups that they predict for the runs."""
    traces, longest = runs[0].traces, session.config.decoding.draft_length
    shortest = min(len(trace.prompt.tokens) for trace in traces)
    prompts = [trace.prompt.tokens[:shortest] for trace in traces]
    latencies = {}
    for head in heads:
        lengths = {k: batch_length(runs, head.name, k) for k in range(1, longest + 1)}
        model, limits = session.backbone.model, session.limits
        times = measure_steps(model, head.stack, prompts, longest, limits, STEP_REPETITIONS)
        latencies[head.name] = describe_times(times, lengths)
    return latencies


def measure_head(
    session: Session, head: Head, traces: list[Trace], runs: list[BatchRuns]
) -> tuple[HeadResult, CountsByLength]:
    """Return the entry of a head in evaluation.json, and its counts on every trace by draft length.

    Args:
        session: of the run.
        head: the head.
        traces: the texts that it is replayed on.
        runs: its loops at the smallest batch.
    """
    config, model, policy = session.config, session.backbone.model, session.policy
    longest, rows, tokenizer = (
        config.decoding.draft_length,
        config.evaluation.heldout_sequences,
        session.source.tokenizer,
    )
    groups, domains = [trace.prompt.group for trace in traces], [trace.prompt.domain for trace in traces]
    drafts, counts = replay_lengths(model, head.stack, traces, longest, policy, free_running=True)
    other = replay_other_drafts(drafts, policy)
    steps = policy.trained_steps(head.stack.depth, longest)
    forced = teacher_forced(model, head.stack, session.heldout_corpus, session.piece_length, rows, steps)
    result = HeadResult(
        name=head.name,
        checkpoint=head.checkpoint,
        mode=head.mode,
        depth=head.stack.depth,
        parameters=head.num_parameters,
        teacher_forced=forced,
        replay={k: summarize(counts[k], groups) for k in counts},
        per_prompt={k: [totals([prompt]) for prompt in counts[k]] for k in counts},
        domains=by_domain(counts[longest], groups, domains),
        breakdown=break_down(traces, drafts, policy, longest, tokenizer),
        calibration=calibrate(drafts, policy, longest),
        thresholds=sweep_thresholds(drafts, policy, longest),
        loop={k: loop_totals(runs, head.name, k) for k in counts},
        samples=sample_texts(tokenizer, runs, head.name, longest),
        seen_prompts=count_seen(head.passages, session.hasher, [trace.prompt.tokens for trace in traces]),
        other_drafts=None if other is None else {k: summarize(other[k], groups) for k in other},
        chosen_on=count_chosen(head.selection, [trace.prompt.tokens for trace in traces]),
    )
    return result, counts


def evaluate_heads(session: Session, heads: list[Head], trace_set: TraceSet | None = None) -> Evaluation:
    """Measure heads on one backbone, write evaluation.json and report.html, and print the summary.

    Args:
        session: of the run.
        heads: to measure.
        trace_set: texts that were prepared before; None prepares them.
    """
    longest, trace_set = session.config.decoding.draft_length, trace_set or prepare_traces(session)
    traces = trace_set.traces
    runs = run_loops(session, heads, traces)
    measured = {head.name: measure_head(session, head, traces, runs[min(runs)]) for head in heads}
    replays = {name: counts for name, (_, counts) in measured.items()}
    gain, gain_by_domain = compare_with_stock(replays, [trace.prompt for trace in traces])
    evaluation = Evaluation(
        schema=SCHEMA,
        provenance=session.folder.provenance,
        backbone=session.describe_backbone(),
        prompts=describe_prompts(trace_set),
        policy=describe_policy(session.policy, session.config.decoding.served_as),
        draft_length=longest,
        heads=[entry for entry, _ in measured.values()],
        gain=gain,
        gain_by_domain=gain_by_domain,
        certificate=make_certificate(session, heads, traces, runs),
        speedup={
            size: summarize_heads(batches, {head.name: head.stack.depth for head in heads}, list(range(1, longest + 1)))
            for size, batches in runs.items()
        },
        machine={size: machine_load(batches) for size, batches in runs.items()},
        steps={size: measure_times(session, heads, batches) for size, batches in runs.items()},
        plain_tokens_per_second={
            size: tokens_per_second([plain for run in batches for plain in run.plain]) for size, batches in runs.items()
        },
    )
    folder = session.folder.path
    write_evaluation(folder / EVALUATION_FILE, evaluation)
    write_report(evaluation, folder / "report.html", training_of(evaluation, folder))
    print_summary(evaluation, open_console())
    session.folder.print_status(f"wrote {folder / EVALUATION_FILE} and {folder / 'report.html'}")
    return evaluation


def require_certificate(evaluation: Evaluation) -> None:
    """End the run with exit code 3 if the certificate failed; call it once everything is written."""
    if not evaluation.certificate.passed:
        raise SystemExit(CHECK_FAILED)


def reads(config: RunConfig) -> Settings:
    """Return the settings that an evaluation reads."""
    used = ALWAYS | of_backbone(config) | settings("checkpoint", "checkpoints", "overwrite")
    used |= of_curve(config) if config.measures_all else of_measuring(config)
    if config.checkpoint == "stock":
        used -= {"evaluation.include_stock"}
    return used | (of_tracking(config) - {"tracking.checkpoints", "tracking.metrics_file"})


def check(config: RunConfig) -> None:
    """Refuse an evaluation without a head, of several heads, or of all checkpoints of no run."""
    if config.checkpoints and not config.measures_all:
        raise UserError(
            f"checkpoints={as_written(config.checkpoints)}: evaluate takes one head, checkpoint=PATH, and with "
            "checkpoints=all every checkpoint of its run; +recipe=compare takes several heads"
        )
    if config.measures_all and config.checkpoint in (None, "stock"):
        raise UserError(
            f"checkpoints=all: needs the folder of a run, and checkpoint={as_written(config.checkpoint)}; set it to RUN"
        )
    if config.checkpoint is None:
        raise UserError("checkpoint=null: evaluate needs a head; give a run folder, a step_* folder, or `stock`")


def run(session: Session) -> None:
    """Measure `checkpoint`, beside the stock head unless `checkpoint` is the stock head itself.

    The exit code is 3 if the certificate failed.
    """
    if session.config.measures_all:
        run_all(session)
        return
    setting = str(session.config.checkpoint)
    checkpoint = None if setting == "stock" else session.checkpoint(setting)
    heads = []
    if checkpoint is None or (session.config.evaluation.include_stock and has_stock(session.backbone)):
        heads.append(session.stock_head())
    if checkpoint is not None:
        heads.append(session.trained_head(checkpoint))
    with session.folder.open_trackers() as trackers:
        evaluation = evaluate_heads(session, heads)
        publish(trackers, session.folder, evaluation)
    require_certificate(evaluation)


def run_all(session: Session) -> None:
    """Measure every checkpoint of the run in `checkpoint` by replay, and decode those of `evaluation.decoded`.

    Raises:
        UserError: the run has no usable checkpoint.
        SystemExit: with exit code 3, if the certificate of a decoded one failed.
    """
    root = checkpoints_of_run(Path(str(session.config.checkpoint)))
    with session.folder.open_trackers() as trackers:
        builder = CurveBuilder(session, root, trackers)
        pending = builder.pending()
        with Progress("measuring checkpoints", len(pending), unit="checkpoints") as progress:
            for number, (step, folder) in enumerate(pending.items(), start=1):
                try:
                    builder.measure(folder)
                except UnreadableError as error:
                    builder.skip(folder, str(error))
                progress.update(number, f"step {step}", 1)
        if not builder.curve.points:
            raise UserError(f"checkpoint={session.config.checkpoint}: no checkpoint of it can be measured; see above")
        builder.finish()
        evaluations = decode_checkpoints(session, builder)
        for evaluation in evaluations.values():
            publish(trackers, session.folder, evaluation)
    require_all(evaluations)


def decode_checkpoints(session: Session, builder: CurveBuilder) -> dict[Path, Evaluation]:
    """Evaluate the checkpoints of `evaluation.decoded`, each into a folder named after its step; keep finished ones."""
    evaluations = {}
    for point in chosen_to_decode(builder):
        folder = session.folder.path / checkpoint_name(point.step)
        if (folder / EVALUATION_FILE).exists() and session.config.resume == "auto":
            evaluations[folder] = read_evaluation(folder, "output_dir")
            session.folder.print_status(f"step {point.step} is decoded already: {folder / EVALUATION_FILE} is kept")
            continue
        inner = session_in(session, folder)
        heads = [inner.trained_head(open_checkpoint(Path(point.checkpoint)))]
        if builder.stock is not None:
            heads.insert(0, inner.stock_head())
        evaluations[folder] = evaluate_heads(inner, heads, builder.trace_set)
    return evaluations


def require_all(evaluations: dict[Path, Evaluation]) -> None:
    """End the run with exit code 3 if a certificate failed; call it once everything is written."""
    for evaluation in evaluations.values():
        require_certificate(evaluation)
