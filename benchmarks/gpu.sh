#!/usr/bin/env bash
# All that is measured on a GPU, on a machine that has only torch and torchvision: bash benchmarks/gpu.sh [RESULTS]
# Needs the folder travel/ that benchmarks/pack.sh makes. Writes RESULTS (default: results/gpu): the GPU tests, a complete
# search of 900 episodes over three targets, the speed of fine-tuning, what it recovers at macs 0.5 and 0.3 (40 epochs of
# every model, then 400 of the found, the uniform and the dense one), the speed of scoring, the growth of a search's cost.
# What is there already is skipped, and a training that was broken off goes on after its last epoch: a second call
# continues the first where RESULTS lies as that has left it. POLICIES, EPISODES, SHORT_EPOCHS and EPOCHS make it smaller.
# RESULTS/run is the search; `python3 finetune.py RESULTS/run` trains all it found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-results/gpu}
mkdir -p "$results"
if [ ! -d travel/wheels ]; then
    echo "error: travel/ is not there; make it with benchmarks/pack.sh on a machine with a network, and bring it along" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$work/packages" travel/wheels/*.whl
export PYTHONPATH=$work/packages PYTHONUNBUFFERED=1
if [ ! -d travel/images ]; then # at a place that later calls find again: runs name it
    rm -rf travel/unpacked
    python3 -m tarfile -e travel/images.tar travel/unpacked
    mv travel/unpacked travel/images
fi
train=$(find travel/images -maxdepth 3 -type d -name train)
if [ -z "$train" ]; then
    echo "error: travel/images.tar holds no folder named train" >&2
    exit 2
fi
settings=(--config configs/cifar10_resnet56.yaml --dataset imagefolder --data_dir "$(dirname "$train")"
    --weights travel/weights.pt --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --episodes "${EPISODES:-900}")
failed=0

attempt() { # COMMAND...: what fails is remembered, and the rest goes on
    "$@" || failed=1
}

step() { # NAME COMMAND...: runs the command, which writes RESULTS/NAME.json, unless that is there
    if [ ! -f "$results/$1.json" ] && ! "${@:2}" 2>&1 | tee "$results/$1.log"; then
        failed=1
    fi
}

if ! python3 -m pytest -q -m gpu tests 2>&1 | tee "$results/tests.log"; then
    failed=1
fi
if [ -d "$results/run" ]; then # a search that was broken off goes on; it is not timed
    attempt python3 search.py "${settings[@]}" --output "$results/run"
else
    step whole_search python3 -m benchmarks.whole_search --result "$results/whole_search.json" "${settings[@]}" \
        --output "$results/run"
fi
if [ -d "$results/run/policies" ]; then
    attempt python3 export.py "$results/run"
    step finetuning_speed python3 -m benchmarks.finetuning_speed "$results/run" --images 40000 --at_once 4 --compiled \
        --result "$results/finetuning_speed.json"
    attempt python3 prune.py "${settings[@]}" --method uniform --output "$results/uniform"
    attempt python3 export.py "$results/uniform"
    recovery=(python3 -m benchmarks.recovery "$results/run" --uniform "$results/uniform" --seeds 0)
    step recovery_short "${recovery[@]}" --epochs "${SHORT_EPOCHS:-40}" --work "$results/recovery_short" \
        --result "$results/recovery_short.json"
    step recovery "${recovery[@]}" --models ours uniform dense --epochs "${EPOCHS:-400}" --work "$results/recovery" \
        --result "$results/recovery.json"
fi
step search_speed python3 -m benchmarks.search_speed --result "$results/search_speed.json" "${settings[@]}" \
    --policies "${POLICIES:-100}"
step scaling python3 -m benchmarks.scaling --result "$results/scaling.json" --figure "$results/scaling.svg"
exit "$failed"
