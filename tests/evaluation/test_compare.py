"""Comparisons of heads on the same traces."""

import io

import numpy as np
import pytest
from rich.console import Console

from mtptrain.decoding.results import VerifyPass
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.compare import compare_heads as compare
from mtptrain.evaluation.comparison_result import HeadComparison
from mtptrain.evaluation.report.comparison_page import print_comparison
from mtptrain.replay.replay import count_passes
from mtptrain.traces.prompts import Prompt


def replayed(rates: list[float], seed: int, num_prompts: int = 60) -> CountsByLength:
    """Return passes whose drafts are accepted position by position at the given rates, K = 1 and 2."""
    rng = np.random.default_rng(seed)
    counts: CountsByLength = {}
    for length in (1, 2):
        prompts = []
        for _ in range(num_prompts):
            kept = (rng.random((20, length)) < rates[:length]).cumprod(1).sum(1)
            passes = [VerifyPass(length, int(count), int(count) + 1) for count in kept]
            prompts.append(count_passes(passes, length))
        counts[length] = prompts
    return counts


def compare_heads(
    names: tuple[str, str], base: CountsByLength, other: CountsByLength, domain: str = "text"
) -> HeadComparison:
    prompts = [Prompt([0], domain, number) for number in range(len(next(iter(base.values()))))]
    return compare(names, [base], [other], prompts)


def test_the_verdict_on_a_clear_gain_has_its_interval() -> None:
    result = compare_heads(("A", "B"), replayed([0.4, 0.4], 0), replayed([0.7, 0.6], 1))
    assert result.verdict.startswith("B accepts 0.")
    assert "more tokens a pass than A at K=2 (" in result.verdict
    low, high = result.gain[2].interval
    assert low < result.gain[2].gain < high


def test_the_verdict_on_a_loss_names_the_loss() -> None:
    result = compare_heads(("A", "B"), replayed([0.7, 0.6], 1), replayed([0.4, 0.4], 0))
    assert "fewer tokens a pass than A at K=2 (" in result.verdict


def test_equal_heads_give_no_evidence_and_the_detectable_gain() -> None:
    result = compare_heads(("A", "B"), replayed([0.5, 0.5], 2), replayed([0.5, 0.5], 3))
    assert result.verdict.startswith("no evidence that B and A differ")
    assert f"{result.gain[2].detectable:.2f}" in result.verdict


def test_the_detectable_gain_shrinks_with_the_root_of_the_prompts() -> None:
    base, other = replayed([0.5, 0.5], 4, 25), replayed([0.5, 0.5], 5, 25)
    few = compare_heads(("A", "B"), base, other)
    many = compare_heads(("A", "B"), *({k: head[k] * 16 for k in head} for head in (base, other)))
    ratio = few.gain[1].detectable / many.gain[1].detectable
    assert ratio == pytest.approx(4.0, rel=0.1)  # 2000 resamples know a spread to 2 %


def test_gains_by_position_are_differences_of_conditional_acceptance() -> None:
    base, other = replayed([0.4, 0.3], 6, 400), replayed([0.6, 0.5], 7, 400)
    gains = [gain.gain for gain in compare_heads(("A", "B"), base, other).gain_by_position]
    assert gains == pytest.approx([0.2, 0.2], abs=0.05)


def test_a_position_that_some_resample_never_reached_has_no_gain() -> None:
    never = {2: [count_passes([VerifyPass(2, 0, 1)], 2)] * 5}
    result = compare_heads(("A", "B"), never, never)
    assert result.gain_by_position[1] is None


def test_a_domain_that_gets_worse_is_flagged_though_the_pool_gains() -> None:
    base = {k: replayed([0.3, 0.3], 8)[k] + replayed([0.7, 0.7], 9, 12)[k] for k in (1, 2)}
    other = {k: replayed([0.8, 0.8], 10)[k] + replayed([0.3, 0.3], 11, 12)[k] for k in (1, 2)}
    prompts = [Prompt([0], "chat" if number < 60 else "code", number) for number in range(72)]
    result = compare(("A", "B"), [base], [other], prompts)
    assert result.worse_on == ["code"]
    assert result.verdict.startswith("B accepts 0.")
    assert "more tokens" in result.verdict
    assert result.verdict.endswith("WORSE on code")
    assert "fewer tokens" in result.domains["code"].verdict
    assert result.domains["chat"].prompts == 60


def test_a_domain_without_passes_is_compared_to_nothing() -> None:
    base, other = ({k: [*replayed([rate, rate], 8)[k], count_passes([], k)] for k in (1, 2)} for rate in (0.3, 0.8))
    prompts = [Prompt([0], "chat" if number < 60 else "silent", number) for number in range(61)]
    result = compare(("A", "B"), [base], [other], prompts)
    assert result.domains["silent"] is None
    assert result.worse_on == []
    stream = io.StringIO()
    print_comparison(result, Console(file=stream, width=120))
    assert "silent (no verify pass: every text ends at its first token)" in stream.getvalue()


def test_one_domain_is_not_flagged_beside_the_whole() -> None:
    result = compare_heads(("A", "B"), replayed([0.7, 0.6], 1), replayed([0.4, 0.4], 0))
    assert result.domains["text"].gain == result.gain
    assert "WORSE" not in result.verdict


def seeds(rates: list[list[float]], seed: int) -> list[CountsByLength]:
    return [replayed(one, seed + number) for number, one in enumerate(rates)]


def test_runs_that_differ_more_than_the_settings_give_no_evidence() -> None:
    """Each pair of single runs would be a clear gain; between the settings lies less than between their seeds."""
    prompts = [Prompt([0], "text", number) for number in range(60)]
    base, other = seeds([[0.3, 0.4], [0.5, 0.4], [0.7, 0.4]], 0), seeds([[0.4, 0.4], [0.6, 0.4], [0.8, 0.4]], 9)
    assert compare(("A", "B"), base[:1], other[:1], prompts).gain[2].is_clear
    result = compare(("A", "B"), base, other, prompts)
    assert result.verdict.startswith("no evidence that B and A differ")
    wide, narrow = result.gain[2].interval, compare(("A", "B"), base[:1], other[:1], prompts).gain[2].interval
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_runs_that_agree_show_a_gain_with_its_domains_and_positions() -> None:
    prompts = [Prompt([0], "code" if number % 2 else "prose", number) for number in range(60)]
    result = compare(("A", "B"), seeds([[0.4, 0.4]] * 3, 0), seeds([[0.7, 0.6]] * 3, 9), prompts)
    assert result.verdict.startswith("B accepts 0.")
    assert all(gains is not None and gains.gain[2].is_clear for gains in result.domains.values())
    assert [gain.gain > 0 for gain in result.gain_by_position] == [True, True]
    single = compare(("A", "B"), seeds([[0.4, 0.4]], 0), seeds([[0.7, 0.6]] * 3, 9), prompts)
    assert single.gain[2].is_clear
