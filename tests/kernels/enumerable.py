"""A world small enough to enumerate every draft, every outcome of its verification and every text."""

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtptrain.kernels.acceptance.reference import (
    Verification,
    accepted_length,
    keep_probabilities,
    next_token_weights,
)

# S states, K draft steps, L = K + 1 verified positions, V vocabulary, B drafts, E emitted tokens of a text.
NUM_STATES = 1009


class World(NamedTuple):
    """Target and draft distributions of every history; a history's state is its hash, unique while it is short."""

    p_SV: Tensor
    q_KSV: Tensor
    stops_KS: Tensor | None = None  # bool, whether a draft ends before step k at this history; None: never

    @property
    def vocabulary(self) -> int:
        return self.p_SV.shape[-1]

    @property
    def steps(self) -> int:
        return self.q_KSV.shape[0]

    def follow(self, state: Tensor, token: Tensor) -> Tensor:
        return (state * self.vocabulary + token + 1) % NUM_STATES

    def states(self, tokens_BE: Tensor, start: int = 0) -> Tensor:
        """Return the states before each token and after the last, [B, E + 1]."""
        states = [torch.full_like(tokens_BE[:, 0], start)] if tokens_BE.shape[1] else []
        for token_B in tokens_BE.T:
            states.append(self.follow(states[-1], token_B))
        return torch.stack(states, dim=1)

    def texts(self, length: int) -> Tensor:
        """Return every text, int64 [V^E, E] in lexicographic order."""
        return torch.tensor(list(product(range(self.vocabulary), repeat=length)))

    def text_probability(self, length: int) -> Tensor:
        """Return the distribution of a lossless sampler: the product of p along each text, [V^E]."""
        texts_BE = self.texts(length)
        return self.p_SV[self.states(texts_BE)[:, :-1], texts_BE].prod(-1)


def random_world(vocabulary: int, steps: int, greedy: bool = False, seed: int = 0) -> World:
    """Return random p and q with zeros in both; q equals p in some states, and is one-hot for greedy drafts."""
    generator = torch.Generator().manual_seed(seed)
    p_SV = _random_rows(generator, NUM_STATES, vocabulary)
    q_KSV = _random_rows(generator, steps, NUM_STATES, vocabulary)
    if greedy:
        q_KSV = torch.nn.functional.one_hot(q_KSV.argmax(-1), vocabulary).double()
    else:
        q_KSV[:, ::5] = p_SV[::5]
    return World(p_SV, q_KSV)


def _random_rows(generator: torch.Generator, *shape: int) -> Tensor:
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1.5).exp()
    dropped = torch.rand(*shape, generator=generator) < 0.2
    dropped[..., 1] = False
    weight = weight.masked_fill(dropped, 0)
    return weight / weight.sum(-1, keepdim=True)


def pass_outcomes(world: World, state: int, steps: int, verification: Verification) -> list[np.ndarray]:
    """Return the chances of all outcomes of one pass: entry a is [V^a, V], the kept prefix and the token after it.

    Sum the formulas of the implementation over every draft and over every pattern of its keep draws.
    """
    drafts_BK = world.texts(steps)
    states_BL = world.states(drafts_BK, state)
    p_BLV = world.p_SV[states_BL]
    q_BLV = torch.nn.functional.pad(world.q_KSV[torch.arange(steps), states_BL[:, :-1]], (0, 0, 0, 1))
    if world.stops_KS is None:
        going_BK = torch.ones_like(drafts_BK, dtype=torch.bool)
    else:
        going_BK = (~world.stops_KS[torch.arange(steps), states_BL[:, :-1]]).cumprod(-1).bool()
    q_BLV[:, :-1] *= going_BK.unsqueeze(-1)
    # A step without a drafted token is enumerated with every token: together they weigh 1.
    token_q_BK = q_BLV[:, :-1].gather(-1, drafts_BK.unsqueeze(-1)).squeeze(-1)
    drafted_B = torch.where(going_BK, token_q_BK, 1 / world.vocabulary).prod(1)
    keep_BK, weight_BL = keep_probabilities(drafts_BK, q_BLV, p_BLV, verification)
    assert ((keep_BK >= 0) & (keep_BK <= 1 + 1e-12)).all()
    ends_BL = torch.zeros(len(drafts_BK), steps + 1, dtype=torch.float64)
    for pattern in product([False, True], repeat=steps):
        kept_K = torch.tensor(pattern)
        chance_B = torch.where(kept_K, keep_BK, 1 - keep_BK).prod(-1)
        ends_BL[:, int(accepted_length(kept_K[None], verification))] += chance_B
    outcomes = []
    for accepted in range(steps + 1):
        next_BV = next_token_weights(q_BLV, p_BLV, weight_BL, torch.full_like(drafts_BK[:, 0], accepted))
        next_BV = next_BV / next_BV.sum(-1, keepdim=True)
        joint_BV = (drafted_B * ends_BL[:, accepted]).unsqueeze(-1) * next_BV
        outcomes.append(joint_BV.view(world.vocabulary**accepted, -1, world.vocabulary).sum(1).numpy())
    return outcomes


def decoded_texts(world: World, steps: int, verification: Verification, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact result of speculative decoding, stopped after `length` tokens.

    Returns:
        Chance of each text [V^E], and the chance times the mean, given the text, of the counts [V^E, 1 + K]: passes,
        and drafted tokens accepted at each position, those past the end not counted.
    """
    vocabulary = world.vocabulary
    outcomes = cache(lambda state: pass_outcomes(world, state, steps, verification))

    @cache
    def texts(state: int, room: int) -> tuple[np.ndarray, np.ndarray]:
        if room == 0:
            return np.ones(1), np.zeros((1, 1 + steps))
        mass, counts = np.zeros(vocabulary**room), np.zeros((vocabulary**room, 1 + steps))
        for accepted, joint in enumerate(outcomes(state)):
            counted = np.arange(1 + steps) <= min(accepted, room)
            if accepted >= room:
                ended = joint.reshape(vocabulary**room, -1).sum(1)
                mass += ended
                counts += ended[:, None] * counted
                continue
            span = vocabulary ** (room - accepted - 1)
            for node, tokens in enumerate(product(range(vocabulary), repeat=accepted + 1)):
                after = state
                for token in tokens:
                    after = (after * vocabulary + token + 1) % NUM_STATES
                later_mass, later_counts = texts(after, room - accepted - 1)
                chance, rows = joint.reshape(-1)[node], slice(node * span, (node + 1) * span)
                mass[rows] += chance * later_mass
                counts[rows] += chance * (later_counts + later_mass[:, None] * counted)
        return mass, counts

    return texts(0, length)
