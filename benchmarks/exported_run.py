"""A run folder with exported models, for benchmarks that fine-tune them."""

from pathlib import Path

from torch import nn

from cacp.config import experiment_from, parse
from cacp.data import Splits
from cacp.dense import DenseModel, load_dense
from cacp.experiment import Experiment
from cacp.pipeline import load_splits, select_device
from cacp.recipe import Recipe
from cacp.training import EpochRecord, fit


def load_run(folder: Path) -> tuple[Experiment, Splits, DenseModel]:
    """The settings of a run, its images and its dense model."""
    experiment = experiment_from(parse("finetune", "", [str(folder)], run_argument=True))
    splits = load_splits(experiment)
    return experiment, splits, load_dense(experiment, splits, select_device(experiment.device))


def finetune(
    model: nn.Module, recipe: Recipe, seed: int, splits: Splits, dense: DenseModel, checkpoint: Path
) -> list[EpochRecord]:
    """Train a model in place on all training images, taught by the dense one where the recipe distils."""
    teacher = dense.model if recipe.distillation else None
    return list(fit(model, splits.train, None, dense.normalisation, recipe, seed, checkpoint, teacher=teacher))
