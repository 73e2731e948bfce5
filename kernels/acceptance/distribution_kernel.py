"""Triton functions for a row distribution: eight numbers that turn any logit of a row into its probability.

No tensor of the size of the vocabulary is written for a softmax: a reader of probabilities computes them from the
logits.

    p = exp((z - peak) / temperature) / total
    top-k   p / (sum of the kept p) if p is above the smallest kept one, or equals it at an id up to the last kept one
    top-p   the same again, on the result of top-k

Top-k and top-p need no sort. A lower bound on the kept probabilities leaves a few candidates, which are copied. For
top-k the bound is the k-th largest of the maxima of groups of neighbours; for top-p it is so low that a whole
vocabulary of probabilities below it would weigh less than 1 - top_p. The bits of a non-negative fp32 number are an
integer that grows with it, so the smallest kept probability is searched bit by bit among the candidates: it is the
largest t such that k tokens have p >= t (top-k), or that the tokens with p >= t weigh top_p (top-p). If the bound
proves too high, every token is a candidate. Masses are summed in whole units of 2^-52, as in the definition.

V vocabulary.
"""

import triton
import triton.language as tl

from .reference import GRID

GROUP = 64  # neighbours that share a maximum; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused, w p - q would be rounded once instead of twice
UNIT, UNITS_OF_ONE = tl.constexpr(GRID), tl.constexpr(1 / GRID)
NUMBERS = tl.constexpr(8)  # int32 numbers of a row distribution; the first four are the bits of fp32
PEAK, TOTAL, K_TOTAL, P_TOTAL, K_SMALLEST, P_SMALLEST, K_LAST, P_LAST = map(tl.constexpr, range(8))


@triton.jit
def whole_units(x):
    """Return the whole units of 2^-52 in probabilities, int64."""
    return (x.to(tl.float64) * UNITS_OF_ONE).to(tl.int64)


@triton.jit
def _store_float(ptr, x):
    tl.store(ptr, x.to(tl.int32, bitcast=True))


@triton.jit
def _load_float(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def _softmax(z, peak, total, temperature):
    # Shifted before the division, which would overflow at a low temperature.
    p = tl.exp(tl.div_rn(z - peak, tl.zeros_like(z) + temperature))
    return tl.div_rn(p, tl.zeros_like(z) + total)


@triton.jit
def _lifted(z, high, inverse_temperature):
    """Return exp((z - high) / temperature), 0 where z is -inf; for sums only, which ignore the quotient's last bits."""
    x = tl.where(z > float("-inf"), z - high, float("-inf"))
    return tl.exp(tl.where(x == 0, 0.0, x * inverse_temperature))  # the inverse may be infinite


@triton.jit
def _keep(p, ids, smallest, last, kept_total):
    bits = p.to(tl.int32, bitcast=True)
    kept = (bits > smallest) | ((bits == smallest) & (ids <= last))
    return tl.where(kept, tl.div_rn(p, tl.zeros_like(p) + kept_total), 0.0)


@triton.jit
def probability(logits_ptr, distribution_ptr, ids, vocabulary, temperature, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """Return the probabilities of some tokens of one row, fp32; 0 past the vocabulary."""
    z = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    p = _softmax(z, _load_float(distribution_ptr + PEAK), _load_float(distribution_ptr + TOTAL), temperature)
    if TOP_K:
        smallest, last = tl.load(distribution_ptr + K_SMALLEST), tl.load(distribution_ptr + K_LAST)
        p = _keep(p, ids, smallest, last, _load_float(distribution_ptr + K_TOTAL))
    if TOP_P:
        smallest, last = tl.load(distribution_ptr + P_SMALLEST), tl.load(distribution_ptr + P_LAST)
        p = _keep(p, ids, smallest, last, _load_float(distribution_ptr + P_TOTAL))
    return p


@triton.jit
def _size(p, MASS: tl.constexpr):
    """Return how much a token counts towards the limit: 1 for top-k, its units for top-p."""
    return whole_units(p) if MASS else tl.where(p >= 0, 1, 0).to(tl.int64)


@triton.jit
def _smallest_kept(p_ptr, count, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the bits of the largest t for which the probabilities p >= t reach the limit; 0 if even all do not."""
    smallest = 0
    for step in range(31):
        candidate = smallest | (1 << (30 - step))
        reached = tl.zeros([], tl.int64)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + index, mask=index < count, other=-1.0)
            is_above = p.to(tl.int32, bitcast=True) >= candidate
            if MASS:
                reached += tl.sum(tl.where(is_above, (p.to(tl.float64) * UNITS_OF_ONE).to(tl.int64), 0))
            else:
                reached += tl.sum(is_above.to(tl.int64))
        smallest = tl.where(reached >= limit, candidate, smallest)
    return smallest


@triton.jit
def _group_bound(maxima_ptr, vocabulary, peak, total, temperature, top_k, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return a probability that top_k tokens reach, from the groups' largest logits; turns these into probabilities."""
    groups = tl.cdiv(vocabulary, GROUP)
    tl.debug_barrier()  # they were written by other threads
    for start in range(0, groups, BLOCK):
        index = start + tl.arange(0, BLOCK)
        z = tl.load(maxima_ptr + index, mask=index < groups, other=float("-inf"))
        tl.store(maxima_ptr + index, _softmax(z, peak, total, temperature), mask=index < groups)
    tl.debug_barrier()
    bound = _smallest_kept(maxima_ptr, groups, top_k, False, BLOCK).to(tl.float32, bitcast=True)
    tl.debug_barrier()  # candidates replace them
    return bound


@triton.jit
def _collect(
    logits_ptr, candidates_ptr, vocabulary, peak, total, temperature, bound, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy the probabilities that reach the bound, in the order of ids; return their number and their total count."""
    count, reached = 0, tl.zeros([], tl.int64)
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < vocabulary
        z = tl.load(logits_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
        p = _softmax(z, peak, total, temperature)
        is_candidate = inside & (p >= bound)
        one = tl.where(is_candidate, 1, 0)
        num_candidates = tl.sum(one)
        if num_candidates > 0:  # most blocks hold no candidate
            tl.store(candidates_ptr + count + tl.cumsum(one, 0) - 1, p, mask=is_candidate)
            reached += tl.sum(tl.where(is_candidate, _size(p, MASS), 0))
        count += num_candidates
    return count, reached


@triton.jit
def _cut(p_ptr, count, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut candidates, in place, to the fewest likeliest that reach the limit, earlier ones first, and scale them to 1.

    Return the smallest kept probability as bits, the number of kept candidates that equal it, the number of all
    candidates that equal it, and the kept sum before scaling.
    """
    tl.debug_barrier()  # the candidates were written by other threads
    smallest = _smallest_kept(p_ptr, count, limit, MASS, BLOCK)
    before = tl.zeros([], tl.int64)  # total count of the candidates above the smallest kept one
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + index, mask=index < count, other=-1.0)
        before += tl.sum(tl.where(p.to(tl.int32, bitcast=True) > smallest, _size(p, MASS), 0))
    total, kept_ties, ties = 0.0, 0, 0
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        p = tl.load(p_ptr + index, mask=inside, other=-1.0)
        bits = p.to(tl.int32, bitcast=True)
        is_tie = bits == smallest
        counted = tl.where(is_tie, _size(p, MASS), 0)
        kept = is_tie & (before + tl.cumsum(counted, 0) - counted < limit)
        before += tl.sum(counted)
        ties += tl.sum(tl.where(is_tie, 1, 0))
        kept_ties += tl.sum(tl.where(kept, 1, 0))
        p = tl.where(kept | (bits > smallest), p, 0.0)
        total += tl.sum(p)
        tl.store(p_ptr + index, p, mask=inside)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + index, mask=index < count, other=0.0)
        tl.store(p_ptr + index, tl.div_rn(p, tl.zeros_like(p) + total), mask=index < count)
    return smallest, kept_ties, ties, total


@triton.jit
def _last_id(
    logits_ptr,
    distribution_ptr,
    vocabulary,
    temperature,
    smallest,
    kept_ties,
    ties,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the last kept id among the tokens with the smallest kept probability, of which the first few are kept."""
    last, seen = vocabulary, 0
    if kept_ties < ties:
        last = 0
        for start in range(0, vocabulary, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            p = probability(logits_ptr, distribution_ptr, ids, vocabulary, temperature, TOP_K, False)
            is_tie = (p.to(tl.int32, bitcast=True) == smallest) & (ids < vocabulary)
            one = tl.where(is_tie, 1, 0)
            is_kept = is_tie & (seen + tl.cumsum(one, 0) <= kept_ties)
            last = tl.maximum(last, tl.max(tl.where(is_kept, ids, 0), 0))
            seen += tl.sum(one)
    return last


@triton.jit
def _write_cut(
    logits_ptr,
    distribution_ptr,
    candidates_ptr,
    count,
    limit,
    vocabulary,
    temperature,
    MASS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut the candidates, and write the numbers of top-k or, after it, of top-p."""
    smallest, kept_ties, ties, kept = _cut(candidates_ptr, count, limit, MASS, BLOCK)
    last = _last_id(logits_ptr, distribution_ptr, vocabulary, temperature, smallest, kept_ties, ties, TOP_K, BLOCK)
    _store_float(distribution_ptr + (P_TOTAL if MASS else K_TOTAL), kept)
    tl.store(distribution_ptr + (P_SMALLEST if MASS else K_SMALLEST), smallest)
    tl.store(distribution_ptr + (P_LAST if MASS else K_LAST), last)


@triton.jit
def write_distribution(
    logits_ptr,
    distribution_ptr,
    scratch_ptr,
    vocabulary,
    temperature,
    top_k,
    top_p_units,
    floor,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the distribution of one row; with top-k or top-p the scratch holds V numbers.

    Return the id of the largest logit, the lowest of equals, and its distance to the next one.
    """
    # Each column of a block keeps a separate maximum and sum, so that no thread waits for others before the end.
    inverse = tl.full([], 1.0, tl.float32) / temperature
    column = tl.arange(0, BLOCK)
    high, next_high = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    high_ids, sums = column, tl.zeros([BLOCK], tl.float32)  # of each column so far
    for start in range(0, vocabulary, BLOCK):
        ids = start + column
        z = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
        new_high = tl.maximum(high, z)
        next_high = tl.maximum(next_high, tl.minimum(high, z))
        high_ids = tl.where(z > high, ids, high_ids)
        sums = sums * _lifted(high, new_high, inverse) + _lifted(z, new_high, inverse)
        high = new_high
        if TOP_K:
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            largest = tl.max(tl.reshape(z, [BLOCK // GROUP, GROUP]), 1)
            tl.store(scratch_ptr + group, largest, mask=group < tl.cdiv(vocabulary, GROUP))
    peak = tl.max(high, 0)
    top = tl.min(tl.where(high == peak, high_ids, vocabulary), 0)
    second = tl.max(tl.where(high_ids == top, next_high, high), 0)
    total = tl.sum(sums * _lifted(high, peak, inverse))
    _store_float(distribution_ptr + PEAK, peak)
    _store_float(distribution_ptr + TOTAL, total)

    if TOP_K or TOP_P:
        bound, limit = floor, top_p_units
        if TOP_K:
            bound = _group_bound(scratch_ptr, vocabulary, peak, total, temperature, top_k, GROUP, BLOCK)
            limit = tl.zeros([], tl.int64) + top_k  # a top_k of 1 is a Python number here
        MASS: tl.constexpr = not TOP_K
        count, reached = _collect(logits_ptr, scratch_ptr, vocabulary, peak, total, temperature, bound, MASS, BLOCK)
        if reached < limit:
            tl.debug_barrier()
            count, reached = _collect(logits_ptr, scratch_ptr, vocabulary, peak, total, temperature, 0.0, MASS, BLOCK)
        if TOP_K:
            _write_cut(
                logits_ptr, distribution_ptr, scratch_ptr, count, limit, vocabulary, temperature, False, False, BLOCK
            )
        if TOP_P:
            _write_cut(
                logits_ptr,
                distribution_ptr,
                scratch_ptr,
                count,
                top_p_units,
                vocabulary,
                temperature,
                True,
                TOP_K,
                BLOCK,
            )
    return top, peak - second
