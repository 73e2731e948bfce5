"""The lines about a text, as the screen shows them."""

from mtptrain.decoding.results import Decoded, NewTokens, Seconds
from mtptrain.generation.figures import Figures, comparison_line, status_line, summary_lines


def figures(draft_length: int, passes: list[NewTokens], seconds: float) -> Figures:
    made = Figures(draft_length)
    for new in [NewTokens([], [7], []), *passes]:
        made.count(new, Seconds(total=seconds + 1, prefill=1))
    return made


PLAIN = figures(0, [NewTokens([], [1], [])] * 10, 1.0)
HEAD = figures(4, [NewTokens([1, 2, 3], [4], [9]), NewTokens([], [5], [8, 8, 8, 8])], 0.25)


def test_the_live_line_holds_tokens_a_pass_and_speed_up() -> None:
    assert status_line(HEAD, PLAIN) == "6 tokens  2.50 tokens a pass  20 tokens/s  2.00x plain decoding"
    assert status_line(HEAD, None) == "6 tokens  2.50 tokens a pass  20 tokens/s"
    assert status_line(PLAIN, None) == "11 tokens  10 tokens/s"
    assert status_line(figures(4, [], 0.0), PLAIN) == ""


def test_the_summary_holds_all_figures() -> None:
    assert summary_lines(HEAD, PLAIN) == [
        "6 tokens in 2 passes after the prompt's: 2.50 tokens a pass at K=4; 3 of 8 drafts accepted",
        "speed-up 2.00x: 20 tokens/s, plain decoding 10 (over 11 tokens), both without the prompt's pass",
    ]


def test_a_text_without_passes_has_no_speed() -> None:
    assert summary_lines(figures(4, [], 0.0), PLAIN) == [
        "the text ended with the prompt's own pass: nothing was drafted"
    ]
    assert summary_lines(HEAD, figures(0, [], 0.0))[1] == "20 tokens/s; plain decoding was not timed"


def test_equal_texts_are_called_identical() -> None:
    text = Decoded(tokens=[4, 5, 6], gaps=[1.0, 1.0, 1.0])
    assert comparison_line(text, text, is_greedy=True) == "both texts are identical: 3 tokens"


def test_different_texts_are_told_with_their_reason() -> None:
    text, plain = Decoded(tokens=[4, 5, 6]), Decoded(tokens=[4, 7, 6], gaps=[1.0, 2e-5, 1.0])
    line = comparison_line(text, plain, is_greedy=True)
    assert line.startswith("THE TEXTS PART at token 2, where the backbone's two likeliest tokens differ by 2e-05 in")
    assert comparison_line(text, plain, is_greedy=False).startswith("the texts part at token 2: sampling uses its")
