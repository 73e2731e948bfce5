"""The commands that serve an exported folder."""

from __future__ import annotations

from pathlib import Path

from mtptrain.config import ExportForm, ExportTarget
from mtptrain.export.servers import SERVERS


def serve_command(
    target: ExportTarget, form: ExportForm, folder: Path, source: Path, draft_length: int, samples: bool = True
) -> str:
    """Return the command that starts the target with a folder.

    Args:
        target: the server.
        form: form of the folder.
        folder: the export.
        source: the model's folder, which serves a draft folder's model.
        draft_length: drafted tokens a pass, K.
        samples: whether drafts are sampled at a temperature above 0; llama.cpp has no switch for it.
    """
    if target is ExportTarget.sglang:
        switch = f" \\\n    {SERVERS[target].switch}" if samples else ""
        return (
            f"python -m sglang.launch_server --model-path {folder} --speculative-algorithm EAGLE \\\n"
            f"    --speculative-num-steps {draft_length} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {draft_length + 1}{switch}"
        )
    if target is ExportTarget.llama_cpp:
        return (
            f"python convert_hf_to_gguf.py {folder} --outfile model.gguf\n"
            f"python convert_hf_to_gguf.py {folder} --mtp --outfile head.gguf\n"
            f"llama-server --model model.gguf --model-draft head.gguf --spec-type draft-mtp \\\n"
            f"    --spec-draft-n-max {draft_length}"
        )
    if target is ExportTarget.hf:
        return f"python -m mtptrain +recipe=evaluate checkpoint=stock backbone.path={folder}"
    draft = f'"model": "{folder}", ' if form is ExportForm.draft else ""
    switch = f", {SERVERS[target].switch}" if samples else ""
    settings = f'{{"method": "mtp", {draft}"num_speculative_tokens": {draft_length}{switch}}}'
    return f"vllm serve {source if form is ExportForm.draft else folder} --speculative-config '{settings}'"
