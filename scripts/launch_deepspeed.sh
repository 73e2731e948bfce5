#!/usr/bin/env bash
# Start a run in several processes with DeepSpeed's launcher, on this machine or on the machines of a hostfile.
#
#   scripts/launch_deepspeed.sh --num_accelerators 2 +recipe=distill engine=zero2
#   scripts/launch_deepspeed.sh --hostfile hosts +recipe=distill engine=zero2 output_dir=/shared/run
#
# A hostfile has a line a machine, `NAME slots=PROCESSES`; every machine must be reached by ssh without a password and
# see this checkout and the output folder under the same paths. Arguments before the first setting (NAME=VALUE or a
# recipe's name) go to deepspeed.
set -euo pipefail

# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"

for i in "${!options[@]}"; do
    [[ ${options[i]} == --hostfile ]] || continue
    hosts=${options[i + 1]:?--hostfile needs a file}
    if [[ ! -r $hosts ]]; then # DeepSpeed would use this machine alone
        echo "launch_deepspeed: --hostfile $hosts: cannot be read; give a file of lines NAME slots=PROCESSES" >&2
        exit 2
    fi
    right='^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*(#.*)?$'
    if wrong=$(grep -nvE "$right" "$hosts"); then
        echo "launch_deepspeed: --hostfile $hosts: line ${wrong%%$'\n'*} is not NAME slots=PROCESSES" >&2
        exit 2
    fi
done
# --no_local_rank: otherwise DeepSpeed adds --local_rank, which mtptrain does not accept.
exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --no_local_rank --module mtptrain "${settings[@]}"
