#!/usr/bin/env bash
# Take a slice of V4-Flash with its true widths through every step, and print the memory and the seconds of each.
#
#   scripts/true_shapes.sh [FOLDER]                 (default outputs/true_shapes)
#   DEVICE=cuda scripts/true_shapes.sh [FOLDER]     on one GPU; without DEVICE on the CPU
#
# The slice has every width of V4-Flash and its 129,280 words, but 3 layers, 8 experts and random weights: 2.5 B
# parameters, 3 GB on disk. It finds what a small backbone cannot: a tensor of [tokens, words], a copy of the experts.
# Needs 16 GB of memory and 12 GB of disk; docs/training.md has the time. FOLDER keeps a log of every step and a file
# .row for each finished one, which a second start skips. A failed step ends the script with exit code 1.
set -euo pipefail

device=${DEVICE:-cpu}
folder=${1:-outputs/true_shapes}
(($# == 0)) || shift
# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$root"
slice=$folder/release

step() { # NAME COMMAND...
    local name=$1
    if [[ ! -e $folder/$name.row ]]; then
        echo "== $name, $(date -u +%H:%M:%S): ${*:2}"
        "$PYTHON" scripts/measure_command.py "$folder/$name.row" "${@:2}" 2>&1 | tee "$folder/$name.log"
    fi
}
run() { # NAME SETTING...
    step "$1" "$PYTHON" -m mtptrain "+recipe=$1" "${@:2}" "output_dir=$folder/$1" "device=$device"
}

step mini_release "$PYTHON" -m mtptrain +recipe=mini_release release.random=true backbone=v4_flash \
    'backbone.shape.layer_types=[sliding,csa,hca]' backbone.shape.num_hash_layers=1 backbone.shape.num_experts=8 \
    "output_dir=$slice"
step load "$PYTHON" scripts/measure_load.py "backbone.path=$slice" "device=$device"

text=(data=stdlib data.sequence_length=256)
measured=(evaluation.num_prompts=1 evaluation.prompt_tokens=16 decoding.max_new_tokens=4)
run collect "backbone.path=$slice" "${text[@]}" data.max_tokens=4096 resume=auto
run distill "backbone.path=$slice" data=streams "data.path=$folder/collect" data.sequence_length=256 train.steps=2 \
    train.batch_size=1 train.recompute=true evaluate_at_end=false resume=auto
run evaluate "backbone.path=$slice" checkpoint="$folder/distill" "${measured[@]}" decoding.draft_length=1 \
    evaluation.heldout_sequences=1 evaluation.timed_prompts=1 'evaluation.batch_sizes=[1]' data.max_tokens=8192 \
    overwrite=true
run doctor "backbone.path=$slice" checkpoint="$folder/distill" evaluation.num_prompts=2 evaluation.prompt_tokens=16 \
    decoding.max_new_tokens=4 decoding.draft_length=1 data.max_tokens=8192 overwrite=true
run export "backbone.path=$slice" checkpoint="$folder/distill" target=vllm evaluation.num_prompts=1 \
    evaluation.prompt_tokens=16 decoding.max_new_tokens=2 decoding.draft_length=1 data.max_tokens=8192

printf '\n| step | peak host memory | GPU memory in use, at most | CPU seconds | seconds |\n|---|---|---|---|---|\n'
for name in mini_release load collect distill evaluate doctor export; do
    echo "| \`$name\` | $(cat "$folder/$name.row") |"
done
