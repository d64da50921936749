"""Fine-tune every exported model of a run, one after another or side by side; the test set is read once, at the end of
each.

    python finetune.py runs/digits_resnet56

Writes finetune/NAME/: architecture.json and model.safetensors (load_pruned reads them), model.py, model.onnx and
model.pt2 (which need nothing of this project), epochs.csv, TensorBoard events, checkpoint/, and result.json: test top-1
of the dense model, before and after; epochs, which one was kept and why; seconds of all epochs with validation, images
a second of their training; the recipe, and the precision it came to. Run again, it skips what is done and goes on with
the rest.
"""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from cacp.checkpoint import load_json, save_json, sha256
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.data import Splits
from cacp.dense import DenseModel, load_dense
from cacp.environment import environment
from cacp.evaluation import device_of, dtype_name, evaluate_data, resolve_precision
from cacp.experiment import Experiment
from cacp.exporting import WEIGHTS, checksums, finished, load_architecture, save_pruned
from cacp.locking import only_writer
from cacp.parallel import launched
from cacp.pipeline import check_run, finetuning_recipe, load_exported, load_images, load_splits, select_device
from cacp.policies import load_policies
from cacp.recipe import Recipe, saved_settings
from cacp.reporting import console, millions, percent, show_files, table, track_training
from cacp.schema import UserError
from cacp.shipping import forms_of, ship, unshipped
from cacp.side_by_side import side_by_side
from cacp.sweep import load_sweep, save_sweep
from cacp.training import EpochRecord, chosen_epoch, fit, images_per_second

SOURCE = "source.json"  # beside what was made from it
_COST = {"macs": int, "params": int}
RESULT = {
    "test_top1": {"dense": float, "before": float, "after": float},
    "cost": _COST,
    "dense_cost": _COST,
    "epochs": int,
    "chosen_epoch": int,
    "seconds": float,
}


def main() -> None:
    experiment = experiment_from(parse("finetune", __doc__, sys.argv[1:], run_argument=True))
    check_machine(experiment)
    exports = [experiment.folder / "export" / record.budget.name for record in load_policies(experiment.folder)]
    missing = [export.name for export in exports if not finished(export, "report.json")]
    if missing:
        raise UserError(
            f"not exported yet, or not whole: {', '.join(missing)}; run export.py {experiment.folder} first"
        )
    folders = {export.name: experiment.folder / "finetune" / export.name for export in exports}
    check_run(experiment)
    recipe = finetuning_recipe(experiment)
    refuse_others(folders, {export.name: source_of(export, recipe) for export in exports})
    done = all(finished(one, "result.json") and is_shipped(experiment, one) for one in folders.values())
    if not done or load_sweep(experiment.folder):
        with only_writer(experiment.folder):
            finetune_all(experiment, recipe, exports, folders)
    show_results(
        {name: load_json(folder / "result.json", RESULT) for name, folder in folders.items()}, experiment.folder
    )


def check_machine(experiment: Experiment) -> None:
    """Refuse a device that is not there, and models side by side where all processes train each model together."""
    select_device(experiment.device)
    if launched() > 1 and experiment.finetune_at_once > 1:
        raise UserError("under torchrun all processes train one model together; leave out --finetune_at_once")


def finetune_all(experiment: Experiment, recipe: Recipe, exports: Sequence[Path], folders: Mapping[str, Path]) -> None:
    """Fine-tune the exported models that are not, each into the folder of its name, and draw the plots of a sweep."""
    waiting = [export for export in exports if not finished(folders[export.name], "result.json")]
    for export in waiting:
        save_json(folders[export.name] / SOURCE, source_of(export, recipe))  # reserves the folder
    at_once = min(experiment.finetune_at_once, len(exports))  # not of those that wait: as many threads when it goes on
    if waiting and at_once == 1:
        finetune_in_turn(experiment, recipe, waiting, folders)
    elif waiting:
        with side_by_side(at_once) as pool:
            work = [pool.submit(finetune_in_turn, experiment, recipe, [export], folders) for export in waiting]
            for ended in as_completed(work):
                ended.result()
    for folder in folders.values():
        complete(experiment, folder)
    if rows := load_sweep(experiment.folder):
        save_sweep(experiment.folder, rows)


def finetune_in_turn(
    experiment: Experiment, recipe: Recipe, exports: Sequence[Path], folders: Mapping[str, Path]
) -> None:
    splits = load_splits(experiment)
    dense = load_dense(experiment, splits, select_device(experiment.device))
    recipe = replace(recipe, lr=recipe.highest_lr(len(splits.train)))
    for export in exports:
        folder = folders[export.name]
        model, records = train(experiment, recipe, export, folder, splits, dense)
        finish(experiment, recipe, export, folder, model, records, dense)


def source_of(export: Path, recipe: Recipe) -> dict[str, Any]:
    """What a fine-tuning is made from."""
    return {"weights_sha256": sha256(export / WEIGHTS), **asdict(recipe)}


def refuse_others(folders: Mapping[str, Path], sources: Mapping[str, dict[str, Any]]) -> None:
    """Refuse folders that hold a fine-tuning, of an epoch at least, of another export or by another recipe.

    Raises:
        UserError: listing all of them.
    """
    wrong = []
    for name, here in sources.items():
        path = folders[name] / SOURCE
        begun = path.is_file() and any((folders[name] / result).exists() for result in ("checkpoint", "result.json"))
        there = saved_settings(load_json(path, {"weights_sha256": str})) if begun else here
        different = [f"{key}: {there[key]!r} -> {here[key]!r}" for key in here if there[key] != here[key]]
        if different:
            wrong.append("\n  ".join([f"{folders[name]}:", *different]))
    if wrong:
        raise UserError(
            "fine-tunings of other policies or by another recipe are in\n"
            + "\n".join(wrong)
            + "\nuse the same settings, or move these folders away (or delete them), then run again"
        )


def train(
    experiment: Experiment, recipe: Recipe, export: Path, folder: Path, splits: Splits, dense: DenseModel
) -> tuple[nn.Module, list[EpochRecord]]:
    """Fine-tune one exported model, taught by the dense one where the recipe distils.

    Validation picks the epoch only where the weights have never seen its images; else the last epoch stays.
    """
    model = load_exported(experiment, export).to(device_of(dense.model))
    validation = splits.validation if dense.validation_unseen else None
    teacher = dense.model if recipe.distillation else None
    checkpoint = folder / "checkpoint"
    epochs = fit(
        model, splits.train, validation, dense.normalisation, recipe, experiment.seed, checkpoint, teacher=teacher
    )
    return model, track_training(epochs, recipe.epochs, folder, f"finetune {export.name}")


def finish(
    experiment: Experiment,
    recipe: Recipe,
    export: Path,
    folder: Path,
    model: nn.Module,
    records: list[EpochRecord],
    dense: DenseModel,
) -> None:
    """Read the test set, once, and write the model and its result; result.json last."""
    test = load_images(experiment, "test")
    assert test is not None
    before = load_exported(experiment, export).to(device_of(dense.model))
    tops = {
        name: evaluate_data(candidate, test, dense.normalisation).top1
        for name, candidate in (("dense", dense.model), ("before", before), ("after", model))
    }
    architecture = load_architecture(export)
    save_pruned(folder, model.cpu(), architecture)
    result: dict[str, Any] = {
        "test_top1": tops,
        "test_images": len(test),
        "cost": architecture.cost.to_json(),
        "dense_cost": architecture.dense_cost.to_json(),
        "epochs": len(records),
        "chosen_epoch": chosen_epoch(records),
        "chosen_because": (
            "best validation top-1; the dense weights never saw the validation images"
            if dense.validation_unseen
            else "last epoch; the dense weights have seen the validation images, so they cannot pick one"
        ),
        "seconds": sum(record.seconds for record in records),
        "images_per_second": images_per_second(records),
        "precision": dtype_name(resolve_precision(recipe.precision, device_of(dense.model))),
        "sha256": checksums(folder),
        "recipe": asdict(recipe),
        "environment": environment(experiment.seed),
    }
    save_json(folder / "result.json", result)


def is_shipped(experiment: Experiment, folder: Path) -> bool:
    """Whether a fine-tuned model has all the forms that are asked for."""
    return not unshipped(folder, experiment.forms, forms_of(load_json(folder / "result.json", RESULT)))


def complete(experiment: Experiment, folder: Path) -> None:
    """Write the forms that a fine-tuned model lacks, and add them to its result."""
    if is_shipped(experiment, folder):
        return
    result = load_json(folder / "result.json", RESULT)
    result["forms"] = ship(folder, load_exported(experiment, folder), experiment.forms, forms_of(result))
    save_json(folder / "result.json", result)
    show_files("fine-tuned", folder, result["forms"], "result.json")


def show_results(results: dict[str, dict[str, Any]], folder: Path) -> None:
    columns = ["model", "MACs", "params", "dense", "before", "after", "after - dense", "epoch", "s"]
    rows = [
        [
            name,
            millions(result["cost"]["macs"]),
            millions(result["cost"]["params"]),
            *(percent(result["test_top1"][key]) for key in ("dense", "before", "after")),
            f"{100 * (result['test_top1']['after'] - result['test_top1']['dense']):+.2f}",
            f"{result['chosen_epoch']} of {result['epochs']}",
            f"{result['seconds']:.0f}",
        ]
        for name, result in results.items()
    ]
    console.print(table(f"fine-tuned models of {folder}, top-1 on the test images, %", columns, rows))


if __name__ == "__main__":
    run_command(main)
