"""Make the dense model of a run: train it, or take published weights or those of a file.

    python pretrain.py --config configs/digits_resnet56.yaml

Writes runs/NAME/dense/: model.safetensors, result.json, and while training epochs.csv, TensorBoard events and a
checkpoint. Run again, it goes on where it stopped, or says that it is done.
"""

import sys

import torch

from cacp.checkpoint import load_json
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.data import Splits, channel_statistics
from cacp.dense import import_weights, save_dense
from cacp.experiment import Experiment
from cacp.models import build_model
from cacp.pipeline import check_targets, load_inputs, open_run, select_device, training_recipe
from cacp.reporting import console, percent, track_training, validation_images
from cacp.training import chosen_epoch, fit


def main() -> None:
    experiment = experiment_from(parse("pretrain", __doc__, sys.argv[1:]))
    device = select_device(experiment.device)
    folder = experiment.folder / "dense"
    with open_run(experiment):
        if not (folder / "result.json").is_file():
            splits = load_inputs(experiment)
            check_targets(experiment, splits)
            if experiment.weights == "train":
                train_dense(experiment, splits, device)
            else:
                import_weights(experiment, splits, device)
    result = load_json(
        folder / "result.json",
        {"model": str, "validation_top1": float, "validation_images": int, "validation_unseen": bool},
    )
    console.print(
        f"dense {result['model']}: {percent(result['validation_top1'])} % top-1 on {result['validation_images']} "
        f"{validation_images(result['validation_unseen'])}, in {folder}"
    )


def train_dense(experiment: Experiment, splits: Splits, device: torch.device) -> None:
    """Train from scratch; the validation images are held out and pick the epoch."""
    recipe = training_recipe(
        experiment, experiment.pretrain_epochs, experiment.pretrain_lr, experiment.pretrain_schedule
    )
    folder = experiment.folder / "dense"
    model = build_model(experiment.model, len(splits.train.classes), seed=experiment.seed, importing=True).to(device)
    normalisation = channel_statistics(splits.train)
    epochs = fit(model, splits.train, splits.validation, normalisation, recipe, experiment.seed, folder / "checkpoint")
    records = track_training(epochs, recipe.epochs, folder, f"train {experiment.model}")
    origin = {
        "source": "trained by pretrain.py",
        "trained_on": f"{len(splits.train)} training images without the validation images",
        "validation_unseen": True,
        "chosen_epoch": chosen_epoch(records),
        "epochs": recipe.epochs,
    }
    save_dense(experiment, model, normalisation, splits, origin)


if __name__ == "__main__":
    run_command(main)
