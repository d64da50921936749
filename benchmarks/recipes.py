"""Ablation of the fine-tuning recipe: one thing changed at a time, equal epochs, judged on held-out images.

    python -m benchmarks.recipes RUN --work FOLDER [--variants NAME[+NAME...] ...] [--lrs 0.05] [--epochs 10] \
        [--seeds 0] [--policies macs-0.50 macs-0.30] [--result results/recipes.json]

RUN holds exported models, and a dense model that has never seen the validation and holdout images, on which everything
is judged; the test set is not read. "dense" as a policy is that model, trained further alike. A cell is a variant, a
learning rate, a length, a policy and a seed: a JSON file in FOLDER/cells, skipped when it is there; one that was broken
off goes on after its last epoch. The result has all cells.
"""

import argparse
import copy
import itertools
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.exported_run import finetune, load_run
from benchmarks.summarise import portable
from cacp.checkpoint import load_json, save_json
from cacp.command import run_command
from cacp.data import Splits
from cacp.dense import DenseModel
from cacp.environment import environment
from cacp.evaluation import device_of, evaluate_data
from cacp.experiment import Experiment
from cacp.pipeline import load_exported, training_recipe
from cacp.recipe import Recipe
from cacp.schema import UserError

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "constant": {"schedule": "constant"},
    "step": {"schedule": "step"},
    "paper-in-proportion": {"schedule": "x0.1@20,40,60,80/400"},
    "nesterov": {"nesterov": True},
    "no-decay-on-norms": {"decay_all": False},
    "decay-5e-4": {"weight_decay": 5e-4},
    "batch-64": {"batch_size": 64},
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
    for seed, epochs, policy, lr, name in itertools.product(
        arguments.seeds, arguments.epochs, arguments.policies, arguments.lrs, arguments.variants
    ):
        path = arguments.work / "cells" / f"{name}_{lr:g}_{policy}_{epochs}_{seed}.json"
        if not path.is_file():
            changes = {key: value for part in name.split("+") for key, value in VARIANTS[part].items()}
            recipe = replace(training_recipe(experiment, epochs, lr, "cosine"), **changes)
            model = _model(experiment, policy, dense)
            found = trained(model, recipe, seed, splits, dense, arguments.work / "checkpoints" / path.stem)
            save_json(path, {"variant": name, "policy": policy, "seed": seed, **found})
        cell = load_json(path)
        print(path.stem, f"{100 * cell['top1']:.2f} %, {cell['seconds']:.0f} s", flush=True)
    if arguments.result:
        cells = [load_json(path) for path in sorted((arguments.work / "cells").glob("*.json"))]
        result = {"dense": _judged(dense.model, splits, dense), "cells": cells, "environment": environment(0)}
        save_json(arguments.result, portable(result))


def _model(experiment: Experiment, policy: str, dense: DenseModel) -> nn.Module:
    if policy == "dense":
        return copy.deepcopy(dense.model)
    return load_exported(experiment, experiment.folder / "export" / policy)


def trained(
    model: nn.Module, recipe: Recipe, seed: int, splits: Splits, dense: DenseModel, checkpoint: Path
) -> dict[str, Any]:
    """Fine-tune a model by a recipe, and judge it before and after."""
    model.to(device_of(dense.model)).eval()
    before = _judged(model, splits, dense)
    records = finetune(model, recipe, seed, splits, dense, checkpoint)
    seconds = sum(record.seconds for record in records)
    return {"before": before, **_judged(model.eval(), splits, dense), "seconds": seconds, "recipe": asdict(recipe)}


def _judged(model: Any, splits: Splits, dense: DenseModel) -> dict[str, float]:
    parts = [evaluate_data(model, images, dense.normalisation) for images in (splits.validation, splits.holdout)]
    return {"top1": statistics.mean(part.top1 for part in parts), "loss": statistics.mean(part.loss for part in parts)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with dense/ and export/")
    parser.add_argument("--work", type=Path, required=True, help="folder of a file a cell")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), type=_variant, help="changes, joined by +")
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.05])
    parser.add_argument("--policies", nargs="+", default=["macs-0.50", "macs-0.30"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[10])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--result", type=Path, help="JSON file for all cells")
    return parser


def _variant(name: str) -> str:
    if unknown := set(name.split("+")) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    return name


if __name__ == "__main__":
    run_command(main)
