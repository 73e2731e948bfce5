#!/usr/bin/env bash
# Kill a run of two processes with SIGKILL at random moments, let it finish, and compare its heads, bit by bit, with the
# heads of an undisturbed run. The run writes a checkpoint every step, so many kills interrupt one.
#
#   scripts/kill_and_resume.sh [KILLS] [SETTING=VALUE ...]
set -euo pipefail

kills=${1:-5}
(($# == 0)) || shift
# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"

descendants() { # of a process: torchrun's workers have sessions of their own
    local child
    for child in $(pgrep -P "$1"); do
        descendants "$child"
        echo "$child"
    done
}

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
run=(--nproc-per-node 2 +recipe=distill train.steps=40 train.log_every=1 train.checkpoint_every=1)
run+=(evaluate_at_end=false evaluation.every=0 "${settings[@]}")

"$root/scripts/launch_torchrun.sh" "${run[@]}" "output_dir=$results/whole" 2> "$results/log"
for ((kill = 1; kill <= kills; kill++)); do
    "$root/scripts/launch_torchrun.sh" "${run[@]}" "output_dir=$results/killed" 2> "$results/log" &
    launcher=$!
    while ! grep -q "^distill " "$results/log" && kill -0 "$launcher" 2> /dev/null; do
        sleep 0.1
    done
    sleep "$((RANDOM % 2)).$((RANDOM % 10))" # seconds, on top of the steps so far
    mapfile -t processes < <(descendants "$launcher")
    kill -KILL "$launcher" "${processes[@]}" 2> /dev/null || true
    wait "$launcher" 2> /dev/null || true
    mapfile -t checkpoints < <(find "$results/killed/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' 2> /dev/null | sort)
    echo "kill $kill: whole checkpoints ${checkpoints[*]:-none}"
done
"$root/scripts/launch_torchrun.sh" "${run[@]}" "output_dir=$results/killed" 2> "$results/log"
cmp "$results"/{whole,killed}/checkpoints/step_00000040/module.safetensors
echo "after $kills kills the heads are those of an undisturbed run, bit by bit"
