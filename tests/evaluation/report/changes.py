"""Recorded evaluations with one thing changed, for the cases that no recorded run has."""

from dataclasses import replace

from mtptrain.evaluation.certificate_result import PassDifference, TextDifference
from mtptrain.evaluation.head_result import Acceptance, BucketKind, Gain, HeadResult, SeenPrompts
from mtptrain.evaluation.result import Doubt, Evaluation, Spread

DIFFERENCE = TextDifference("trained", prompt=3, draft_length=2, position=17, gap=0.12)
PASS_DIFFERENCE = PassDifference("stock", prompt=5, draft_length=1, loop_passes=21, replay_passes=22)


def with_gain(evaluation: Evaluation, gain: float, interval: tuple[float, float], length: int = 3) -> Evaluation:
    gains = {**(evaluation.gain or {}), length: Gain(gain, interval, detectable=0.05)}
    return replace(evaluation, gain=gains)


def with_head(evaluation: Evaluation, head: HeadResult) -> Evaluation:
    return replace(evaluation, heads=[head if one.name == head.name else one for one in evaluation.heads])


def with_seen_prompts(evaluation: Evaluation, seen: SeenPrompts) -> Evaluation:
    """The last head with prompts that it saw in training."""
    return with_head(evaluation, replace(evaluation.last_head, seen_prompts=seen))


def with_acceptance(evaluation: Evaluation, acceptance: Acceptance) -> Evaluation:
    """The last head with other figures at the longest K."""
    head = evaluation.last_head
    return with_head(evaluation, replace(head, replay={**head.replay, evaluation.draft_length: acceptance}))


def with_buckets(evaluation: Evaluation, kind: BucketKind, names: list[str]) -> Evaluation:
    """Every head with the first buckets of a kind renamed, and no others."""
    for head in evaluation.heads:
        buckets = [replace(one, bucket=name) for one, name in zip(head.breakdown.by[kind], names, strict=False)]
        breakdown = replace(head.breakdown, by={**head.breakdown.by, kind: buckets})
        evaluation = with_head(evaluation, replace(head, breakdown=breakdown))
    return evaluation


def with_speedup(evaluation: Evaluation, length: int, speedup: Spread) -> Evaluation:
    """The last head with another speed-up at the smallest batch."""
    batch, name = evaluation.first_batch, evaluation.last_head.name
    of_batch = evaluation.speedup[batch]
    measured = replace(
        of_batch[name][length], median=speedup.median, quartiles=speedup.quartiles, interval=speedup.quartiles
    )
    heads = {**of_batch, name: {**of_batch[name], length: measured}}
    return replace(evaluation, speedup={**evaluation.speedup, batch: heads})


def quiet(evaluation: Evaluation) -> Evaluation:
    """Every speed-up on the clock alone and without doubts, as on an idle GPU: the recorded machine may be busy."""
    measured = {
        size: {
            name: {k: replace(one, doubts=[], processor=None) for k, one in lengths.items()}
            for name, lengths in heads.items()
        }
        for size, heads in evaluation.speedup.items()
    }
    return replace(evaluation, speedup=measured)


def with_doubts(evaluation: Evaluation, length: int, doubts: list[Doubt], batch: int | None = None) -> Evaluation:
    """The last head's speed-up with doubts, by default at the smallest batch."""
    batch, name = batch or evaluation.first_batch, evaluation.last_head.name
    of_batch = evaluation.speedup[batch]
    heads = {**of_batch, name: {**of_batch[name], length: replace(of_batch[name][length], doubts=doubts)}}
    return replace(evaluation, speedup={**evaluation.speedup, batch: heads})


def only(evaluation: Evaluation, name: str) -> Evaluation:
    """The evaluation of one of its heads."""
    return replace(
        evaluation,
        heads=[head for head in evaluation.heads if head.name == name],
        gain=None,
        gain_by_domain=None,
        speedup={size: {name: heads[name]} for size, heads in evaluation.speedup.items()},
        steps={size: {name: heads[name]} for size, heads in evaluation.steps.items()},
    )


def with_failed_certificate(evaluation: Evaluation) -> Evaluation:
    """A text and a number of passes differ."""
    certificate = evaluation.certificate
    greedy, passes = certificate.greedy_identity, certificate.replay_equals_loop
    return replace(
        evaluation,
        certificate=replace(
            certificate,
            passed=False,
            greedy_identity=replace(greedy, passed=False, identical=greedy.compared - 1, differences=[DIFFERENCE]),
            replay_equals_loop=replace(passes, passed=False, equal=passes.equal - 1, differences=[PASS_DIFFERENCE]),
        ),
    )
