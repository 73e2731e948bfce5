#!/usr/bin/env bash
# Measure the figures of kernels/README.md on one GPU, in parts that fit a short visit.
#
#   scripts/measure_gpu.sh [FOLDER] [PART...]              (default outputs/gpu, all parts in order)
#   DEVICE=cpu scripts/measure_gpu.sh [FOLDER] [PART...]   rehearsal: small sizes and few steps; no figure counts
#
#   0  do all kernels run and agree with their definitions: sizes of a test and of V4-Flash, new memory filled with NaN
#   1  linear_loss, K = 1 and 3, beside its bare products
#   2  a verify pass and a draft on random weights, eager and recorded: `small`, then V4-Flash's widths with four layers
#   3  attention, norm and rotation, and hyper-connections beside their definitions; the acceptance kernels
#   4  forty training steps of `small` with the kernels on and off: losses, tokens/s, memory
#   5  peers: every op beside torch.compile and, if installed, Liger
#   6  `small` trained, a head distilled on it and evaluated, and its engine timed
#
# Parts 0 to 3 need torch, triton, transformers, tokenizers, safetensors, rich and pytest with hypothesis; the others
# also hydra-core, matplotlib and jinja2.
#
# A part that fails does not stop the others, and every command has a time limit. FOLDER gets a log and a JSON file for
# each command, and a file .done for each finished one, which a second start skips. The end names the failures, with exit
# code 1. The limits are for an H200 and were not tried; kernels that compile for the first time take most of the first
# parts, a few seconds each, and are kept for a second start.
set -uo pipefail

device=${DEVICE:-cuda}
folder=${1:-outputs/gpu}
(($# == 0)) || shift
parts=("$@")
(($#)) || parts=(0 1 2 3 4 5 6)
for part in "${parts[@]}"; do
    if [[ ! $part =~ ^[0-6]$ ]]; then
        echo "measure_gpu: part $part does not exist; give numbers from 0 to 6" >&2
        exit 2
    fi
done
set --
# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$root" || exit 2

if [[ $device == cuda ]]; then
    sizes=(cpu cuda) rounds=7 tests=(tests/kernels)
    shape=small flash=(--random v4_flash --layers 4 --experts 16) longest=4
    text=("data.packages=[]" data.sequence_length=512) batch=16 few=40 steps=1000 stock=300 distil=300
    measured=() batches=1,8
else
    sizes=(cpu) rounds=1 tests=(tests/kernels/test_dispatch.py)
    shape=tiny flash=(--random tiny --layers 2) longest=1
    text=("data.packages=[]" data.sequence_length=128 data.max_documents=200) batch=2 few=3 steps=4 stock=2 distil=3
    measured=(evaluation.num_prompts=4 evaluation.timed_prompts=3 decoding.max_new_tokens=16) batches=1
fi

"$PYTHON" - "$device" "${parts[@]}" << 'END' || exit 2
import sys
from importlib.util import find_spec

needed = "torch transformers tokenizers safetensors rich pytest hypothesis".split()
if any(int(part) > 3 for part in sys.argv[2:]):
    needed += ["hydra", "matplotlib", "jinja2"]
missing = [{"hydra": "hydra-core"}.get(name, name) for name in needed if find_spec(name) is None]
if missing:
    sys.exit(f"measure_gpu: not installed: {' '.join(missing)}; pip install {' '.join(missing)}")
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("measure_gpu: DEVICE=cuda: torch sees no GPU here; DEVICE=cpu rehearses without one")
END

failed=()
run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS status
    if [[ -e $folder/$name.done ]]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name, $(date -u +%H:%M:%S), at most $limit s: ${*:3}"
    timeout --kill-after=10 "$limit" "${@:3}" 2>&1 | tee "$folder/$name.log"
    status=${PIPESTATUS[0]}
    if ((status == 0)); then
        touch "$folder/$name.done"
        if [[ $(tail -n 1 "$folder/$name.log") == "{"* ]]; then
            tail -n 1 "$folder/$name.log" > "$folder/$name.json"
        fi
    else
        ((status == 124 || status == 137)) && echo "== $name: ended after its limit of $limit s"
        failed+=("$name")
    fi
    echo "== $name took $((SECONDS - begun)) s"
}
bench() { # NAME SECONDS ARGUMENT...
    run "$1" "$2" "$PYTHON" -m mtptrain.kernels.bench --device "$device" "${@:3}"
}
engine() { # NAME SECONDS ARGUMENT...
    run "$1" "$2" "$PYTHON" scripts/benchmark_engine.py --device "$device" "${@:3}"
}
recipe() { # NAME SECONDS SETTING...
    run "$1" "$2" "$PYTHON" -m mtptrain "${@:3}" "device=$device" "${text[@]}" "output_dir=$folder/$1"
}

part_0() {
    local size op
    for size in "${sizes[@]}"; do
        for op in acceptance hyper_connection linear_loss norm_rotate sink_attention; do
            bench "0_${op}_$size" 120 "$op" --sizes "$size" --rounds 0 --no-peers
        done
    done
    local workers=()
    [[ $device == cpu ]] || ! "$PYTHON" -c 'import xdist' 2> /dev/null || workers=(-n 8)
    run 0_tests 300 "$PYTHON" -m pytest -q "${workers[@]}" "${tests[@]}"
}
part_1() {
    bench 1_linear_loss 120 linear_loss --no-peers --rounds "$rounds"
}
part_2() {
    engine "2_$shape" 300 --random "$shape" --draft-length "$longest"
    engine 2_flash 300 "${flash[@]}" --draft-length "$longest"
}
part_3() {
    local op
    for op in sink_attention norm_rotate hyper_connection acceptance; do
        bench "3_$op" 90 "$op" --no-peers --rounds "$rounds"
    done
}
part_4() {
    local kernels
    recipe 4_backbone 240 +recipe=backbone "backbone=$shape" train.steps=2 stock_head.steps=2 "train.batch_size=$batch" \
        "stock_head.batch_size=$batch" resume=auto
    for kernels in triton reference; do
        MTPTRAIN_KERNELS=$kernels distill "4_$kernels" 120 4_backbone "$few"
    done
    run 4_comparison 20 "$PYTHON" scripts/compare_kernels.py "$folder/4_triton" "$folder/4_reference"
}
distill() { # NAME SECONDS BACKBONE STEPS
    recipe "$1" "$2" +recipe=distill "backbone=$shape" "backbone.path=$folder/$3/backbone" "train.steps=$4" \
        "train.batch_size=$batch" train.log_every=1 evaluation.every=0 evaluate_at_end=false resume=auto
}
part_5() {
    local op
    for op in linear_loss sink_attention norm_rotate hyper_connection acceptance; do
        bench "5_$op" 300 "$op" --rounds "$rounds"
    done
}
part_6() {
    recipe 6_backbone 1200 +recipe=backbone "backbone=$shape" "train.steps=$steps" "stock_head.steps=$stock" \
        "train.batch_size=$batch" "stock_head.batch_size=$batch" resume=auto
    distill 6_distill 600 6_backbone "$distil"
    recipe 6_evaluate 600 +recipe=evaluate "backbone=$shape" "backbone.path=$folder/6_backbone/backbone" \
        "checkpoint=$folder/6_distill" overwrite=true "${measured[@]}"
    engine 6_engine 300 --backbone "$folder/6_backbone/backbone" --head "$folder/6_distill" --batches "$batches"
}

for part in "${parts[@]}"; do
    "part_$part"
done
if ((${#failed[@]})); then
    echo "measure_gpu: failed: ${failed[*]}; the logs are in $folder" >&2
    exit 1
fi
echo "measure_gpu: all done; logs and results are in $folder"
