# shellcheck shell=bash
# Sourced by the launchers: choose PYTHON, and split the arguments into the launcher's `options` and the run's
# `settings`, which begin with the first NAME=VALUE or +NAME=VALUE, or with the name of a recipe if no +recipe= follows.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$root/.venv/bin/python}
[[ -x $PYTHON ]] || PYTHON=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ! -e /dev/nvidiactl ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

options=()
while (($#)) && [[ $1 != +*=* && ($1 == -* || $1 != *=*) ]]; do
    if [[ " $*" != *" +recipe="* && -f $root/conf/recipe/$1.yaml ]]; then
        set -- "+recipe=$1" "${@:2}"
        break
    fi
    options+=("$1")
    shift
done
settings=("$@")
# Continue an interrupted training or collection; a result is never continued.
results=' \+recipe=(compare|doctor|evaluate|export|mini_release|plan|report) '
words=" ${settings[*]} "
if [[ $words == *" output_dir="* && $words != *" resume="* && ! $words =~ $results ]]; then
    settings+=(resume=auto)
fi
