#!/usr/bin/env bash
# Start a run in several processes with torchrun: on this machine, on several, or on several "nodes" on this machine.
#
#   scripts/launch_torchrun.sh --nproc-per-node 2 +recipe=distill engine=zero3 backbone.placement=zero3
#   scripts/launch_torchrun.sh --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 +recipe=distill ...   (on each)
#   scripts/launch_torchrun.sh --local-nodes 2 --nproc-per-node 1 +recipe=distill ...
#
# Arguments before the first setting (NAME=VALUE or a recipe's name) go to torchrun, except --local-nodes N, which
# starts N agents that meet on 127.0.0.1. After SIGTERM, SIGUSR1 or Ctrl-C every process of this machine saves, and this script
# ends with code 75, after Ctrl-C with 130; a second Ctrl-C ends everything at once.
set -euo pipefail

# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"

local_nodes=1
for i in "${!options[@]}"; do
    if [[ ${options[i]:-} == --local-nodes ]]; then
        local_nodes=${options[i + 1]:?--local-nodes needs a number}
        unset "options[i]" "options[i + 1]"
    fi
done

rendezvous=(--standalone)
if ((local_nodes > 1)); then
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    rendezvous=(--nnodes "$local_nodes" --rdzv-backend c10d --rdzv-endpoint "127.0.0.1:$port" --local-addr 127.0.0.1)
elif [[ " ${options[*]} " == *" --nnodes"* ]]; then
    rendezvous=(--rdzv-backend c10d)
fi

# Without SIGINT: torchrun would give its workers 30 seconds after Ctrl-C. Bash lets its background jobs ignore it.
if [[ " ${options[*]} " != *" --signals"[-_]"to"[-_]"handle"* ]]; then
    rendezvous+=(--signals-to-handle "SIGTERM,SIGHUP,SIGQUIT")
fi

# torchrun waits for ever for a rendezvous whose host is gone. After a success it waits at most 300 seconds for others.
patience=330 # seconds
watch_over() { # AGENT: end it if it outlives its processes
    local idle=0 begun=
    while kill -0 "$1" 2> /dev/null; do
        if pgrep -P "$1" -f mtptrain > /dev/null; then
            begun=yes idle=0
        elif [[ -n $begun ]] && ((idle += 1, idle > patience)); then
            echo "launch_torchrun: torchrun did not end although its processes have; it is killed" >&2
            kill -KILL "$1"
        fi
        sleep 1 &> /dev/null
    done
}

agents=() watchers=()
for ((node = 0; node < local_nodes; node++)); do
    "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" "${options[@]}" -m mtptrain "${settings[@]}" &
    agents+=($!)
    if [[ " ${options[*]} " != *" --max"[-_]"restarts"* ]]; then
        watch_over "$!" &
        watchers+=($!)
    fi
done

leaving=
# shellcheck disable=SC2329 # the trap calls it
leave() { # SIGNAL
    if [[ $1 == INT && -n $leaving ]]; then
        for agent in "${agents[@]}"; do
            pkill -KILL -P "$agent" || true
        done
        exit 130
    elif [[ $1 == INT ]]; then
        echo "launch_torchrun: the run ends after this step, which is saved; Ctrl-C again ends it at once" >&2
    fi
    leaving=$1
    for agent in "${agents[@]}"; do
        pkill -USR1 -P "$agent" || true # its workers; a signal to torchrun would give them no time to save
    done
}
trap 'leave TERM' TERM USR1
trap 'leave INT' INT
trap 'kill "${agents[@]}" "${watchers[@]}" 2> /dev/null || true' EXIT

failed=0 statuses=()
for agent in "${agents[@]}"; do
    status=0
    while wait "$agent" || status=$?; kill -0 "$agent" 2> /dev/null; do
        status=0 # a signal ended the wait, not the agent
    done
    statuses+=("$status")
    ((failed)) || failed=$status
done
if ((failed)) && [[ $leaving == INT ]]; then
    exit 130
elif ((failed)) && [[ -n $leaving ]]; then
    exit 75
elif ((failed)); then
    echo "launch_torchrun: a node failed and the job is over (node by node, exit status ${statuses[*]}; 137 is a kill);" \
        "start it again with the same output_dir to continue" >&2
fi
exit "$failed"
