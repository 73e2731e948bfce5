"""The Triton functions of a row's law: few numbers that turn any of its logits into a probability under a policy.

Nothing of the size of the vocabulary is written for a softmax: what needs a probability computes it from the logit.

    p = exp((z - peak) / temperature) / total
    top-k   p / (sum of those kept) where p is above the smallest kept, or equals it at no higher an id than the last
    top-p   the same again, of what top-k left

Top-k and top-p need no sort. A bound below which nothing is kept leaves a few candidates, which are copied: for top-k
the k-th largest of the maxima of groups of neighbours, for top-p what even the whole vocabulary could not weigh. The
bits of an fp32 that is not negative are an integer that grows with it, so among the candidates the smallest kept
probability is found bit by bit: it is the largest t for which the tokens with p >= t are k, or weigh top_p. Where the
bound proves too high everything is a candidate. Masses are summed in whole units of 2^-52, as the definition does.

V vocabulary.
"""

import triton
import triton.language as tl

from .reference import GRID

GROUP = 64  # neighbours that a maximum stands for; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused, w p - q would be rounded once instead of twice
UNIT, UNITS_OF_ONE = tl.constexpr(GRID), tl.constexpr(1 / GRID)
NUMBERS = tl.constexpr(8)  # int32 of a law; the first four are the bits of fp32
PEAK, TOTAL, K_TOTAL, P_TOTAL, K_SMALLEST, P_SMALLEST, K_LAST, P_LAST = map(tl.constexpr, range(8))


@triton.jit
def whole_units(x):
    """Whole units of 2^-52 in probabilities, int64."""
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
    """exp((z - high) / temperature), 0 where z is -inf; for sums, where the last bits of the quotient do not count."""
    x = tl.where(z > float("-inf"), z - high, float("-inf"))
    return tl.exp(tl.where(x == 0, 0.0, x * inverse_temperature))  # the inverse may be infinite


@triton.jit
def _keep(p, place, smallest, last, kept_total):
    bits = p.to(tl.int32, bitcast=True)
    kept = (bits > smallest) | ((bits == smallest) & (place <= last))
    return tl.where(kept, tl.div_rn(p, tl.zeros_like(p) + kept_total), 0.0)


@triton.jit
def probability(logits_ptr, law_ptr, place, vocabulary, temperature, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """Probabilities of some tokens of one row, fp32; 0 past the vocabulary."""
    z = tl.load(logits_ptr + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
    p = _softmax(z, _load_float(law_ptr + PEAK), _load_float(law_ptr + TOTAL), temperature)
    if TOP_K:
        smallest, last = tl.load(law_ptr + K_SMALLEST), tl.load(law_ptr + K_LAST)
        p = _keep(p, place, smallest, last, _load_float(law_ptr + K_TOTAL))
    if TOP_P:
        smallest, last = tl.load(law_ptr + P_SMALLEST), tl.load(law_ptr + P_LAST)
        p = _keep(p, place, smallest, last, _load_float(law_ptr + P_TOTAL))
    return p


@triton.jit
def _size(p, MASS: tl.constexpr):
    """What a token counts towards the limit: 1 for top-k, its units for top-p."""
    return whole_units(p) if MASS else tl.where(p >= 0, 1, 0).to(tl.int64)


@triton.jit
def _smallest_kept(p_ptr, count, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the largest t for which the probabilities p >= t reach the limit; 0 where all together do not."""
    smallest = 0
    for step in range(31):
        candidate = smallest | (1 << (30 - step))
        reached = tl.zeros([], tl.int64)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + place, mask=place < count, other=-1.0)
            is_above = p.to(tl.int32, bitcast=True) >= candidate
            if MASS:
                reached += tl.sum(tl.where(is_above, (p.to(tl.float64) * UNITS_OF_ONE).to(tl.int64), 0))
            else:
                reached += tl.sum(is_above.to(tl.int64))
        smallest = tl.where(reached >= limit, candidate, smallest)
    return smallest


@triton.jit
def _group_bound(maxima_ptr, vocabulary, peak, total, temperature, top_k, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A probability that top_k tokens reach: of the groups' largest logits, made probabilities in place."""
    groups = tl.cdiv(vocabulary, GROUP)
    tl.debug_barrier()  # they were written by other threads
    for start in range(0, groups, BLOCK):
        place = start + tl.arange(0, BLOCK)
        z = tl.load(maxima_ptr + place, mask=place < groups, other=float("-inf"))
        tl.store(maxima_ptr + place, _softmax(z, peak, total, temperature), mask=place < groups)
    tl.debug_barrier()
    bound = _smallest_kept(maxima_ptr, groups, top_k, False, BLOCK).to(tl.float32, bitcast=True)
    tl.debug_barrier()  # candidates take their place
    return bound


@triton.jit
def _collect(
    logits_ptr, found_ptr, vocabulary, peak, total, temperature, bound, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy the probabilities that reach the bound, in the order of ids: how many, and what they count together."""
    count, reached = 0, tl.zeros([], tl.int64)
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocabulary
        z = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        p = _softmax(z, peak, total, temperature)
        is_found = inside & (p >= bound)
        one = tl.where(is_found, 1, 0)
        found = tl.sum(one)
        if found > 0:  # most blocks hold no candidate
            tl.store(found_ptr + count + tl.cumsum(one, 0) - 1, p, mask=is_found)
            reached += tl.sum(tl.where(is_found, _size(p, MASS), 0))
        count += found
    return count, reached


@triton.jit
def _cut(p_ptr, count, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut candidates, in place, to the fewest likeliest that reach the limit, earlier ones first, and scale them to 1.

    Returns the smallest kept, as bits, how many of those that equal it are kept and how many there are, and the sum of
    what is kept before it is scaled.
    """
    tl.debug_barrier()  # the candidates were written by other threads
    smallest = _smallest_kept(p_ptr, count, limit, MASS, BLOCK)
    before = tl.zeros([], tl.int64)  # what those above the smallest count
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + place, mask=place < count, other=-1.0)
        before += tl.sum(tl.where(p.to(tl.int32, bitcast=True) > smallest, _size(p, MASS), 0))
    total, kept_ties, ties = 0.0, 0, 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        p = tl.load(p_ptr + place, mask=inside, other=-1.0)
        bits = p.to(tl.int32, bitcast=True)
        is_tie = bits == smallest
        counted = tl.where(is_tie, _size(p, MASS), 0)
        kept = is_tie & (before + tl.cumsum(counted, 0) - counted < limit)
        before += tl.sum(counted)
        ties += tl.sum(tl.where(is_tie, 1, 0))
        kept_ties += tl.sum(tl.where(kept, 1, 0))
        p = tl.where(kept | (bits > smallest), p, 0.0)
        total += tl.sum(p)
        tl.store(p_ptr + place, p, mask=inside)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + place, mask=place < count, other=0.0)
        tl.store(p_ptr + place, tl.div_rn(p, tl.zeros_like(p) + total), mask=place < count)
    return smallest, kept_ties, ties, total


@triton.jit
def _last_id(
    logits_ptr, law_ptr, vocabulary, temperature, smallest, kept_ties, ties, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Last id that may have the smallest kept probability, when the first few of those that have it are kept."""
    last, seen = vocabulary, 0
    if kept_ties < ties:
        last = 0
        for start in range(0, vocabulary, BLOCK):
            place = start + tl.arange(0, BLOCK)
            p = probability(logits_ptr, law_ptr, place, vocabulary, temperature, TOP_K, False)
            is_tie = (p.to(tl.int32, bitcast=True) == smallest) & (place < vocabulary)
            one = tl.where(is_tie, 1, 0)
            is_kept = is_tie & (seen + tl.cumsum(one, 0) <= kept_ties)
            last = tl.maximum(last, tl.max(tl.where(is_kept, place, 0), 0))
            seen += tl.sum(one)
    return last


@triton.jit
def _write_cut(
    logits_ptr,
    law_ptr,
    found_ptr,
    count,
    limit,
    vocabulary,
    temperature,
    MASS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut the candidates, and write what top-k, or top-p after it, keeps."""
    smallest, kept_ties, ties, kept = _cut(found_ptr, count, limit, MASS, BLOCK)
    last = _last_id(logits_ptr, law_ptr, vocabulary, temperature, smallest, kept_ties, ties, TOP_K, BLOCK)
    _store_float(law_ptr + (P_TOTAL if MASS else K_TOTAL), kept)
    tl.store(law_ptr + (P_SMALLEST if MASS else K_SMALLEST), smallest)
    tl.store(law_ptr + (P_LAST if MASS else K_LAST), last)


@triton.jit
def write_law(
    logits_ptr,
    law_ptr,
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
    """Write the law of one row; where it is cut the scratch holds V numbers.

    Returns the place of the largest logit, the lowest of equals, and how far it is above the next one.
    """
    # A lane keeps its own maximum and sum, so that nothing waits for other lanes before the end.
    inverse = tl.full([], 1.0, tl.float32) / temperature
    lane = tl.arange(0, BLOCK)
    high, next_high = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    high_place, sums = lane, tl.zeros([BLOCK], tl.float32)  # of what a lane has seen
    for start in range(0, vocabulary, BLOCK):
        place = start + lane
        z = tl.load(logits_ptr + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        new_high = tl.maximum(high, z)
        next_high = tl.maximum(next_high, tl.minimum(high, z))
        high_place = tl.where(z > high, place, high_place)
        sums = sums * _lifted(high, new_high, inverse) + _lifted(z, new_high, inverse)
        high = new_high
        if TOP_K:
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            largest = tl.max(tl.reshape(z, [BLOCK // GROUP, GROUP]), 1)
            tl.store(scratch_ptr + group, largest, mask=group < tl.cdiv(vocabulary, GROUP))
    peak = tl.max(high, 0)
    top = tl.min(tl.where(high == peak, high_place, vocabulary), 0)
    second = tl.max(tl.where(high_place == top, next_high, high), 0)
    total = tl.sum(sums * _lifted(high, peak, inverse))
    _store_float(law_ptr + PEAK, peak)
    _store_float(law_ptr + TOTAL, total)

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
            _write_cut(logits_ptr, law_ptr, scratch_ptr, count, limit, vocabulary, temperature, False, False, BLOCK)
        if TOP_P:
            _write_cut(
                logits_ptr, law_ptr, scratch_ptr, count, top_p_units, vocabulary, temperature, True, TOP_K, BLOCK
            )
    return top, peak - second
