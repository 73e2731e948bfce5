"""Expected verify passes of speculative sampling on a text that the target sampled, without drawing anything.

Verification is lossless: a pass at anchor n that keeps a drafts and then emits one token has emitted some text x with
the probability p(x) of the target, however it is split into passes. So, given the text, passes form a Markov chain over
anchors, and the chance of going from n to n + a + 1 is

    c_a(n) = P(a drafts kept, and x_1..x_{a+1} emitted) / (p(x_1) ... p(x_{a+1})) = r_a(n) - r_{a+1}(n)

where x_1, x_2, ... is the text after anchor n, q_k and p_k are the probabilities of x_k in the draft's step k and in
the target, and r_a(n) is the chance that at least a drafts were kept, given the text:

    token-wise   r_a = prod_{k<=a} min(1, q_k / p_k)      a token is drafted and kept with probability min(q_k, p_k)
    block        r_a = min_{j<=a} prod_{k<=j} q_k / p_k   q_1 ... q_a w_a / (p_1 ... p_a), with the weight
                                                          w_a = min(1, w_{a-1} p_a / q_a) that is kept of a prefix

and r_{K+1} = 0. Expected counts from anchor n on obey V(n) = g(n) + sum_a c_a(n) V(n + a + 1), g being the count of the
pass at n itself: 1 for passes, r_k(n) for drafts kept at position k. One sweep from the end of the text gives them all.
Where the text ends after m tokens nothing further can be told from it, and nothing is counted: r_{m+1} = 0.

K draft steps, L draft lengths 1..K, N tokens that passes emit: all of a text but the first, which the prefill emits.
"""

from typing import NamedTuple

import numpy as np

from mtptrain.kernels.acceptance import Verification


class ExpectedPasses(NamedTuple):
    """Expected counts over one text; row l - 1 is of draft length l, column k - 1 of position k.

    Divided as `metrics.by_position` divides its integers they give the same rates; N / passes is the acceptance length.
    """

    passes_L: np.ndarray
    drafted_LK: np.ndarray  # drafts that have a position k before the text ends
    reached_LK: np.ndarray  # of these, drafts whose first k - 1 tokens were kept
    accepted_LK: np.ndarray  # and whose token k was kept, too


def inside_text(steps: int, num_tokens: int) -> np.ndarray:
    """Whether step k of a draft at anchor n still lies in the text: bool [K, N]."""
    return np.arange(1, steps + 1)[:, None] + np.arange(num_tokens) <= num_tokens


def acceptance_probability(
    p_N: np.ndarray, q_KN: np.ndarray, verification: Verification = Verification.token
) -> np.ndarray:
    """The chance that step k of a draft was kept, given the text and that all earlier steps were.

    Args:
        p_N: probability, above 0, that the target's policy gave each token of the text that passes emit.
        q_KN: entry (k - 1, n): probability that step k of the draft at anchor n gave token n + k - 1 of these; where
            drafts are greedy, whether it is the draft's token. Entries past the end of the text may hold anything.
        verification: which of the two ways; with greedy drafts both are the same.

    Returns:
        float64 [K, N] in [0, 1], 0 past the end of the text.

    Raises:
        ValueError: the arrays do not fit, or the target could not have sampled the text.
    """
    steps, num_tokens = q_KN.shape
    if p_N.shape != (num_tokens,):
        raise ValueError(f"p_N is {p_N.shape} but must be ({num_tokens},): one probability a token of the text")
    if not (p_N > 0).all():
        raise ValueError("p_N must be above 0: pass the probabilities with which the text was sampled, same policy")
    inside_KN = inside_text(steps, num_tokens)
    token_KN = np.minimum(np.arange(steps)[:, None] + np.arange(num_tokens), num_tokens - 1)
    ratio_KN = np.where(inside_KN, q_KN, 0).astype(np.float64) / p_N.astype(np.float64)[token_KN]
    if verification is Verification.token:
        return np.minimum(ratio_KN, 1)
    with np.errstate(divide="ignore"):
        log_product_KN = np.log(ratio_KN).cumsum(axis=0)  # products of ratios may overflow
    reach_KN = np.exp(np.minimum(np.minimum.accumulate(log_product_KN, axis=0), 0))
    before_KN = np.concatenate([np.ones((1, num_tokens)), reach_KN[:-1]])
    return np.divide(reach_KN, before_KN, out=np.zeros_like(reach_KN), where=before_KN > 0)


def expected_passes(accept_KN: np.ndarray) -> ExpectedPasses:
    """Expected passes and their drafted, reached and accepted tokens, for every draft length up to K.

    With zeros and ones, the hits of greedy drafts on a greedy text, they are the counts of `replay_passes`.

    Args:
        accept_KN: entry (k - 1, n) in [0, 1]: the chance that step k of the draft at anchor n is kept, given the text
            and that all earlier steps were, as `acceptance_probability` gives it. Anchor 0 is that of the first pass.
            Entries past the end of the text may hold anything.

    Returns:
        float64 counts; all 0 for N = 0.
    """
    steps, num_tokens = accept_KN.shape
    inside_KN = inside_text(steps, num_tokens)
    reach_KN = np.where(inside_KN, accept_KN, 0).astype(np.float64).cumprod(axis=0)
    short_LK = np.tri(steps, dtype=bool)  # a draft of length l has positions 1..l
    drafted_LKN = short_LK[:, :, None] & inside_KN
    accepted_LKN = drafted_LKN * reach_KN
    before_LKN = drafted_LKN * np.concatenate([np.ones((1, num_tokens)), reach_KN[:-1]])
    ones_L1N, zeros_L1N = np.ones((steps, 1, num_tokens)), np.zeros((steps, 1, num_tokens))
    # A = K + 1 outcomes of a pass, 0 to K drafts kept
    move_LAN = -np.diff(np.concatenate([ones_L1N, accepted_LKN, zeros_L1N], axis=1), axis=1)
    gain_NFL = np.concatenate([ones_L1N, drafted_LKN, before_LKN, accepted_LKN], axis=1).T
    total_NFL = np.zeros((num_tokens + steps + 1, *gain_NFL.shape[1:]))
    for anchor in reversed(range(num_tokens)):
        later_AFL = total_NFL[anchor + 1 : anchor + steps + 2]
        total_NFL[anchor] = gain_NFL[anchor] + np.einsum("la,afl->fl", move_LAN[:, :, anchor], later_AFL)
    passes_1L, *by_position = np.split(total_NFL[0], [1, 1 + steps, 1 + 2 * steps])
    return ExpectedPasses(passes_1L[0], *(counts_KL.T for counts_KL in by_position))
