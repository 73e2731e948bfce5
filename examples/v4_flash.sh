#!/usr/bin/env bash
# Walk through docs/v4_flash.md on a CPU, in one process: a miniature of the release takes the place of V4-Flash.
#
#   examples/v4_flash.sh [FOLDER]        (default outputs/v4_flash; it must not exist)
#
# The page has the command for 8 GPUs of every step. The differences: the page downloads the weights, names a text, starts
# every step with scripts/launch_torchrun.sh, and trains with +recipe=flash_1node, which shares out the experts. The
# settings in `small` keep the steps short.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-outputs/v4_flash}
small=(evaluation.num_prompts=16 decoding.max_new_tokens=32)
mtptrain() {
    echo "== mtptrain $*"
    "${PYTHON:-python}" -m mtptrain "$@"
}

# Prepare: a small backbone and its head in the release's format, with FP8 matrices and FP4 experts.
mtptrain +recipe=mini_release output_dir="$folder/flash"

# Plan the real thing: memory and hours of a node of 8 H200.
mtptrain +recipe=flash_1node task=plan output_dir="$folder/plan"

# Train the released head on the backbone's own distribution.
mtptrain +recipe=distill backbone.path="$folder/flash" train.steps=40 evaluation.every=0 evaluate_at_end=false output_dir="$folder/run"

# Measure it beside the released head, by domain; exit code 3 if the certificate fails.
mtptrain +recipe=evaluate backbone.path="$folder/flash" checkpoint="$folder/run" prompts=examples/prompts data.chat_template=examples/template.jinja evaluation.batch_sizes=[1] output_dir="$folder/measured" "${small[@]}"

# Diagnose it: every tensor, and the usual wrong wirings.
mtptrain +recipe=doctor backbone.path="$folder/flash" checkpoint="$folder/run" output_dir="$folder/diagnosed" "${small[@]}"

# Export it. The command for the server is printed; vLLM has no kernels for a model this small, so it is not started.
mtptrain +recipe=export backbone.path="$folder/flash" checkpoint="$folder/run" target=vllm output_dir="$folder/served" "${small[@]}"
