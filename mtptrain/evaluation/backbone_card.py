"""The model card of a backbone that was trained here, with its stock head."""

from __future__ import annotations

from pathlib import Path

from mtptrain.backbone.load import Backbone
from mtptrain.evaluation.head_result import TeacherForced
from mtptrain.run.folder import RunFolder
from mtptrain.run.tracking import METRICS_FILE, read_rows

HEAD_FILE = "mtp.safetensors"


def backbone_card(run_folder: RunFolder, backbone: Backbone, loss: tuple[float, float], figures: TeacherForced) -> str:
    """Return the model card of a backbone and its stock head.

    Args:
        run_folder: of the run, with the stock head's in `stock_head`.
        backbone: the trained backbone.
        loss: held-out nats a token and bits a byte.
        figures: of the stock head on held-out text.
    """
    config, provenance = run_folder.config, run_folder.provenance
    first = provenance  # of the job that began the run
    while first.continues is not None:
        first = first.continues
    data = config.data
    text = f"data.path={data.path}" if data.path else "Python's standard library (sources and documentation topics)"
    if data.packages:
        text += f", and as many characters of sources of {', '.join(data.packages)}"
    acceptance, agreement = (
        " / ".join("-" if value is None else f"{value:.3f}" for value in values)
        for values in (figures.alpha, figures.top1)
    )
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    parameters = sum(p.numel() for p in backbone.model.parameters()) / 1e6
    tokens = [_tokens_trained(folder) for folder in (run_folder.path, run_folder.path / "stock_head")]
    return f"""# DeepSeek-V4 `{config.backbone.name}`

A `DeepseekV4ForCausalLM` of {parameters:.2f} M parameters with all three attention kinds, hash-routed and top-k experts
and {config.backbone.shape.hc_mult} residual streams, and a stock MTP head of depth 1 (`{HEAD_FILE}`) trained with
cross-entropy on data tokens. For experiments with MTP heads; it writes no useful text.

| | |
|---|---|
| held-out loss | {loss[1]:.4f} bits a byte, {loss[0]:.4f} nats a token ({data.sequence_length}-token windows) |
| stock head, held-out, steps 1-4 | sum min(p, q) {acceptance}; same top token {agreement} |
| training text | {text}; one document in {data.heldout_every} held out by hash of its name |
| tokens seen | backbone {tokens[0]}, head {tokens[1]} |
| seed | {config.seed} |
| command | `{" ".join(first.command)}` |
| hardware | {first.hardware.processor}, {first.hardware.torch_threads} thread(s), \
{", ".join(first.hardware.gpus) or "no GPU"} |
| commit | backbone {first.git_commit}, head {provenance.git_commit} |
| versions | {versions} |
"""


def _tokens_trained(run_folder: Path) -> str:
    """Return the number of training tokens in a run's metrics, which `tracking.metrics_file=false` switches off."""
    counts = [int(row.get("tokens", 0)) for row in read_rows(run_folder / METRICS_FILE)]
    return f"{max(counts):,}" if counts else "not recorded"
