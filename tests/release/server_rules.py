"""The rules of vLLM's and SGLang's loaders for MTP modules: names, shapes, dtypes, and the tensors that they skip."""

import re
from dataclasses import dataclass

import torch

from mtptrain.release.names import Scheme

NUM_LAYERS = 43  # of DeepSeek-V4-Flash; the module is layer 43

# vLLM, `DeepSeekV4MTP.load_weights` of vllm/models/deepseek_v4/nvidia/mtp.py, version 0.33.0, read in 2026-11.
VLLM_RENAMES = [
    (".emb.tok_emb.weight", ".embed_tokens.weight"),
    (".head.weight", ".shared_head.head.weight"),
    (".norm.weight", ".shared_head.norm.weight"),
]
VLLM_OUTSIDE_BLOCK = ["embed_tokens", "enorm", "hnorm", "h_proj", "e_proj", "shared_head"]
VLLM_OUTSIDE_BLOCK += ["hc_head_fn", "hc_head_base", "hc_head_scale"]
VLLM_EXPERT_SCALE = re.compile(r"\.experts\.\d+\.w[123]\.scale$")
VLLM_EXPERT_SCALE_SUFFIX = {"fp8_fp4": ".weight_scale", "fp8": ".weight_scale_inv"}  # by expert_dtype of the config
VLLM_STACKED = [
    ("gate_up_proj", "w1"),
    ("gate_up_proj", "w3"),
    ("attn.fused_wqa_wkv", "attn.wq_a"),
    ("attn.fused_wqa_wkv", "attn.wkv"),
]
VLLM_EXPERTS = {"w1": "w13_", "w2": "w2_", "w3": "w13_"}
# SGLang, `remap_weight_name_to_dpsk_hf_format` and `load_weights` of python/sglang/srt/models/deepseek_v4.py with
# is_nextn, version 0.5.23, read in 2026-11; wq_a and wkv not fused (SGLANG_OPT_FUSE_WQA_WKV) and wo_a left in FP8.
SGLANG_SPECIAL = {
    "norm.weight": "shared_head.norm.weight",
    "e_proj.scale": "e_proj.weight_scale_inv",
    "h_proj.scale": "h_proj.weight_scale_inv",
}
SGLANG_RENAMES = [
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
]
SGLANG_SCALED = ["self_attn", "mlp"]  # where ".scale" becomes ".weight_scale_inv"
SGLANG_OUTSIDE_LAYER = ["shared_head.norm", ".e_proj", "h_proj", "enorm", "hnorm"]
SGLANG_OUTSIDE_LAYER += ["hc_head_base", "hc_head_fn", "hc_head_scale"]
SGLANG_STACKED = [("gate_up_proj", "gate_proj"), ("gate_up_proj", "up_proj")]
SGLANG_EXPERTS = {"gate_proj": "w13_", "down_proj": "w2_", "up_proj": "w13_"}

# The parameters of the two servers' modules for Flash: shape, from their constructors.
COMMON = {
    "enorm.weight": [4096],
    "hnorm.weight": [4096],
    "shared_head.norm.weight": [4096],
    "hc_head_fn": [4, 16384],
    "hc_head_base": [4],
    "hc_head_scale": [1],
    "e_proj.weight": [4096, 4096],
    "e_proj.weight_scale_inv": [32, 32],
    "h_proj.weight": [4096, 4096],
    "h_proj.weight_scale_inv": [32, 32],
}
BLOCK = {
    "ATTN.attn_sink": [64],
    "ATTN.q_norm.weight": [1024],
    "ATTN.kv_norm.weight": [512],
    "ATTN.wq_b.weight": [32768, 1024],
    "ATTN.wq_b.weight_scale_inv": [256, 8],
    "ATTN.wo_a.weight": [8192, 4096],
    "ATTN.wo_a.weight_scale_inv": [64, 32],
    "ATTN.wo_b.weight": [4096, 8192],
    "ATTN.wo_b.weight_scale_inv": [32, 64],
    "FFN.gate.weight": [256, 4096],
    "FFN.gate.e_score_correction_bias": [256],
    "FFN.shared_experts.gate_up_proj.weight": [4096, 4096],
    "FFN.shared_experts.gate_up_proj.weight_scale_inv": [32, 32],
    "FFN.shared_experts.down_proj.weight": [4096, 2048],
    "FFN.shared_experts.down_proj.weight_scale_inv": [32, 16],
    "hc_attn_fn": [24, 16384],
    "hc_attn_base": [24],
    "hc_attn_scale": [3],
    "hc_ffn_fn": [24, 16384],
    "hc_ffn_base": [24],
    "hc_ffn_scale": [3],
}
VLLM_BLOCK = {
    "ATTN.fused_wqa_wkv.weight": [1536, 4096],
    "ATTN.fused_wqa_wkv.weight_scale_inv": [12, 32],
    "attn_norm.weight": [4096],
    "ffn_norm.weight": [4096],
}
SGLANG_BLOCK = {
    "ATTN.wq_a.weight": [1024, 4096],
    "ATTN.wq_a.weight_scale_inv": [8, 32],
    "ATTN.wkv.weight": [512, 4096],
    "ATTN.wkv.weight_scale_inv": [4, 32],
    "input_layernorm.weight": [4096],
    "post_attention_layernorm.weight": [4096],
}
EXPERTS = {  # weight w13, w2 and their scales
    "fp8_fp4": {"w13": ([4096, 2048], [4096, 128]), "w2": ([4096, 1024], [4096, 64])},
    "fp8": {"w13": ([4096, 4096], [32, 32]), "w2": ([4096, 2048], [32, 16])},
}


def vllm_name(released: str, scheme: Scheme) -> str:
    name = f"model.layers.{NUM_LAYERS}.{released}"
    for old, new in VLLM_RENAMES:
        name = name.replace(old, new)
    if not any(part in name for part in VLLM_OUTSIDE_BLOCK):
        name = name.replace(f".{NUM_LAYERS}.", f".{NUM_LAYERS}.mtp_block.", 1)
    if name.endswith(".scale"):
        suffix = VLLM_EXPERT_SCALE_SUFFIX[scheme] if VLLM_EXPERT_SCALE.search(name) else ".weight_scale_inv"
        name = name.removesuffix(".scale") + suffix
    name = name.replace(".shared_experts.w2", ".shared_experts.down_proj")
    if ".experts." in name:
        return re.sub(r"experts\.\d+\.(w[123])\.", lambda match: f"experts.{VLLM_EXPERTS[match[1]]}", name)
    for stacked, part in VLLM_STACKED:
        if part in name:
            return name.replace(part, stacked)
    return name.replace(".ffn.gate.bias", ".ffn.gate.e_score_correction_bias")


def sglang_name(released: str, _: Scheme) -> str:
    name = f"model.layers.{NUM_LAYERS}.{SGLANG_SPECIAL.get(released, released)}"
    for old, new in SGLANG_RENAMES:
        name = name.replace(old, new)
    if any(part in name for part in SGLANG_SCALED):
        name = name.replace(".scale", ".weight_scale_inv")
    is_outside = any(part in name for part in SGLANG_OUTSIDE_LAYER)
    name = name.replace(f"model.layers.{NUM_LAYERS}", "model" if is_outside else "model.decoder")
    if ".experts." in name:
        return re.sub(r"experts\.\d+\.(\w+_proj)\.", lambda match: f"experts.{SGLANG_EXPERTS[match[1]]}", name)
    for stacked, part in SGLANG_STACKED:
        if part in name:
            return name.replace(part, stacked)
    return name


def expected_shapes(
    outside: str, block: str, attention: str, ffn: str, server_block: dict[str, list[int]]
) -> dict[str, list[int]]:
    inner = {
        name.replace("ATTN", attention).replace("FFN", ffn): shape for name, shape in {**BLOCK, **server_block}.items()
    }
    return {f"{outside}.{name}": shape for name, shape in COMMON.items()} | {
        f"{block}.{name}": shape for name, shape in inner.items()
    }


def vllm_parameters(scheme: Scheme) -> dict[str, list[int]]:
    """Return names and shapes of the parameters of one module of vLLM, for Flash."""
    outside = f"model.layers.{NUM_LAYERS}"
    expected = expected_shapes(outside, f"{outside}.mtp_block", "attn", "ffn", VLLM_BLOCK)
    return expected | _experts(f"{outside}.mtp_block.ffn.experts", scheme, VLLM_EXPERT_SCALE_SUFFIX[scheme])


def sglang_parameters(scheme: Scheme) -> dict[str, list[int]]:
    """Return names and shapes of the parameters of SGLang's module, for Flash."""
    expected = expected_shapes("model", "model.decoder", "self_attn", "mlp", SGLANG_BLOCK)
    return expected | _experts("model.decoder.mlp.experts", scheme, ".weight_scale_inv")


def _experts(prefix: str, scheme: Scheme, suffix: str) -> dict[str, list[int]]:
    parts = EXPERTS[scheme].items()
    weights = {f"{prefix}.{part}_weight": [256, *weight] for part, (weight, _) in parts}
    return weights | {f"{prefix}.{part}_{suffix.removeprefix('.')}": [256, *scale] for part, (_, scale) in parts}


def expected_dtype(name: str, scheme: Scheme) -> torch.dtype:
    """Return the dtype of the tensor that a parameter takes; vLLM 0.33.0 takes scales of experts without a conversion.

    Beside FP8 experts, both servers hold scales as float32, and vLLM would read an E8M0 one as the number of its byte
    (vllm-project/vllm#43416).
    """
    if "_scale" in name.rsplit(".", 1)[-1] and not name.rsplit(".", 1)[-1].startswith("hc_"):
        return torch.float32 if scheme == "fp8" else torch.float8_e8m0fnu
    if ".experts." in name:
        return torch.int8 if scheme == "fp8_fp4" else torch.float8_e4m3fn
    if any(part in name for part in ("hc_", "attn_sink", "e_score_correction_bias")):
        return torch.float32
    return torch.bfloat16 if "norm" in name or ".gate.weight" in name else torch.float8_e4m3fn


@dataclass(frozen=True)
class LoaderRules:
    """The rules of one loader.

    Attributes:
        version, read: version of the distribution, and the month in which its source was read.
        module: pattern of the names that it reads; group 1 is the module, group 2 the name in it. All others are
            skipped without a word, embedding and lm_head included.
        num_modules: most modules that it loads; None without a bound.
        loads_draft: whether it loads a folder without the model.
    """

    version: str
    read: str
    module: str
    num_modules: int | None
    loads_draft: bool


LOADERS = {
    # `DeepSeekV4MTP._to_spec_layer_name` and `get_spec_layer_idx_from_weight_name`.
    "vllm": LoaderRules("0.33.0", "2026-11", r"mtp\.(\d+)\.(.+)", None, True),
    # `load_weights` with is_nextn, which asserts `num_nextn_predict_layers == 1`.
    "sglang": LoaderRules("0.5.23", "2026-11", r"mtp\.(0)\.(.+)", 1, False),
}


NAMES = {"vllm": (vllm_name, vllm_parameters), "sglang": (sglang_name, sglang_parameters)}  # both functions of a server
