#!/usr/bin/env bash
# Start a run in several processes with accelerate as a plain launcher: engine=, not accelerate, decides about sharding.
#
#   scripts/launch_accelerate.sh --num_processes 2 +recipe=distill engine=zero2
#   scripts/launch_accelerate.sh --config_file cluster.yaml +recipe=distill engine=zero2 output_dir=/shared/run
#
# Arguments before the first setting (NAME=VALUE or a recipe's name) go to `accelerate launch`.
set -euo pipefail

# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"

if [[ " ${options[*]} " != *" --config_file"* ]]; then # else accelerate prompts, or reads its default file
    options=(--num_machines 1 --mixed_precision no --dynamo_backend no "${options[@]}")
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then # accelerate's multi-process mode on a CPU needs MPI
        options=(--use_deepspeed --zero_stage 0 "${options[@]}")
    else
        options=(--multi_gpu "${options[@]}")
    fi
fi
exec "$PYTHON" -m accelerate.commands.launch "${options[@]}" --module mtptrain "${settings[@]}"
