"""Streams from vLLM's offline engine: one prefill a piece; an extension of its workers keeps and writes the streams.

vLLM's DeepSeek-V4 copies the residual streams before `hc_head` into a buffer for its MTP module, if it has that buffer.
The extension gives it one without loading an MTP module. The buffer holds the tokens of one step of the engine, so each
step must hold one whole piece: no prefix caching, no two requests at a time, no step smaller than a piece.
"""

# T tokens of a piece, N residual streams, D model width

from __future__ import annotations

import importlib
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.config import CollectConfig, StreamFormat, require
from mtptrain.data.packing import Piece
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.writer import ShardDocuments, write_shard
from mtptrain.run.storage import temporary_path

VLLM = "0.33.0"  # whose source the extension was written for
DTYPE = "bfloat16"  # of its kernels of DeepSeek-V4
SMALLEST_STEP = 2048  # tokens
SAMPLING: dict[str, float] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}


class StreamKeeper:
    """Methods that vLLM adds to its workers; `collective_rpc` calls them. Only rank 0 keeps and writes streams.

    All tensor-parallel ranks hold the same streams: the layer before them ends with an all-reduce.
    """

    def prepare_streams(self: Any, num_streams: int, width: int) -> None:
        """Let the model keep the residual streams of each step.

        Args:
            num_streams: N of the backbone.
            width: its D.

        Raises:
            RuntimeError: vLLM's model has other streams.
        """
        inner = self.get_model().model
        if inner.hc_dim != num_streams * width:
            raise RuntimeError(f"vLLM's model has {inner.hc_dim} channels a token, not {num_streams} x {width}")
        kept: list[Tensor] = []
        self.stream_shape, self.kept_streams = (num_streams, width), kept
        rows = self.vllm_config.scheduler_config.max_num_batched_tokens
        dtype, device = self.vllm_config.model_config.dtype, inner.hc_head_fn.device
        inner._mtp_hidden_buffer = torch.full((rows, inner.hc_dim), torch.nan, dtype=dtype, device=device)

    def keep_streams(self: Any, num_tokens: int) -> None:
        """Copy the streams of the last step to the CPU and clear the buffer.

        Args:
            num_tokens: T, the length of the only request since the last call.

        Raises:
            RuntimeError: the step did not hold the whole request.
        """
        buffer = self.get_model().get_mtp_target_hidden_states()
        if self.rank == 0:
            streams_TND = buffer[:num_tokens].to("cpu", copy=True).unflatten(1, self.stream_shape)
            if not bool(streams_TND.isfinite().all()):
                raise RuntimeError(f"vLLM did not run all {num_tokens} tokens of a request in its last step")
            self.kept_streams.append(streams_TND)
        buffer.fill_(torch.nan)  # rows that the next step leaves out are found

    def write_streams(
        self: Any,
        folder: str,
        number: int,
        documents: list[list[list[int]]],
        tokens: list[int],
        loss_mask: list[bool] | None,
        stored_as: str,
    ) -> None:
        """Write the kept streams as a shard of a cache, and forget them.

        Args:
            folder: of the cache. All arguments are plain values, since they are sent between processes.
            number: of the shard.
            documents: start and size of each piece in `tokens`, by document, in the order in which they were kept.
            tokens: of the shard's documents.
            loss_mask: of these tokens; None = all may be targets.
            stored_as: value of a `StreamFormat`.
        """
        kept, self.kept_streams = self.kept_streams, []
        if self.rank != 0:
            return
        mask = None if loss_mask is None else np.array(loss_mask, bool)
        corpus = TokenizedCorpus(np.array(tokens, np.int32), np.array([0, len(tokens)]), 0, mask)
        pieces: ShardDocuments = [[(start, size) for start, size in parts] for parts in documents]
        write_shard(Path(folder), number, pieces, corpus, torch.cat(kept), StreamFormat(stored_as))


class OfflineEngine(Protocol):
    """The methods of `vllm.LLM` that are called here."""

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> Any:
        """Run requests to their end."""

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of every worker."""


class VllmEngine:
    """vLLM with the methods of `StreamKeeper`.

    Args:
        engine: vLLM's.
        sampling: vLLM's sampling parameters, `SAMPLING`.
        model: the backbone's config.
    """

    def __init__(self, engine: OfflineEngine, sampling: Any, model: DeepseekV4Config) -> None:
        self.engine, self.sampling = engine, sampling
        engine.collective_rpc("prepare_streams", args=(model.hc_mult, model.hidden_size))

    def write_shard(
        self,
        folder: Path,
        number: int,
        documents: ShardDocuments,
        corpus: TokenizedCorpus,
        stored_as: StreamFormat,
    ) -> int:
        """Run the pieces of a shard, write its file and its record; return the number of its tokens."""
        pieces = [piece for parts in documents for piece in parts]
        for start, size in pieces:
            prompt = {"prompt_token_ids": corpus.tokens[start : start + size].tolist()}
            self.engine.generate([prompt], self.sampling, use_tqdm=False)
            self.engine.collective_rpc("keep_streams", args=(size,))
        first, end = pieces[0][0], max(start + size for start, size in pieces)
        moved = [[[start - first, size] for start, size in parts] for parts in documents]
        mask = None if corpus.loss_mask is None else corpus.loss_mask[first:end].tolist()
        tokens = corpus.tokens[first:end].tolist()
        # An absolute path: the workers are other processes.
        where = str(folder.absolute())
        self.engine.collective_rpc("write_streams", args=(where, number, moved, tokens, mask, stored_as.value))
        return sum(size for _, size in pieces)

    def piece_streams(self, corpus: TokenizedCorpus, piece: Piece, cache: Path) -> Tensor:
        """Return the streams of a piece, fp32 [T, N, D], by way of a shard.

        The shard lies in the folder of the cache, where the next start clears what a killed one left.
        """
        folder = temporary_path(cache / "gate")
        folder.mkdir()
        try:
            self.write_shard(folder, 0, [[piece]], corpus, StreamFormat.fp32)
            return load_file(folder / shard_file(0))["streams"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def engine_options(folder: Path, tensor_parallel: int, piece_length: int) -> dict[str, str | float]:
    """Return the arguments of `vllm.LLM`, with which each step of the engine holds one whole piece.

    Args:
        folder: of the backbone.
        tensor_parallel: number of GPUs.
        piece_length: most tokens of a piece.
    """
    return {
        "model": str(folder),
        "dtype": DTYPE,
        "tensor_parallel_size": tensor_parallel,
        "worker_extension_cls": f"{StreamKeeper.__module__}.{StreamKeeper.__qualname__}",
        "skip_tokenizer_init": True,
        "max_model_len": piece_length + SAMPLING["max_tokens"],
        "max_num_batched_tokens": max(piece_length + SAMPLING["max_tokens"], SMALLEST_STEP),
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "enforce_eager": True,  # a captured graph would not know the buffer
        "gpu_memory_utilization": 0.85,  # beside it: the buffer, hc_head and lm_head
    }


def open_vllm(folder: Path, model: DeepseekV4Config, tensor_parallel: int, piece_length: int) -> VllmEngine:
    """Start vLLM's offline engine; see `engine_options`."""
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(**engine_options(folder, tensor_parallel, piece_length))
    return VllmEngine(engine, vllm.SamplingParams(**SAMPLING), model)


def installed_version() -> str | None:
    """Return the version of the installed vLLM, or None."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def visible_gpus() -> int:
    """Return the number of GPUs that this process sees, without initialising them."""
    return torch.cuda.device_count()


def check_vllm(config: CollectConfig, model: DeepseekV4Config, piece_length: int) -> int:
    """Return the number of GPUs among which vLLM splits each layer, without starting vLLM.

    Raises:
        UserError: vLLM is not installed or of another version, has too few GPUs, cannot divide the attention among
            them, or has no room for the one token that it emits.
    """
    version = installed_version()
    way_out = f"run: pip install vllm=={VLLM}, or set collect.engine=transformers"
    if version is None:
        raise UserError(f"collect.engine=vllm: vLLM is not installed; {way_out}")
    if version.split("+")[0] != VLLM:
        raise UserError(f"collect.engine=vllm: vLLM {version} is installed, and {VLLM} keeps the streams; {way_out}")
    gpus = visible_gpus()
    require(
        gpus > 0, "collect.engine", "vllm", "needs a GPU, and this machine has none; set collect.engine=transformers"
    )
    wanted = config.tensor_parallel or gpus
    setting = ("collect.tensor_parallel", wanted)
    require(wanted <= gpus, *setting, f"this process sees {gpus} GPUs; set at most that many")
    heads, groups = model.num_attention_heads, model.o_groups
    rule = f"must divide the backbone's {heads} attention heads and {groups} output groups"
    require(heads % wanted == 0 and groups % wanted == 0, *setting, rule)
    context = int(model.max_position_embeddings)
    rule = f"vLLM emits a token behind each piece, in the backbone's context of {context}; set at most {context - 1}"
    require(piece_length < context, "data.sequence_length", piece_length, rule)
    return wanted
