"""Ablation of the fine-tuning recipe: one thing changed at a time, equal epochs, judged on held-out images.

    python -m benchmarks.recipes RUN --work FOLDER [--variants NAME ...] [--epochs 10] [--seeds 0] \
        [--policies macs-0.50 macs-0.30] [--result results/recipes.json]

RUN holds exported models, and a dense model that has never seen the validation and holdout images, on which everything
is judged; the test set is not read. A cell is a variant, a policy and a seed: a JSON file in FOLDER, skipped when it is
there; one that was broken off goes on after its last epoch.
"""

import argparse
import itertools
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.exported_run import finetune, load_run
from benchmarks.summarise import portable
from cacp.checkpoint import load_json, save_json
from cacp.command import run_command
from cacp.data import Splits
from cacp.dense import DenseModel
from cacp.environment import environment
from cacp.evaluation import device_of, evaluate_data
from cacp.experiment import Experiment
from cacp.pipeline import load_exported
from cacp.recipe import Recipe
from cacp.schema import UserError

BASE = Recipe(epochs=1, lr=0.05, schedule="cosine")
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "lr-0.01": {"lr": 0.01},
    "lr-0.02": {"lr": 0.02},
    "lr-0.1": {"lr": 0.1},
    "paper": {"lr": 0.1, "schedule": "paper"},
    "step": {"schedule": "step"},
    "nesterov": {"nesterov": True},
    "no-decay-on-norms": {"decay_all": False},
    "decay-5e-4": {"weight_decay": 5e-4},
    "batch-128": {"batch_size": 128},
    "smoothing-0.1": {"label_smoothing": 0.1},
    "distillation-0.5": {"distillation": 0.5},
    "distillation-0.9": {"distillation": 0.9},
    "distillation-0.9-t2": {"distillation": 0.9, "temperature": 2.0},
    "distillation-1": {"distillation": 1.0},
    "ema-0.99": {"ema_decay": 0.99},
    "ema-0.998": {"ema_decay": 0.998},
    "erasing-8": {"erasing": 8},
    "no-augmentation": {"padding": 0, "flip": False},
}


def main() -> None:
    arguments = _parser().parse_args()
    experiment, splits, dense = load_run(arguments.run)
    if not dense.validation_unseen:
        raise UserError(f"{arguments.run}: its dense weights have seen the images that would judge; use weights train")
    cells = []
    for seed, name, policy in itertools.product(arguments.seeds, arguments.variants, arguments.policies):
        path = arguments.work / f"{name}_{policy}_{arguments.epochs}_{seed}.json"
        if not path.is_file():
            recipe = replace(BASE, epochs=arguments.epochs, **VARIANTS[name])
            checkpoint = arguments.work / "checkpoints" / path.stem
            found = trained(experiment, policy, recipe, seed, splits, dense, checkpoint)
            save_json(path, {"variant": name, "policy": policy, "seed": seed, **found})
        cells.append(load_json(path))
        print(path.stem, f"{100 * cells[-1]['top1']:.2f} %, {cells[-1]['seconds']:.0f} s", flush=True)
    for name in arguments.variants:
        tops = [cell["top1"] for cell in cells if cell["variant"] == name]
        print(f"{name:20} {100 * statistics.mean(tops):.2f}")
    if arguments.result:
        result = {"dense": _judged(dense.model, splits, dense), "cells": cells, "environment": environment(0)}
        save_json(arguments.result, portable(result))


def trained(
    experiment: Experiment, policy: str, recipe: Recipe, seed: int, splits: Splits, dense: DenseModel, checkpoint: Path
) -> dict[str, Any]:
    """Fine-tune an exported model by a recipe, and judge it."""
    model = load_exported(experiment, experiment.folder / "export" / policy).to(device_of(dense.model))
    records = finetune(model, recipe, seed, splits, dense, checkpoint)
    seconds = sum(record.seconds for record in records)
    return {**_judged(model.eval(), splits, dense), "seconds": seconds, "recipe": asdict(recipe)}


def _judged(model: Any, splits: Splits, dense: DenseModel) -> dict[str, float]:
    parts = [evaluate_data(model, images, dense.normalisation) for images in (splits.validation, splits.holdout)]
    return {"top1": statistics.mean(part.top1 for part in parts), "loss": statistics.mean(part.loss for part in parts)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with dense/ and export/")
    parser.add_argument("--work", type=Path, required=True, help="folder of a file a cell")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--policies", nargs="+", default=["macs-0.50", "macs-0.30"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--result", type=Path, help="JSON file for all cells")
    return parser


if __name__ == "__main__":
    run_command(main)
