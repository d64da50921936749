#!/usr/bin/env bash
# All that is measured on a GPU, on a machine that has only torch and torchvision: bash benchmarks/gpu.sh [RESULTS]
# Needs the folder travel/ that benchmarks/pack.sh makes. Writes RESULTS (default: results/gpu): the GPU tests, the speed
# of scoring, a complete search of 900 episodes over three targets, the growth of its cost. What is there already is
# skipped, so a second call goes on where a first one was cut off. POLICIES and EPISODES make it smaller.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-results/gpu}
mkdir -p "$results"
work=${WORK:-$(mktemp -d)}
if [ ! -d "$work/packages" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$work/packages" travel/wheels/*.whl
fi
export PYTHONPATH=$work/packages PYTHONUNBUFFERED=1
if [ ! -d "$work/images" ]; then
    mkdir "$work/images"
    tar xf travel/images.* -C "$work/images"
fi
images=$(dirname "$(find "$work/images" -maxdepth 3 -type d -name train | head -n 1)")
settings=(--config configs/cifar10_resnet56.yaml --dataset imagefolder --data_dir "$images" --weights travel/weights.*
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --episodes "${EPISODES:-900}")

step() { # NAME COMMAND...: runs the command, which writes RESULTS/NAME.json, unless that is there
    if [ ! -f "$results/$1.json" ]; then
        "${@:2}" 2>&1 | tee "$results/$1.log"
    fi
}
if [ ! -f "$results/tests.log" ]; then
    python3 -m pytest -q -m gpu tests 2>&1 | tee "$results/tests.part" && mv "$results/tests.part" "$results/tests.log"
fi
step whole_search python3 -m benchmarks.whole_search --result "$results/whole_search.json" "${settings[@]}" --output "$work/run"
step search_speed python3 -m benchmarks.search_speed --result "$results/search_speed.json" "${settings[@]}" --policies "${POLICIES:-100}"
step scaling python3 -m benchmarks.scaling --result "$results/scaling.json" --figure "$results/scaling.svg"
