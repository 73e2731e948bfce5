"""A miniature release: a small backbone and its head in the official format, for trials without a full release."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.config import ReleaseVariant, ShapeConfig
from mtptrain.release.backbone import iterate_backbone
from mtptrain.release.modules import to_release
from mtptrain.release.names import Scheme

VARIANT_SCHEMES: dict[ReleaseVariant, Scheme] = {
    ReleaseVariant.release: "fp8_fp4",
    ReleaseVariant.base: "fp8",
    ReleaseVariant.dspark: "fp8_fp4",
}
# Every quantised matrix is made of whole blocks of 128 x 128. The width of a head, the indexer, the rates and the
# number of streams are V4-Flash's, for which the servers' kernels are written.
SERVABLE = ShapeConfig(
    hidden_size=256,
    num_attention_heads=8,
    head_dim=512,
    rope_head_dim=64,
    q_lora_rank=128,
    o_lora_rank=128,
    sliding_window=128,
    hca_rate=128,
    index_heads=64,
    index_head_dim=128,
    index_topk=512,
    expert_size=256,
    hc_mult=4,
)
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
DSPARK_STAGES, DSPARK_RANK = 3, 4  # 3 as released
# Keys of transformers only; releases use compress_ratios, num_hash_layers and qk_rope_head_dim instead.
NOT_IN_RELEASES = (
    *("layer_types", "mlp_layer_types", "compress_rates", "partial_rotary_factor", "mlp_bias", "dtype"),
    *("pad_token_id", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "transformers_version"),
    *("_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict"),
)
NOT_IN_DSPARK = ("enorm.", "hnorm.", "e_proj.", "h_proj.")


def miniature_groups(
    model: DeepseekV4ForCausalLM, head: Mapping[str, Tensor], variant: ReleaseVariant
) -> list[dict[str, Tensor]]:
    """Return the tensors of each shard: the embedding, each layer, the rest of the model, and last the head.

    Args:
        model: the backbone.
        head: our `mtp.{d}.*`; its layers also fill the DSpark blocks.
        variant: the release to imitate.

    Raises:
        UserError: the scheme cannot store a tensor's sizes or values.
    """
    scheme, config = VARIANT_SCHEMES[variant], model.config
    groups: dict[str, dict[str, Tensor]] = {"embed": {}}
    groups |= {f"layers.{i}": {} for i in range(config.num_hidden_layers)} | {"rest": {}}
    for name, tensor in iterate_backbone(model.state_dict(), config, scheme):
        layer = ".".join(name.split(".")[:2])
        groups[layer if layer in groups else "embed" if name.startswith("embed.") else "rest"][name] = tensor
    released = to_release(head, config, scheme)
    groups["mtp"] = _dspark_blocks(released, config) if variant is ReleaseVariant.dspark else released
    return list(groups.values())


def _dspark_blocks(released: dict[str, Tensor], config: DeepseekV4Config) -> dict[str, Tensor]:
    """Return the `mtp.*` of later releases: three decoder layers and their connections, named as in V4-Flash-0731.

    Only names matter here: tensors that an MTP module does not have get random values.
    """
    width, last = config.hidden_size, DSPARK_STAGES - 1
    generator = torch.Generator().manual_seed(0)
    blocks: dict[str, Tensor] = {}
    for name, tensor in released.items():
        part = name.removeprefix("mtp.0.")
        if part != name and not part.startswith(NOT_IN_DSPARK):
            only_last = part.startswith(("norm.", "hc_head"))
            stages = [last] if only_last else range(DSPARK_STAGES)
            blocks |= {f"mtp.{stage}.{part}": tensor.clone() for stage in stages}
    extra = {
        "mtp.0.main_norm.weight": (width,),
        "mtp.0.main_proj.weight": (width, width),
        f"mtp.{last}.markov_head.markov_w1.weight": (config.vocab_size, DSPARK_RANK),
        f"mtp.{last}.markov_head.markov_w2.weight": (config.vocab_size, DSPARK_RANK),
        f"mtp.{last}.confidence_head.proj.weight": (1, width + DSPARK_RANK),
    }
    return blocks | {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in extra.items()}


def miniature_config(config: DeepseekV4Config, variant: ReleaseVariant, num_modules: int) -> dict[str, object]:
    """Return config.json in the keys of a release, with a trailing 0 in `compress_ratios` for each module.

    Releases leave out `layer_types` and `compress_rates`; the miniature adds them if its ratios are not 4 and 128.
    """
    kinds, scheme = config.layer_types or [], VARIANT_SCHEMES[variant]
    rates = config.compress_rates or config.default_compress_rates
    modules = DSPARK_STAGES if variant is ReleaseVariant.dspark else num_modules
    released = {
        **{name: value for name, value in config.to_dict().items() if name not in NOT_IN_RELEASES},
        "architectures": ["DeepseekV4ForCausalLM"],
        "num_hash_layers": (config.mlp_layer_types or []).count("hash_moe"),
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "num_nextn_predict_layers": 1 if variant is ReleaseVariant.dspark else num_modules,
        "expert_dtype": "fp4" if scheme == "fp8_fp4" else "fp8",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "compress_ratios": [rates.get(kind, 0) for kind in kinds] + [0] * modules,
    }
    if [rates.get(kind, 0) for kind in kinds] != [RATIOS[kind] for kind in kinds]:
        released |= {"layer_types": list(kinds), "compress_rates": dict(rates)}
    if variant is ReleaseVariant.dspark:
        released |= {"dspark_block_size": 5, "dspark_markov_rank": DSPARK_RANK}
    return released
