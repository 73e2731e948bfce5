#!/usr/bin/env bash
# Print the table of docs/training.md: loss, memory and speed of every engine and placement of the backbone.
#
#   scripts/measure_engines.sh [--nproc-per-node 2] [SETTING=VALUE ...]
#
# 20 steps of +recipe=distill each. Speed is the mean of the last ten, memory the largest peak of any process.
set -euo pipefail

# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"
((${#options[@]})) || options=(--nproc-per-node 2)

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
run=(+recipe=distill train.steps=20 train.log_every=10 evaluate_at_end=false evaluation.every=0)
run+=(train.optimizer=adamw) # which every engine has
run+=("${settings[@]}")

echo "| engine | placement | processes | loss, steps 11-20 (k=1) | peak memory a process | tokens/s |"
echo "|---|---|---|---|---|---|"
row() { # ENGINE PLACEMENT PROCESSES FOLDER
    "$PYTHON" -c 'import json, sys
row = json.loads(open(sys.argv[4] + "/metrics.jsonl").readlines()[-1])
figures = row["loss/step_1"], row["peak_memory_gb"], row["tokens_per_second"]
print("| {} | {} | {} | {:.7f} | {:.2f} GB | {:.0f} |".format(*sys.argv[1:4], *figures))' "$@"
}
"$PYTHON" -m mtptrain "${run[@]}" "output_dir=$results/alone" 2> "$results/log"
row single replicate 1 "$results/alone"
for engine in single zero1 zero2 zero3; do
    for placement in replicate zero3 expert_parallel; do
        folder=$results/$engine-$placement
        "$root/scripts/launch_torchrun.sh" "${options[@]}" "${run[@]}" "engine=$engine" \
            "backbone.placement=$placement" "output_dir=$folder" 2> "$results/log" || { cat "$results/log" >&2; exit 1; }
        row "$engine" "$placement" "${options[-1]}" "$folder"
    done
done
