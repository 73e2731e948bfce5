"""Time the backbone's forward pass: transformers' eager attention against `attn_implementation="mtptrain"`.

python scripts/benchmark_attention.py

The shipped tiny backbone reads random tokens with both implementations in turn, three times. Time on a CPU is processor
time on one thread. Memory is the peak of a forward pass beyond the model.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig
from mtptrain.kernels.bench.measure import observe
from mtptrain.run.provenance import git_commit, processor_name

SIZES = [(4, 256), (1, 1024), (1, 2048), (1, 4096)]  # rows, tokens; 4096 is the context of this backbone
ROUNDS = 3


@torch.inference_mode()
def forward(model: DeepseekV4ForCausalLM, tokens_BS: torch.Tensor) -> None:
    """Run one forward pass up to the last layer, without logits."""
    model.model(tokens_BS, use_cache=False)


def main() -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = load_backbone(BackboneConfig(), device, torch.float32)
    eager = DeepseekV4ForCausalLM.from_pretrained(
        ours.folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    models = {"eager": eager.to(device).eval(), "mtptrain": ours.model}
    print(f"{processor_name()}, torch {torch.__version__}, commit {git_commit()}")
    print("| tokens | " + " | ".join(f"{name}, s" for name in models) + " | eager, MB | mtptrain, MB |")
    print("|---|---|---|---|---|")
    for rows, length in SIZES:
        tokens_BS = torch.randint(ours.config.vocab_size, (rows, length), device=device)
        runs = {name: partial(forward, model, tokens_BS) for name, model in models.items()}
        rounds = [{name: observe(run, device) for name, run in runs.items()} for _ in range(ROUNDS)]
        samples = {name: [measured[name] for measured in rounds] for name in runs}
        seconds = [f"{median(sample.seconds for sample in kind):.3f}" for kind in samples.values()]
        peaks = [max((sample.extra_bytes or 0) for sample in kind) / 1e6 for kind in samples.values()]
        print(f"| {rows} x {length} | {' | '.join(seconds)} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
