#!/usr/bin/env bash
# Record the results that the tests of tables, pages and plans read (tests/evaluation/recorded.py): real runs of the tiny
# preset, small enough for a few minutes of an idle CPU. Busy machines are recorded as such.
#
#   scripts/record_results.sh FOLDER      keeps what it finds in FOLDER, so it can be interrupted
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
export OMP_NUM_THREADS=1
run() { python -m mtptrain "$@"; }
record() { # NAME TARGET RESULT SETTING...: run once, and copy the result, without FOLDER's path, to where tests read it
    local name=$1 target=$2 result=$3
    shift 3
    if [ ! -e "$out/$name/$result" ]; then run "$@" output_dir="$out/$name"; fi
    sed "s|$out/|outputs/|g" "$out/$name/$result" > "tests/evaluation/$target"
}

cat > "$out/code.jsonl" <<'END'
{"prompt": "def factorial(n):\n    if n == 0:\n        return 1\n"}
{"prompt": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"}
{"prompt": "import os\n\nfor name in sorted(os.listdir('.')):\n    if name.endswith('.py'):\n"}
{"prompt": "with open('table.csv') as file:\n    rows = [line.split(',') for line in file]\n"}
END
cat > "$out/prose.jsonl" <<'END'
{"prompt": "Return the number of items in the list. If the list is empty,"}
{"prompt": "This module provides functions to read and write files. The most important one"}
{"prompt": "The garbage collector frees objects that can no longer be reached, which means that"}
{"prompt": "An error is raised if the argument is negative. Otherwise the result"}
END

small=(evaluation.heldout_sequences=4 decoding.max_new_tokens=24 decoding.draft_length=3)
timed=(evaluation.num_prompts=8 evaluation.timed_prompts=3 "${small[@]}")
prompts="prompts=[$out/code.jsonl,$out/prose.jsonl]"
if [ ! -e "$out/distill/checkpoints/step_00000060" ]; then
    run +recipe=distill train.steps=60 evaluation.every=30 evaluate_at_end=false resume=auto output_dir="$out/distill"
fi
cp "$out/distill/metrics.jsonl" tests/evaluation/data/metrics.jsonl
head="checkpoint=$out/distill"
record greedy report/data/greedy.json evaluation.json +recipe=evaluate "$head" "$prompts" "${timed[@]}" \
    "evaluation.batch_sizes=[1,2]"
record sampled report/data/sampled.json evaluation.json +recipe=evaluate "$head" "$prompts" "${timed[@]}" \
    "evaluation.batch_sizes=[1]" decoding.temperature=1.0
record single report/data/single.json evaluation.json +recipe=evaluate "$head" evaluation.include_stock=false \
    evaluation.num_prompts=4 evaluation.timed_prompts=2 evaluation.heldout_sequences=2 decoding.max_new_tokens=16 \
    decoding.draft_length=8 "evaluation.batch_sizes=[1]"
record compare data/comparison.json comparison.json +recipe=compare "checkpoints=[stock,$out/distill]" "$prompts" \
    evaluation.num_prompts=8 "${small[@]}"
record doctor data/doctor.json doctor.json +recipe=doctor "$head" evaluation.num_prompts=4 decoding.max_new_tokens=24 \
    decoding.draft_length=3 || [ $? -eq 3 ] # a head that the doctor finds unhealthy is a result too
