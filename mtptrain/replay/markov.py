"""Expected verify passes of speculative sampling on a text that the target sampled, without drawing anything.

Verification is lossless: passes emit a text x with the target's probability p(x), however the text is split into
passes. So, given the text, passes form a Markov chain over anchors. A pass at anchor n that keeps a drafts, then emits
one token, goes on to n + a + 1, with the chance

    c_a(n) = P(a drafts kept, and x_1..x_{a+1} emitted) / (p(x_1) ... p(x_{a+1})) = r_a(n) - r_{a+1}(n)

where x_1, x_2, ... is the text after anchor n, q_k and p_k are the probabilities of x_k under the draft's step k and
under the target, and r_a(n) is the chance that at least a drafts were kept, given the text:

    token-wise   r_a = prod_{k<=a} min(1, q_k / p_k)      a token is drafted and kept with probability min(q_k, p_k)
    block        r_a = min_{j<=a} prod_{k<=j} q_k / p_k   q_1 ... q_a w_a / (p_1 ... p_a), where a prefix is kept
                                                          with the weight w_a = min(1, w_{a-1} p_a / q_a)

and r_{K+1} = 0. So the chance that a pass begins at anchor n sums over the anchors of the pass before it,

    visit(0) = 1,  visit(n) = sum_a c_a(n - a - 1) visit(n - a - 1)

and any expected count is sum_n visit(n) g(n), g being the count of a pass at n: 1 for passes, r_k(n) for drafts kept at
position k. One sweep over the text gives all of them. A sweep from its end gives mean and variance of the number of
passes, V(n) = 1 + sum_a c_a(n) V(n + a + 1). If the text ends m tokens after the anchor, nothing past the end is
counted: r_{m+1} = 0.

A draft that a confidence threshold stops before step s has r_a = 0 from a = s on, in either verification: the decision
depends only on the drafted tokens before s, which are tokens of the text if they were kept.

K draft steps, L draft lengths 1..K, N tokens that passes emit: all of a text but the first, which the prefill emits.
"""

from typing import NamedTuple

import numpy as np

from mtptrain.kernels.acceptance import Verification


class ExpectedPasses(NamedTuple):
    """Chances along one text, float64; every expected count is a sum of them. Row l - 1 belongs to draft length l.

    Attributes:
        visit_LN: chance that a pass of draft length l begins at anchor n.
        begun_KN: chance that step k of a draft at anchor n is verified: its first k - 1 tokens were kept, the head did
            not stop before it, and the text had not ended.
        reach_KN: chance that at least k drafted tokens are kept at anchor n, r_k(n).
    """

    visit_LN: np.ndarray
    begun_KN: np.ndarray
    reach_KN: np.ndarray

    @property
    def passes_L(self) -> np.ndarray:
        """Expected number of passes; N / passes is the acceptance length."""
        return self.visit_LN.sum(-1)

    def at_positions(self, weight_KN: np.ndarray) -> np.ndarray:
        """Return the expected sum over passes of a count at each position, [L, K]; 0 past the draft length."""
        return np.tril(self.visit_LN @ weight_KN.T)

    @property
    def drafted_LK(self) -> np.ndarray:
        """Expected number of drafts that have a position k before the text ends, if no threshold stops them."""
        return self.at_positions(inside_text(*self.reach_KN.shape).astype(np.float64))

    @property
    def reached_LK(self) -> np.ndarray:
        """Expected number of drafts whose first k - 1 tokens were kept and whose step k was drafted."""
        return self.at_positions(self.begun_KN)

    @property
    def accepted_LK(self) -> np.ndarray:
        """Expected number of drafts whose first k tokens were kept."""
        return self.at_positions(self.reach_KN)


def inside_text(steps: int, num_tokens: int) -> np.ndarray:
    """Return whether step k of a draft at anchor n still lies in the text: bool [K, N]."""
    return np.arange(1, steps + 1)[:, None] + np.arange(num_tokens) <= num_tokens


def acceptance_probability(
    p_N: np.ndarray, q_KN: np.ndarray, verification: Verification = Verification.token
) -> np.ndarray:
    """Return the chance that step k of a draft was kept, given the text and that all earlier steps were kept.

    Args:
        p_N: probability, above 0, of each token that passes emit under the target's policy.
        q_KN: entry (k - 1, n): probability of token n + k - 1 of these under step k of the draft at anchor n; for
            greedy drafts, 1 if it is the drafted token, else 0. Entries past the end of the text may hold anything.
        verification: token-wise or block; equal for greedy drafts.

    Returns:
        float64 [K, N] in [0, 1], 0 past the end of the text.

    Raises:
        ValueError: the shapes do not fit, or the target could not have sampled the text.
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


def expected_passes(accept_KN: np.ndarray, drafted_KN: np.ndarray | None = None) -> ExpectedPasses:
    """Return the chances that passes begin at each anchor and that their drafts are kept, for draft lengths up to K.

    With zeros and ones, the top-1 matches of greedy drafts on a greedy text, the sums are the counts of
    `replay_passes`.

    Args:
        accept_KN: entry (k - 1, n) in [0, 1]: the chance that step k of the draft at anchor n is kept, given the text
            and that all earlier steps were kept (`acceptance_probability`). Anchor 0 belongs to the first pass.
            Entries past the end of the text may hold anything.
        drafted_KN: bool, whether the head drafts step k after the text's tokens were drafted before it; None if no
            threshold stops drafts.

    Returns:
        float64 chances; sums over them are 0 for N = 0.
    """
    steps, num_tokens = accept_KN.shape
    allowed_KN = inside_text(steps, num_tokens)
    if drafted_KN is not None:
        allowed_KN = allowed_KN & np.logical_and.accumulate(drafted_KN, axis=0)
    reach_KN = np.where(allowed_KN, accept_KN, 0).astype(np.float64).cumprod(axis=0)
    begun_KN = allowed_KN * np.concatenate([np.ones((1, num_tokens)), reach_KN[:-1]])
    move_NLA = pass_moves(reach_KN)
    visit_NL = np.zeros((num_tokens + steps + 1, steps))
    visit_NL[0] = 1
    for anchor in range(num_tokens):
        visit_NL[anchor + 1 : anchor + steps + 2] += (visit_NL[anchor, :, None] * move_NLA[anchor]).T
    return ExpectedPasses(visit_NL[:num_tokens].T.copy(), begun_KN, reach_KN)


def pass_moves(reach_KN: np.ndarray) -> np.ndarray:
    """Return the chance c_a(n) that a pass of draft length l at anchor n keeps a drafts, float64 [N, L, A = K + 1]."""
    steps, num_tokens = reach_KN.shape
    kept_NLK = reach_KN.T[:, None] * np.tri(steps)
    ones_NL1, zeros_NL1 = np.ones((num_tokens, steps, 1)), np.zeros((num_tokens, steps, 1))
    return -np.diff(np.concatenate([ones_NL1, kept_NLK, zeros_NL1], axis=2), axis=2)


def pass_moments(reach_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the number of passes over a text, given the text, for every draft length.

    V(n) = sum_a c_a (1 + V(n + a + 1)), and by the decomposition of the total variance
    Var(n) = sum_a c_a (Var(n + a + 1) + (1 + V(n + a + 1) - V(n))^2).

    Args:
        reach_KN: of `expected_passes`.

    Returns:
        float64 [L] each.
    """
    steps, num_tokens = reach_KN.shape
    move_NLA = pass_moves(reach_KN)
    mean_NL, variance_NL = np.zeros((2, num_tokens + steps + 1, steps))
    for anchor in reversed(range(num_tokens)):
        after = slice(anchor + 1, anchor + steps + 2)
        count_LA = 1 + mean_NL[after].T
        mean_NL[anchor] = (move_NLA[anchor] * count_LA).sum(1)
        spread_LA = variance_NL[after].T + (count_LA - mean_NL[anchor, :, None]) ** 2
        variance_NL[anchor] = (move_NLA[anchor] * spread_LA).sum(1)
    return mean_NL[0], variance_NL[0]
