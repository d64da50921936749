"""What fine-tuning recovers: pruned models of several systems and the dense one, trained further alike.

    python -m benchmarks.recovery RUN --uniform RUN --work FOLDER [--models NAME ...] [--targets 0.5 0.3] \
        [--epochs 10] [--seeds 0 1] [--result results/recovery.json]

RUN holds a search, exported, and the dense model; the run of --uniform was pruned from the same weights. The recipe is
RUN's, but for --epochs. A cell is a model, a target and a seed: a JSON file in FOLDER/cells, skipped when it is there;
one that was broken off goes on after its last epoch. The result has all cells. The test images judge, once a cell.
Cells of a seed see the same batches: on a CPU the dense model is asked for its answers once (FOLDER/answers.sqlite).

- ours, uniform: as export.py wrote them, repaired and recalibrated.
- tp-l1, tp-group-norm: Torch-Pruning's global pruning (MagnitudeImportance p 1, GroupMagnitudeImportance p 2),
  in 400 steps until the target is met; inside blocks, since it cannot follow ResNet's zero-padded shortcuts.
- scratch: the architecture of ours, with new weights.
- dense: the unpruned model, trained further as long.
"""

import argparse
import copy
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.exported_run import finetune, load_run
from benchmarks.summarise import portable
from cacp.checkpoint import load_json, save_json, sha256
from cacp.command import run_command
from cacp.cost import counted_cost
from cacp.data import ImageData, Splits
from cacp.dense import DenseModel
from cacp.environment import environment
from cacp.evaluation import evaluate_data
from cacp.experiment import Experiment
from cacp.exporting import WEIGHTS
from cacp.graph import trace
from cacp.pipeline import finetuning_recipe, load_exported, load_images
from cacp.recipe import Recipe
from cacp.schema import UserError
from cacp.steps import seeded

TP_STEPS = 400


class Subject(NamedTuple):
    """What all cells share."""

    experiment: Experiment
    uniform: Path
    dense: DenseModel
    splits: Splits
    test: ImageData
    recipe: Recipe


def main() -> None:
    arguments = _parser().parse_args()
    subject = _subject(arguments)
    wanted = itertools.product(arguments.seeds, arguments.targets, arguments.models)
    for seed, target, name in dict.fromkeys(
        (one, 1.0 if name == "dense" else part, name) for one, part, name in wanted
    ):
        cell = _cell(subject, name, target, seed, arguments.work)
        tops = [cell[part]["top1"] for part in ("before", "after")]
        print(name, target, seed, " -> ".join(f"{100 * top1:.2f} %" for top1 in tops), flush=True)
    if arguments.result:
        dense = evaluate_data(subject.dense.model, subject.test, subject.dense.normalisation)
        cells = [load_json(path) for path in sorted((arguments.work / "cells").glob("*.json"))]
        result = {"dense": dense._asdict(), "cells": cells}
        save_json(arguments.result, portable({**result, "environment": environment(subject.experiment.seed)}))


def _cell(subject: Subject, name: str, target: float, seed: int, work: Path) -> dict[str, Any]:
    """A cell that is there, or is made.

    Raises:
        UserError: for one that was made from other models or by another recipe.
    """
    stem, source = f"{name}_{target:.2f}_{subject.recipe.epochs}_{seed}", _source(subject, name, target)
    path = work / "cells" / f"{stem}.json"
    if not path.is_file():
        digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()
        found = recovered(subject, name, target, seed, work / "checkpoints" / f"{stem}_{digest[:8]}", work)
        save_json(path, {"model": name, "target": target, "seed": seed, "source": source, **found})
    cell = load_json(path)
    if cell["source"] != source:
        raise UserError(f"{path} was made from other models or by another recipe; choose another --work, or delete it")
    return cell


def _source(subject: Subject, name: str, target: float) -> dict[str, Any]:
    """What a cell is made from: the recipe, and checksums of the dense and of the exported model that it needs."""
    folders = {"dense": subject.experiment.folder / "dense"}
    if name in ("ours", "scratch"):
        folders["exported"] = subject.experiment.folder / "export" / f"macs-{target:.2f}"
    elif name == "uniform":
        folders["exported"] = subject.uniform / "export" / f"macs-{target:.2f}"
    checksums = {model: sha256(folder / WEIGHTS) for model, folder in folders.items()}
    return {"recipe": asdict(subject.recipe), "sha256": checksums}


def recovered(subject: Subject, name: str, target: float, seed: int, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Train one of MODELS, and judge it before and after."""
    dense = subject.dense
    model = MODELS[name](subject, target, seed).to(dense.example.device)
    before = evaluate_data(model, subject.test, dense.normalisation)
    cost = counted_cost(model, dense.image_shape)
    answers = work / "answers.sqlite" if dense.example.device.type == "cpu" else None
    records = finetune(model, subject.recipe, seed, subject.splits, dense, checkpoint, answers)
    return {
        "before": before._asdict(),
        "after": evaluate_data(model, subject.test, dense.normalisation)._asdict(),
        "cost": cost.to_json(),
        "epochs": len(records),
        "environment": environment(seed),
    }


def ours(subject: Subject, target: float, seed: int) -> nn.Module:
    return load_exported(subject.experiment, subject.experiment.folder / "export" / f"macs-{target:.2f}")


def uniform(subject: Subject, target: float, seed: int) -> nn.Module:
    return load_exported(subject.experiment, subject.uniform / "export" / f"macs-{target:.2f}")


def torch_pruned(subject: Subject, target: float, group_norm: bool) -> nn.Module:
    """Torch-Pruning's global magnitude pruning of what our scope `inner` prunes."""
    import torch_pruning

    model, example = copy.deepcopy(subject.dense.model), subject.dense.example
    importance = torch_pruning.importance
    pruned = {producer for group in trace(model, example, "inner").prunable for producer in group.producers}
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance.GroupMagnitudeImportance(p=2) if group_norm else importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=TP_STEPS,
        ignored_layers=[
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in pruned
        ],
    )
    limit = target * counted_cost(model, subject.dense.image_shape).macs
    while counted_cost(model, subject.dense.image_shape).macs > limit:
        pruner.step()
    return model


def scratch(subject: Subject, target: float, seed: int) -> nn.Module:
    model = ours(subject, target, seed)
    with seeded(seed, torch.device("cpu")):
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # as the dense models of this project
    return model


MODELS: dict[str, Callable[[Subject, float, int], nn.Module]] = {
    "ours": ours,
    "uniform": uniform,
    "tp-l1": lambda subject, target, seed: torch_pruned(subject, target, group_norm=False),
    "tp-group-norm": lambda subject, target, seed: torch_pruned(subject, target, group_norm=True),
    "scratch": scratch,
    "dense": lambda subject, target, seed: copy.deepcopy(subject.dense.model),
}


def _subject(arguments: argparse.Namespace) -> Subject:
    experiment, splits, dense = load_run(arguments.run)
    if len({sha256(run / "dense" / WEIGHTS) for run in (arguments.run, arguments.uniform)}) > 1:
        raise UserError(
            f"{arguments.uniform} was pruned from other weights than {arguments.run}; use the same --weights"
        )
    test = load_images(experiment, "test")
    assert test is not None
    recipe = replace(finetuning_recipe(experiment), epochs=arguments.epochs)
    return Subject(experiment, arguments.uniform, dense, splits, test, recipe)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with dense/ and export/")
    parser.add_argument("--uniform", type=Path, required=True, help="run folder of the uniform policies, exported")
    parser.add_argument("--work", type=Path, required=True, help="folder of a file a cell")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--result", type=Path, help="JSON file for all cells")
    return parser


if __name__ == "__main__":
    run_command(main)
