import math

import torch
from torch import Tensor, nn

from mtptrain.training.router_balance import RouterBalancer

# T tokens, E experts


class Router(nn.Module):
    """Sends every token to the expert given as its input."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, experts: Tensor) -> tuple[None, None, Tensor]:
        return None, None, experts


def test_the_bias_of_a_starved_expert_rises_and_that_of_a_crowded_one_falls() -> None:
    router = Router(4)
    balancer = RouterBalancer(router, 0.5)
    router(torch.tensor([[0, 0], [0, 1]]))  # loads 3, 1, 0, 0: their mean is 1
    balancer.step()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5, 0.5]


def test_loads_add_up_over_micro_batches_and_start_anew_after_a_step() -> None:
    router = Router(2)
    balancer = RouterBalancer(nn.Sequential(router), 1.0)
    router(torch.tensor([0, 0, 1]))
    router(torch.tensor([1, 1, 1]))
    balancer.step()
    assert router.e_score_correction_bias.tolist() == [1.0, -1.0]
    balancer.step()
    assert router.e_score_correction_bias.tolist() == [1.0, -1.0]


def test_tokens_under_no_grad_are_not_counted() -> None:
    router = Router(2)
    balancer = RouterBalancer(router, 1.0)
    with torch.no_grad():
        router(torch.tensor([0, 0, 0]))
    balancer.step()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.0]


def test_a_rate_of_zero_leaves_the_biases_alone() -> None:
    router = Router(2)
    balancer = RouterBalancer(router, 0.0)
    router(torch.tensor([0, 0, 0]))
    balancer.step()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.0]


def test_the_largest_load_and_the_dead_experts_are_counted_since_the_last_call() -> None:
    router = Router(4)
    balancer = RouterBalancer(router, 0.0)
    for tokens in ([0, 0, 1], [0, 0, 2, 1, 0]):
        router(torch.tensor(tokens))
        balancer.step()
    assert balancer.figures() == {"experts/largest_load_0": 5 / (8 / 4), "experts/dead_0": 1.0}
    assert balancer.figures() == {}


def test_balancing_evens_out_the_loads_of_a_lopsided_router() -> None:
    class TopOne(Router):
        def forward(self, scores_TE: Tensor) -> tuple[None, None, Tensor]:
            return None, None, (scores_TE + self.e_score_correction_bias).argmax(-1)

    router = TopOne(3)
    balancer = RouterBalancer(router, 0.02)
    scores_TE = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0.5, 1.0])
    for _ in range(200):
        router(scores_TE)
        balancer.step()
    loads = torch.bincount(router(scores_TE)[2], minlength=3)
    assert loads.min() > 300 / 3 * 0.8
    assert math.isfinite(router.e_score_correction_bias.sum())
