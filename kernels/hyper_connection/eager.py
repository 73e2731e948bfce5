"""The definition in PyTorch with few passes over the streams, and analytic gradients: for many tokens on a CPU.

There a pass over memory costs more than its arithmetic, and sums over the two or four streams of a token, its last
dimension, run without vector instructions. So weights have their tokens last ([M, T] and [from, to, T]), and streams
are added one by one. A Sinkhorn step y = x / s, s = sum x + eps, has the gradient dx = (dy - sum(dy y)) / s.

T tokens, N residual streams, D model width, M = N * (N + 2) weights of a token, X = N * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import Connection

FEWEST = 64  # tokens; fewer cost as much as the calls, of which the definition makes less


def connect_eager(
    streams_BSND: Tensor,
    fn_MX: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> Connection:
    """Return `connect_reference`, with the streams' gradients added up."""
    return Connection(*_Connect.apply(streams_BSND, fn_MX, base_M, scale_3, norm_eps, eps, iterations))


def expand_and_mix_eager(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """Return `expand_and_mix_reference`."""
    out_BSND: Tensor = _Expand.apply(post_BSN, comb_BSNN, output_BSD, streams_BSND)
    return out_BSND


def sinkhorn(logits_NNT: Tensor, eps: float, iterations: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the softmax over the second dimension, and the result and the sums of every division after it."""
    softmax_NNT = logits_NNT.softmax(1)
    comb_NNT, steps = softmax_NNT + eps, []
    for dim in (0, *(1, 0) * (iterations - 1)):
        sums = comb_NNT.sum(dim, keepdim=True).add_(eps)
        comb_NNT = comb_NNT / sums
        steps.append((comb_NNT, sums))
    return softmax_NNT, steps


def sinkhorn_backward(grad_NNT: Tensor, softmax_NNT: Tensor, steps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradient of the logits."""
    for number in reversed(range(len(steps))):
        comb_NNT, sums = steps[number]
        grad_NNT = (grad_NNT - (grad_NNT * comb_NNT).sum(number % 2, keepdim=True)).div_(sums)
    return (grad_NNT - (grad_NNT * softmax_NNT).sum(1, keepdim=True)).mul_(softmax_NNT)


def weighted_sum(weight_NT: Sequence[Tensor], x_NTD: Sequence[Tensor]) -> Tensor:
    """Return sum_n weight_n x_n, [T, D]."""
    total_TD = x_NTD[0] * weight_NT[0].unsqueeze(1)
    for weight_T, x_TD in zip(weight_NT[1:], x_NTD[1:], strict=True):
        total_TD.addcmul_(x_TD, weight_T.unsqueeze(1))
    return total_TD


def _scales(scale_3: Tensor, num_streams: int) -> Tensor:
    """Return the factor of each projection, [M, 1]."""
    sizes = (num_streams, num_streams, num_streams**2)
    return torch.cat([scale.expand(size) for scale, size in zip(scale_3.float(), sizes, strict=True)]).unsqueeze(1)


def _streams(x_TND: Tensor) -> Sequence[Tensor]:
    return x_TND.unbind(1)


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams_BSND: Tensor,
        fn_MX: Tensor,
        base_M: Tensor,
        scale_3: Tensor,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, ...]:
        shape, dtype = streams_BSND.shape, streams_BSND.dtype
        x_TND = streams_BSND.flatten(0, 1).float()
        flat_TX, N, weight_MX = x_TND.flatten(1), shape[2], fn_MX.float()
        square_T = torch.linalg.vector_norm(flat_TX, dim=1).square_()
        inverse_T = square_T.div_(flat_TX.shape[1]).add_(norm_eps).rsqrt_()
        normed_MT = (weight_MX @ flat_TX.T).mul_(inverse_T)
        z_MT = torch.addcmul(base_M.float().unsqueeze(1), normed_MT, _scales(scale_3, N))
        gates_2NT = z_MT[: 2 * N].sigmoid()
        softmax_NNT, steps = sinkhorn(z_MT[2 * N :].unflatten(0, (N, N)), eps, iterations)
        pre_NT = gates_2NT[:N] + eps
        collapsed_TD = weighted_sum(pre_NT.unbind(0), _streams(x_TND))
        ctx.save_for_backward(
            streams_BSND, fn_MX, scale_3, inverse_T, normed_MT, gates_2NT, softmax_NNT, *(x for s in steps for x in s)
        )
        ctx.eps = eps
        post_BSN = (2 * gates_2NT[N:]).T.unflatten(0, shape[:2])
        comb_BSNN = steps[-1][0].permute(2, 0, 1).contiguous().unflatten(0, shape[:2])
        collapsed_BSD = collapsed_TD.to(dtype).unflatten(0, shape[:2])
        return post_BSN, comb_BSNN, collapsed_BSD, streams_BSND.view_as(streams_BSND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, post_BSN: Tensor, comb_BSNN: Tensor, collapsed_BSD: Tensor, given_BSND: Tensor) -> Any:
        streams_BSND, fn_MX, scale_3, inverse_T, normed_MT, gates_2NT, softmax_NNT, *rest = ctx.saved_tensors
        N = streams_BSND.shape[2]
        x_TND, out_TD = streams_BSND.flatten(0, 1).float(), collapsed_BSD.flatten(0, 1).float()
        pre_NT = torch.stack([torch.linalg.vecdot(x_TD, out_TD) for x_TD in _streams(x_TND)])
        gates_grad_2NT = torch.cat([pre_NT, 2 * post_BSN.flatten(0, 1).T]).mul_(gates_2NT).mul_(1 - gates_2NT)
        comb_NNT = comb_BSNN.flatten(0, 1).permute(1, 2, 0).contiguous()
        comb_NNT = sinkhorn_backward(comb_NNT, softmax_NNT, list(zip(rest[::2], rest[1::2], strict=True)))
        z_MT = torch.cat([gates_grad_2NT, comb_NNT.flatten(0, 1)])

        p_MT = z_MT * _scales(scale_3, N)  # gradient of the normed projections
        flat_TX, projected_MT = x_TND.flatten(1), p_MT * inverse_T
        # inverse = (mean x^2 + eps)^(-1/2), so its gradient G adds -G inverse^3 / X to the streams' factor
        norm_T = (p_MT * normed_MT).sum(0).mul_(inverse_T.square()).div_(-flat_TX.shape[1])
        grad_TND = given_BSND.flatten(0, 1).float().clone()
        for grad_TD, gate_T in zip(_streams(grad_TND), gates_2NT[:N], strict=True):
            grad_TD.addcmul_(out_TD, (gate_T + ctx.eps).unsqueeze(1))
        grad_TX = grad_TND.flatten(1).addcmul_(flat_TX, norm_T.unsqueeze(1)).addmm_(projected_MT.T, fn_MX.float())
        fn = (projected_MT @ flat_TX).to(fn_MX.dtype) if ctx.needs_input_grad[1] else None
        scale = torch.stack([x.sum() for x in (z_MT * normed_MT).split([N, N, N**2])])
        return grad_TX.to(streams_BSND.dtype).view(streams_BSND.shape), fn, z_MT.sum(1), scale, None, None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
        ctx.save_for_backward(post_BSN, comb_BSNN, output_BSD, streams_BSND)
        out_BSND = torch.empty_like(streams_BSND)
        post, comb, output_TD, x_TND = _flat(post_BSN, comb_BSNN, output_BSD, streams_BSND)
        for to, out_TD in enumerate(_streams(out_BSND.flatten(0, 1))):
            torch.mul(output_TD, post[:, to : to + 1], out=out_TD)
            for source, x_TD in enumerate(_streams(x_TND)):
                out_TD.addcmul_(x_TD, comb[:, source, to : to + 1])
        return out_BSND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSND: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors  # a recomputed step allows one access
        post, comb, output_TD, x_TND = _flat(*saved)
        grad_TND = grad_BSND.flatten(0, 1)
        grads = _streams(grad_TND)
        output_grad_TD = weighted_sum(post.unbind(1), grads)
        streams_TND = torch.empty_like(x_TND)
        for source, out_TD in enumerate(_streams(streams_TND)):
            torch.mul(grads[0], comb[:, source, :1], out=out_TD)
            for to, grad_TD in enumerate(grads[1:], start=1):
                out_TD.addcmul_(grad_TD, comb[:, source, to : to + 1])
        post_grad = torch.stack([torch.linalg.vecdot(grad_TD, output_TD) for grad_TD in grads], 1)
        comb_grad = torch.bmm(x_TND, grad_TND.transpose(1, 2))
        results = (post_grad, comb_grad, output_grad_TD, streams_TND)
        return tuple(x.view(like.shape).to(like.dtype) for x, like in zip(results, saved, strict=True))


def _flat(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Iterator[Tensor]:
    """Yield all with one dimension of tokens and the weights in the streams' dtype."""
    dtype = streams_BSND.dtype
    return (x.flatten(0, 1) for x in (post_BSN.to(dtype), comb_BSNN.to(dtype), output_BSD, streams_BSND))
