#!/usr/bin/env bash
# Measure all figures of kernels/README.md on one GPU: correctness first, then speed.
#
#   scripts/measure_gpu.sh [FOLDER]                 (default outputs/gpu)
#   DEVICE=cpu scripts/measure_gpu.sh [FOLDER]      rehearsal: the tiny backbone and a few steps; no figure counts
#
# It needs torch, triton, transformers and, from PyPI, hydra-core tokenizers safetensors rich matplotlib jinja2
# pytest hypothesis; liger-kernel is compared too if it is installed.
#
# FOLDER keeps a log of every stage, and a file .done for each finished one, which a second start skips. A failed stage
# does not stop the later ones; the end names the failures, with exit code 1. DEVICE=cuda, an H200: about
# 20 minutes expected, not measured.
set -uo pipefail

device=${DEVICE:-cuda}
if [[ $device == cuda ]]; then
    backbone=small
    tests=(tests/kernels tests/decoding/test_captured.py tests/decoding/test_devices.py)
    ops=(acceptance hyper_connection sink_attention linear_loss) rounds=7
    backbone_steps=1000 stock_steps=300 backbone_batch=16 length=512
    distill_steps=300 distill_batch=16 warm_up=20
    measured=() batches=1,8
else
    backbone=tiny
    tests=(tests/kernels/test_dispatch.py tests/decoding/test_devices.py)
    ops=(acceptance hyper_connection) rounds=1
    backbone_steps=6 stock_steps=4 backbone_batch=2 length=128
    distill_steps=6 distill_batch=2 warm_up=2
    measured=(evaluation.num_prompts=4 evaluation.timed_prompts=3 decoding.max_new_tokens=16) batches=1
fi

folder=${1:-outputs/gpu}
(($# == 0)) || shift
# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$root" || exit 2

"$PYTHON" - "$device" << 'END' || exit 2
import sys
from importlib.util import find_spec

needed = "torch transformers hydra tokenizers safetensors rich matplotlib jinja2 pytest hypothesis".split()
missing = [{"hydra": "hydra-core"}.get(name, name) for name in needed if find_spec(name) is None]
if missing:
    sys.exit(f"measure_gpu: not installed: {' '.join(missing)}; pip install {' '.join(missing)}")
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("measure_gpu: DEVICE=cuda: torch sees no GPU here; DEVICE=cpu rehearses without one")
END

failed=()
stage() { # NAME COMMAND...
    local name=$1 begun=$SECONDS
    if [[ -e $folder/$name.done ]]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name, $(date -u +%H:%M:%S): ${*:2}"
    if "${@:2}" 2>&1 | tee "$folder/$name.log"; then
        touch "$folder/$name.done"
    else
        failed+=("$name")
    fi
    echo "== $name took $((SECONDS - begun)) s"
}
run() { # NAME SETTING...
    "$PYTHON" -m mtptrain "${@:2}" "device=$device" "data.packages=[]" "data.sequence_length=$length" \
        "output_dir=$folder/$1"
}
train() { # NAME SETTING...
    run "$@" resume=auto
}
last_line() { # of a stage's log, its JSON
    [[ -e $folder/$1.done ]] && tail -n 1 "$folder/$1.log" > "$folder/$1.json"
}

workers=()
[[ $device == cpu ]] || ! "$PYTHON" -c 'import xdist' 2> /dev/null || workers=(-n 4)
stage tests "$PYTHON" -m pytest -q "${workers[@]}" "${tests[@]}"
for op in "${ops[@]}"; do
    stage "bench_$op" "$PYTHON" -m mtptrain.kernels.bench "$op" --device "$device" --rounds "$rounds"
    last_line "bench_$op"
done

stage backbone train backbone +recipe=backbone "backbone=$backbone" "train.steps=$backbone_steps" \
    "train.batch_size=$backbone_batch" "stock_head.steps=$stock_steps" "stock_head.batch_size=$backbone_batch"
trained=("backbone=$backbone" "backbone.path=$folder/backbone/backbone")
for kernels in triton reference; do
    export MTPTRAIN_KERNELS=$kernels
    stage "distill_$kernels" train "distill_$kernels" +recipe=distill "${trained[@]}" "train.steps=$distill_steps" \
        "train.batch_size=$distill_batch" train.log_every=1 evaluation.every=0 evaluate_at_end=false
    stage "evaluate_$kernels" run "evaluate_$kernels" +recipe=evaluate overwrite=true "${trained[@]}" \
        "evaluation.batch_sizes=[1]" "checkpoint=$folder/distill_$kernels" evaluation.include_stock=false \
        "${measured[@]}"
done
unset MTPTRAIN_KERNELS
stage engine "$PYTHON" scripts/benchmark_engine.py --device "$device" --batches "$batches" \
    --backbone "$folder/backbone/backbone" --head "$folder/distill_triton"
last_line engine

"$PYTHON" - "$folder" "$warm_up" << 'END' || failed+=(comparison)
import json
import statistics
import sys
from pathlib import Path

folder, warm_up = Path(sys.argv[1]), int(sys.argv[2])
names = ("triton", "reference")
runs, rows = {}, {}
for name in names:
    lines = (folder / f"distill_{name}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    runs[name] = [json.loads(line) for line in lines]
    late = runs[name][warm_up:]
    sizes = [b["tokens"] - a["tokens"] for a, b in zip(runs[name][warm_up - 1 :], late)]
    rates = [row["tokens_per_second"] / size for row, size in zip(late, sizes, strict=True)]
    length, certificate = "-", "-"
    if (path := folder / f"evaluate_{name}" / "evaluation.json").exists():
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        length = f"{evaluation['heads'][0]['replay']['4']['acceptance_length']:.3f}"
        certificate = "passed" if evaluation["certificate"]["passed"] else "FAILED"
    rows[name] = {
        "loss of step 1 of the draft, first": f"{runs[name][0]['loss/step_1']:.5f}",
        "the same, last": f"{runs[name][-1]['loss/step_1']:.5f}",
        "tokens/s, median": f"{statistics.median(row['tokens_per_second'] for row in late):.0f}",
        "steps/s, median": f"{statistics.median(rates):.2f}",
        "peak memory, GB": f"{runs[name][-1]['peak_memory_gb']:.2f}",
        "tokens a pass, K=4": length,
        "certificate": certificate,
    }
print(f"\n| distillation | {' | '.join(names)} |\n|---|---|---|")
for figure in rows[names[0]]:
    print(f"| {figure} | {' | '.join(rows[name][figure] for name in names)} |")
pairs = zip(*(runs[name] for name in names), strict=True)
apart = [abs(a["loss/step_1"] / b["loss/step_1"] - 1) for a, b in pairs]
print(f"\nrelative difference of that loss: {apart[0]:.1e} at first, median {statistics.median(apart):.1e}, largest")
print(f"{max(apart):.1e} of {len(apart)} steps; a unit in the last place of bf16 is {2**-8:.1e}")
sys.exit(any(row["certificate"] == "FAILED" for row in rows.values()))
END

if ((${#failed[@]})); then
    echo "measure_gpu: failed: ${failed[*]}; the logs are in $folder" >&2
    exit 1
fi
echo "measure_gpu: all done; logs and results are in $folder"
