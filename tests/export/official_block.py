"""DeepSeek-V4's MTP module in plain torch, one position at a time, from the tensors of an exported folder.

It shares no code with the library: it decodes FP8 and FP4 itself and names tensors as releases do. Keys lie in a cache
by position, as in a server: a draft writes its own keys past the anchor, and the next pass overwrites them.

Source: the published description of DeepSeek-V4 (arXiv 2412.19437, section 2.2, for multi-token prediction), and the
released tensors.
"""

# D model width, N residual streams, H heads, C head width

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV4Config

FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
THETA = 10_000.0


def read_weight(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a stored weight as float32; e4m3 has a scale for 128 x 128 values, packed e2m1 one for 32 in a row."""
    stored = tensors[f"{name}.weight"]
    if f"{name}.scale" not in tensors:
        return stored.float()
    scale = tensors[f"{name}.scale"].float()
    if stored.dtype == torch.int8:
        byte = stored.view(torch.uint8).long()
        values = torch.stack([FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4]], dim=-1).flatten(1)
        return values * scale.repeat_interleave(32, 1)
    rows, columns = stored.shape
    return stored.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def normalise(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Return x divided by its root mean square over the last dimension."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.float()


def rotate(x: Tensor, position: int, width: int) -> Tensor:
    """Return x with its last `width` channels rotated by RoPE, neighbours as pairs."""
    angle = position * THETA ** (-torch.arange(0, width, 2) / width)
    even, odd = x[..., -width::2], x[..., -width + 1 :: 2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
    return torch.cat([x[..., :-width], turned.flatten(-2)], dim=-1)


class OfficialModule:
    """Module `d` of a folder, with its cache of keys."""

    def __init__(self, tensors: Mapping[str, Tensor], config: DeepseekV4Config, d: int) -> None:
        prefix = f"mtp.{d}."
        self.config, self.eps = config, config.rms_norm_eps
        self.tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.keys: dict[int, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return x times a stored weight."""
        return x @ read_weight(self.tensors, name).T

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Return x normalised, with a stored weight."""
        return normalise(x, self.eps, self.tensors[f"{name}.weight"])

    def step(self, embedding_D: Tensor, state_ND: Tensor, position: int) -> Tensor:
        """Return the next state [N, D], and write the key of the position."""
        x_ND = self.linear("e_proj", self.norm("enorm", embedding_D)) + self.linear(
            "h_proj", self.norm("hnorm", state_ND)
        )
        post_N, mix_NN, input_D = self.mixed("attn", x_ND)
        x_ND = post_N[:, None] * self.attention(self.norm("attn_norm", input_D), position) + mix_NN.T @ x_ND
        post_N, mix_NN, input_D = self.mixed("ffn", x_ND)
        return post_N[:, None] * self.experts(self.norm("ffn_norm", input_D)) + mix_NN.T @ x_ND

    def logits(self, state_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Return the draft logits of a state."""
        flat = normalise(state_ND.flatten(), self.eps)
        weight_N = self.tensors["hc_head_fn"] @ flat * self.tensors["hc_head_scale"] + self.tensors["hc_head_base"]
        x_D = ((weight_N.sigmoid() + self.config.hc_eps)[:, None] * state_ND).sum(0)
        return head_VD.float() @ self.norm("norm", x_D)

    def mixed(self, branch: str, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output weights [N], the doubly stochastic mixing matrix [N, N] and the branch's input [D]."""
        n, eps = self.config.hc_mult, self.config.hc_eps
        scale, base = self.tensors[f"hc_{branch}_scale"], self.tensors[f"hc_{branch}_base"]
        mixes = self.tensors[f"hc_{branch}_fn"] @ normalise(x_ND.flatten(), self.eps)
        pre_N = (mixes[:n] * scale[0] + base[:n]).sigmoid() + eps
        post_N = 2 * (mixes[n : 2 * n] * scale[1] + base[n : 2 * n]).sigmoid()
        matrix = (mixes[2 * n :] * scale[2] + base[2 * n :]).view(n, n).softmax(-1) + eps
        matrix = matrix / (matrix.sum(0) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(0) + eps)
        return post_N, matrix, (pre_N[:, None] * x_ND).sum(0)

    def attention(self, x_D: Tensor, position: int) -> Tensor:
        """Return the attention's output [D]; one key, which is also the value, serves all heads."""
        config = self.config
        width = int(config.head_dim * config.partial_rotary_factor)
        query = self.linear("attn.wq_b", self.norm("attn.q_norm", self.linear("attn.wq_a", x_D)))
        query_HC = rotate(normalise(query.view(-1, config.head_dim), self.eps), position, width)
        self.keys[position] = rotate(self.norm("attn.kv_norm", self.linear("attn.wkv", x_D)), position, width)
        visible = [i for i in self.keys if position - config.sliding_window < i <= position]
        key_TC = torch.stack([self.keys[i] for i in visible])
        score_HT = query_HC @ key_TC.T * config.head_dim**-0.5
        sink_H1 = self.tensors["attn.attn_sink"][:, None]
        weight_HT = torch.cat([score_HT, sink_H1], dim=1).softmax(-1)[:, :-1]
        out_HC = rotate(weight_HT @ key_TC, -position, width)
        groups = out_HC.reshape(config.o_groups, -1)
        rank_GRW = read_weight(self.tensors, "attn.wo_a").view(config.o_groups, -1, groups.shape[1])
        return self.linear("attn.wo_b", torch.einsum("grw,gw->gr", rank_GRW, groups).flatten())

    def experts(self, x_D: Tensor) -> Tensor:
        """Return the sum of the shared expert and the chosen ones."""
        score_E = functional.softplus(self.linear("ffn.gate", x_D)).sqrt()
        chosen = (score_E + self.tensors["ffn.gate.bias"]).topk(self.config.num_experts_per_tok).indices
        weights = score_E[chosen] / score_E[chosen].sum() * self.config.routed_scaling_factor
        out_D = self.expert("ffn.shared_experts", x_D)
        for weight, number in zip(weights, chosen.tolist(), strict=True):
            out_D = out_D + weight * self.expert(f"ffn.experts.{number}", x_D)
        return out_D

    def expert(self, name: str, x_D: Tensor) -> Tensor:
        """Return the output of one clamped SwiGLU expert."""
        limit = self.config.swiglu_limit
        gate, up = self.linear(f"{name}.w1", x_D).clamp(max=limit), self.linear(f"{name}.w3", x_D).clamp(-limit, limit)
        return self.linear(f"{name}.w2", functional.silu(gate) * up)
