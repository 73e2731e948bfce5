"""The sentences about an evaluation: its headline, its speed, its backbone and its certificate."""

# K draft length

from __future__ import annotations

from enum import Enum

from mtptrain.evaluation.certificate_result import (
    Certificate,
    Controls,
    LogitsTest,
    Outcome,
    PassDifference,
    TextDifference,
)
from mtptrain.evaluation.head_result import Gain, SeenPrompts, chosen_text, span
from mtptrain.evaluation.result import Doubt, Evaluation, PolicyResult, PromptsResult, Speedup
from mtptrain.run.typed_json import to_json


class Headline(Enum):
    """The kind of the headline."""

    gain = "gain"
    unclear = "unclear"  # the interval of the gain covers 0
    loss = "loss"
    single = "single"  # one head only, nothing to compare
    failed = "failed"  # the certificate did not pass, so no figure counts


def headline(evaluation: Evaluation) -> Headline:
    """Return the headline's kind, from the longest K: it is fixed before measuring, so no best of several is picked."""
    gain = evaluation.longest_gain
    if not evaluation.certificate.passed:
        return Headline.failed
    if gain is None:
        return Headline.single
    if gain.is_clear:
        return Headline.gain
    return Headline.loss if gain.is_clear_loss else Headline.unclear


def headline_text(evaluation: Evaluation) -> str:
    """Return the acceptance length of the last head at the longest K and its gain over stock, as one sentence."""
    length, head = evaluation.draft_length, evaluation.last_head
    measured = head.replay[length]
    is_failed = headline(evaluation) is Headline.failed
    warning = "CERTIFICATE FAILED, these figures do not count: " if is_failed else ""
    if measured.acceptance_length is None or measured.interval is None:
        return f"{warning}{head.name} head: no verify pass, because every text ends at its first token"
    lead = (
        f"{warning}{head.name} head: {measured.acceptance_length:.2f} tokens a pass at K={length} "
        f"({span(measured.interval)})"
    )
    gain = evaluation.longest_gain
    return lead + (f", {_gain_text(gain)}" if gain else ", with no other head to compare")


def _gain_text(gain: Gain) -> str:
    interval = f"({span(gain.interval, signed=True)})"
    if gain.is_clear:
        return f"{gain.gain:+.2f} over stock {interval}"
    if gain.is_clear_loss:
        return f"a loss of {abs(gain.gain):.2f} against stock {interval}"
    return f"no evidence of a gain over stock: {gain.gain:+.2f} {interval}"


def speed_text(evaluation: Evaluation) -> str:
    """Return the best speed-up of the last head over plain decoding, or why none can be named, as one sentence."""
    batch = evaluation.first_batch
    timed = evaluation.speedup[batch][evaluation.last_head.name]
    best = max(timed, key=lambda length: timed[length].median)
    figure = f"{timed[best].median:.2f}x at K={best} ({_median_span(timed[best])})"
    plain = f"plain decoding, {evaluation.plain_tokens_per_second[batch]:,.1f} tokens/s at batch {batch}"
    if doubts := doubts_text(evaluation, [batch]):
        return f"on the clock: no K is named as the fastest, because {doubts}; measured, {figure} against {plain}"
    elsewhere = doubts_text(evaluation, [size for size in evaluation.shown_batches if size != batch])
    note = f"; doubtful elsewhere, because {elsewhere}" if elsewhere else ""
    if timed[best].median > 1:
        fastest = "; the fastest of the K measured" if len(timed) > 1 else ""
        return f"on the clock: {figure} against {plain}{fastest}{note}"
    return f"on the clock: no K is faster than {plain}; the best is {figure}{note}"


def seen_texts(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each head that saw some of the prompts in training."""
    heads = [(head.name, head.seen_prompts) for head in evaluation.heads]
    return [seen_text(f"the {name} head", seen) for name, seen in heads if seen is not None and seen.seen]


def seen_text(head: str, seen: SeenPrompts) -> str:
    """Return the number of prompts that a head saw in training, as one sentence."""
    unknown = seen.prompts - seen.checked
    note = f" ({unknown} more could not be looked up)" if unknown else ""
    return f"{head} saw {seen.seen} of {seen.checked} prompts in training{note}"


def chosen_texts(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each head that was chosen on some of the prompts that measure it."""
    return [text for head in evaluation.heads if (text := chosen_text(f"the {head.name} head", head.chosen_on))]


def _median_span(speed: Speedup) -> str:
    return f"{100 * speed.confidence:.0f} % interval {span(speed.interval)}"


def doubts_text(evaluation: Evaluation, batches: list[int]) -> str:
    """Return why speed-ups at some batch sizes cannot be right, in words; empty if nothing speaks against them."""
    doubted = {
        doubt: (batch, k, head, speed)
        for batch in reversed(batches)
        for head, by_length in evaluation.speedup[batch].items()
        for k, speed in by_length.items()
        for doubt in speed.doubts
    }
    return ", and ".join(_doubt_text(evaluation, doubt, *doubted[doubt]) for doubt in Doubt if doubt in doubted)


def _doubt_text(evaluation: Evaluation, doubt: Doubt, batch: int, length: int, head: str, speed: Speedup) -> str:
    where = f"at K={length}, batch {batch}"
    if doubt is Doubt.above_acceptance_length:
        highest = max(speed.median, speed.after_prefill.median)
        return f"{highest:.2f}x of the {head} head {where} is more than the acceptance length, which cannot be"
    if doubt is Doubt.ratio_of_heads:
        return f"the speeds of the heads {where} differ by a factor that their acceptance cannot give"
    machine = evaluation.machine[batch]
    share = "" if machine.processor_share is None else f"{100 * machine.processor_share:.0f} % of a processor"
    load = "" if machine.load is None else f"load {machine.load:.1f} on {machine.cores} cores"
    return f"the machine was busy ({', '.join(filter(None, [share, load]))})"


def policy_text(policy: PolicyResult) -> str:
    """Return how tokens were drawn, drafted and verified; choices that change nothing are left out."""
    kinds = f", {policy.draft.value} drafts, {policy.verification.value} verification" if policy.temperature else ""
    neutral = to_json(
        PolicyResult(policy.temperature, None, 1.0, policy.draft, policy.verification, min_confidence=0.0)
    )
    changed = [f", {name} {value}" for name, value in to_json(policy).items() if value != neutral[name]]
    return f"temperature {policy.temperature:g}{kinds}{''.join(changed)}"


def prompts_text(prompts: PromptsResult) -> str:
    """Return number, source and sizes of the prompts that heads were replayed on, as one line."""
    return (
        f"{prompts.count} {prompts.source} prompts of at most {prompts.prompt_tokens} tokens, "
        f"{prompts.conversations} independent groups, {prompts.new_tokens} new tokens each"
    )


def backbone_text(evaluation: Evaluation) -> str:
    """Return the loss of the frozen backbone on held-out text, as one line."""
    backbone = evaluation.backbone
    return (
        f"backbone {backbone.name}: held-out loss {backbone.heldout_nats_per_token:.3f} nats/token, "
        f"{backbone.heldout_bits_per_byte:.3f} bits/byte"
    )


def certificate_text(certificate: Certificate) -> str:
    """Return the result of every part of the certificate, as one line."""
    greedy, replay, counts = certificate.greedy_identity, certificate.replay_equals_loop, certificate.pass_count_test
    parts = [
        f"output identical to plain greedy {greedy.identical}/{greedy.compared}{_ties_text(len(greedy.near_ties))}",
        f"replay = loop {replay.equal}/{replay.compared}{_ties_text(len(replay.near_ties))}",
        _logits_text(certificate.logits),
    ]
    if counts is not None:
        parts.append(f"pass counts of sampled loops {_word(counts.passed)} ({len(counts.tests)} tests)")
    parts.append(f"sampler {_word(certificate.sampler.passed)}")
    parts.append(f"controls {_word(certificate.controls.passed)}{_not_tested(certificate.controls)}")
    return "; ".join(parts)


def _ties_text(ties: int) -> str:
    return f" ({ties} near tie{'s' * (ties > 1)})" if ties else ""


def _logits_text(logits: LogitsTest) -> str:
    missing = sum(one.outcome is Outcome.not_tested for one in logits.comparisons)
    if missing == len(logits.comparisons):
        return "logits not tested: too few different prompts"
    note = f", {missing} not tested" if missing else ""
    return f"logits {_word(logits.passed)} ({len(logits.comparisons)} comparisons{note})"


def _not_tested(controls: Controls) -> str:
    is_missing = any(one.outcome is Outcome.not_tested for one in controls.shifted_target.values())
    return " (shifted target not tested: the texts are too few or too much alike)" if is_missing else ""


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def certificate_details(certificate: Certificate) -> list[str]:
    """Return a line for each difference and failed test, then for each near tie."""
    greedy, replay = certificate.greedy_identity, certificate.replay_equals_loop
    return [
        *(f"{_run(one)}: other token than plain greedy {_gap(one)}" for one in greedy.differences),
        *(f"{_run(one)}: {_passes(one)}" for one in replay.differences),
        *_too_many_ties(len({(one.prompt, one.position) for one in greedy.near_ties}), greedy.tie_budget),
        *_too_many_ties(replay.ties, replay.tie_budget, " of drafts"),
        *_failed_logits(certificate.logits),
        *_failed_pass_counts(certificate),
        *_failed_sampler(certificate),
        *_failed_controls(certificate),
        *(f"{_run(one)}: near tie {_gap(one)}" for one in greedy.near_ties),
        *(
            f"{_run(one)}: near tie of a draft, margin {one.margin or 0:.1e}; {_passes(one)}"
            for one in replay.near_ties
        ),
    ]


def _passes(difference: PassDifference) -> str:
    return f"{difference.loop_passes} passes in the loop, {difference.replay_passes} in the replay"


def _too_many_ties(ties: int, budget: int, of: str = "") -> list[str]:
    return [] if ties <= budget else [f"{ties} near ties{of}, and the rounding noise explains at most {budget}"]


def _failed_logits(logits: LogitsTest) -> list[str]:
    return [
        f"{one.of} against {one.against}: the {measure} difference of the {one.quantity.value} along a text is "
        f"{size.median:.1e}, bound {size.bound:.1e}; {size.beyond} of {one.texts} texts beyond it "
        f"and {size.budget} by chance"
        for one in logits.comparisons
        for measure, size in (("typical", one.typical), ("largest", one.largest))
        if size.outcome is Outcome.failed
    ]


def _failed_pass_counts(certificate: Certificate) -> list[str]:
    counts = certificate.pass_count_test
    if counts is None or counts.passed:
        return []
    return [
        f"{test.head} head, K={test.draft_length}: {test.passes} passes in the loop, {test.expected:.1f} expected, "
        f"p={test.p_value:.1e}"
        for test in counts.tests
    ]


def _failed_sampler(certificate: Certificate) -> list[str]:
    sampler = certificate.sampler
    return [
        f"sampler, {name} verification: chi-square {test.statistic:.1f} at {test.dof} degrees of freedom, "
        f"p={test.p_value:.1e}"
        for name, test in (("token", sampler.token), ("block", sampler.block))
        if not test.passed
    ]


def _failed_controls(certificate: Certificate) -> list[str]:
    controls = certificate.controls
    failed = [] if controls.all_accept.passed else ["control failed: all accept"]
    return failed + [
        f"control failed: shifted target of the {head} head: drafts agree {one.shifted:.3f} with tokens that they "
        f"cannot know (chance {one.chance:.3f}, p={one.p_value:.1e})"
        for head, one in controls.shifted_target.items()
        if one.outcome is Outcome.failed
    ]


def _run(difference: TextDifference | PassDifference) -> str:
    return f"{difference.head} head, prompt {difference.prompt}, K={difference.draft_length}"


def _gap(difference: TextDifference) -> str:
    if difference.gap is None:
        return f"at position {difference.position}, where one of the two texts ends"
    return f"at position {difference.position}, logit gap {difference.gap:.1e}"
