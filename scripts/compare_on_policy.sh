#!/usr/bin/env bash
# Print the tables of docs/data.md: acceptance of heads that were distilled on the standard library and on the
# backbone's own texts, at equal numbers of training targets.
#
#   scripts/compare_on_policy.sh FOLDER [SETTING=VALUE ...]
#
# Three seeds each. FOLDER keeps texts, runs and comparisons; existing ones are continued or reused.
set -euo pipefail

folder=$1
shift
# shellcheck source=scripts/split_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/split_arguments.sh"

# The recipe of the tables, which was the default then.
recipe=(train.optimizer=adamw mtp.steps=3 train.batch_size=4)
# 240 steps of 4 rows of documents and 272 steps of 4 rows of own texts (224 of 256 tokens generated) have 0.244 M
# targets each; hardly any text is used twice.
off_steps=240 own_steps=272 texts=1088
seeds=(0 1 2)
quiet=(evaluation.every=0 evaluate_at_end=false train.keep_checkpoints=1 resume=auto)

train() { # NAME SETTING...
    "$PYTHON" -m mtptrain "${@:2}" "${recipe[@]}" "${quiet[@]}" "${settings[@]}" "output_dir=$folder/$1"
}
for seed in "${seeds[@]}"; do
    train "off_policy_seed$seed" +recipe=distill "train.steps=$off_steps" "seed=$seed"
    for heat in 1 0; do
        train "on_policy_t${heat}_seed$seed" +recipe=distill_on_policy "train.steps=$own_steps" "seed=$seed" \
            "on_policy.num_prompts=$texts" "on_policy.temperature=$heat" "on_policy.path=$folder/texts_t$heat"
    done
done

for heat in 0 1; do
    traces=()
    for seed in "${seeds[@]}"; do
        run=$folder/compare_t${heat}_seed$seed
        heads=("$folder/off_policy_seed$seed" "$folder/on_policy_t1_seed$seed" "$folder/on_policy_t0_seed$seed")
        [[ -f $run/comparison.json ]] || "$PYTHON" -m mtptrain +recipe=compare "decoding.temperature=$heat" \
            "checkpoints=[$(IFS=,; echo "${heads[*]}")]" evaluation.num_prompts=256 \
            "${traces[@]}" "${settings[@]}" "output_dir=$run"
        traces=("evaluation.traces=$folder/compare_t${heat}_seed${seeds[0]}/traces.jsonl")
    done
done

"$PYTHON" - "$folder" "${seeds[@]}" << 'END'
import json
import sys

folder, *seeds = sys.argv[1:]


def cells(figures, key, form):
    pair = " ({0} to {0})".format(form)
    return " | ".join(form.format(f[key]) + pair.format(*f["interval"]) for _, f in sorted(figures.items()))


for heat, name in ((0, "greedy"), (1, "sampled at temperature 1")):
    print(f"\nDecoding: {name}\n\n| trained on | K=1 | K=2 | K=3 | K=4 |\n|---|---|---|---|---|")
    for seed in seeds:
        with open(f"{folder}/compare_t{heat}_seed{seed}/comparison.json", encoding="utf-8") as file:
            result = json.load(file)
        print(f"| standard library, seed {seed} | {cells(result['heads'][0]['replay'], 'acceptance_length', '{:.2f}')} |")
        for own, comparison in zip((1, 0), result["comparisons"], strict=True):
            print(f"| own texts at T={own}, seed {seed} | {cells(comparison['gain'], 'gain', '{:+.3f}')} |")
END
