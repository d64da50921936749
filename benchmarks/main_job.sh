#!/usr/bin/env bash
# The main job on CIFAR-10 as an image folder, with its baselines: what results/main_job.json holds.
#
#   bash benchmarks/main_job.sh DATA_DIR WEIGHTS
#
# DATA_DIR holds train/<class>/ and test/<class>/; WEIGHTS is a ResNet-56 file whose normalisation is the one below.
# Typed again it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
data_dir=$1 weights=$2

common=(--config configs/cifar10_resnet56.yaml --dataset imagefolder --data_dir "$data_dir")
given=(--weights "$weights" --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)

python search.py "${common[@]}" "${given[@]}" --output runs/c10
python search.py "${common[@]}" --weights runs/c10 --agent random --output runs/c10_random
python prune.py "${common[@]}" --weights runs/c10 --method uniform --output runs/c10_uniform
python prune.py "${common[@]}" --weights runs/c10 --method taylor --output runs/c10_taylor
for run in c10 c10_random c10_uniform c10_taylor; do
    python export.py "runs/$run"
done
python finetune.py runs/c10 --epochs 5 --finetune_lr 0.05 --finetune_schedule cosine --finetune_distillation 0
python -m benchmarks.summarise runs/c10 runs/c10_random runs/c10_uniform runs/c10_taylor \
    --output results/main_job.json
