#!/usr/bin/env bash
# Every method beside CACP at macs 0.5, before fine-tuning and after an equal short one: results/methods.json.
#
#   bash benchmarks/methods.sh DATA_DIR WEIGHTS [MODEL]
#
# DATA_DIR holds train/<class>/ and test/<class>/; WEIGHTS is a file of MODEL (resnet20) whose normalisation is the one
# below. Typed again it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
data_dir=$1 weights=$2 model=${3:-resnet20}

common=(--config configs/cifar10_resnet56.yaml --model "$model" --dataset imagefolder --data_dir "$data_dir" --targets 0.5)
given=(--weights "$weights" --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)
runs=runs/methods_$model

prune() { # NAME METHOD [OPTION ...]
    python prune.py "${common[@]}" --weights "$runs/cacp" --output "$runs/$1" --method "${@:2}"
}

python search.py "${common[@]}" "${given[@]}" --episodes 300 --output "$runs/cacp"
prune uniform uniform
prune taylor taylor
prune sensitivity sensitivity --episodes 300
prune gfi_ap gfi_ap
prune caie caie
prune caie_unaware caie --constraint_aware false
prune sfp sfp --epochs 5 --method_lr 0.01
prune fpgm fpgm --epochs 5 --method_lr 0.01
prune magnitude magnitude
names=(cacp uniform taylor sensitivity gfi_ap caie caie_unaware sfp fpgm)
for name in "${names[@]}"; do
    python export.py "$runs/$name"
    python finetune.py "$runs/$name" --epochs 3 --finetune_lr 0.02 --finetune_schedule cosine --finetune_distillation 0
done
python -m benchmarks.summarise "${names[@]/#/$runs/}" "$runs/magnitude" --output results/methods.json
