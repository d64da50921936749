"""The dense model of a run: where its weights come from, dense/ in the run folder, and whether it can be right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cacp.checkpoint import load_json, save_json, save_tensors, sha256
from cacp.data import Splits, fingerprint
from cacp.evaluation import device_of, evaluate_data
from cacp.experiment import Experiment
from cacp.models import build_model
from cacp.models.weights import fetch_published, load_weights, published_weights_of
from cacp.schema import Normalisation, UserError

DENSE_RESULT = {
    "sha256": str,
    "split_sha256": str,
    "mean": [float],
    "std": [float],
    "classes": [str],
    "trained_on": str,
    "validation_top1": float,
    "validation_unseen": bool,
}


@dataclass(frozen=True)
class DenseModel:
    """The unpruned model of a run, in eval mode on its device, and what dense/result.json says of it."""

    model: nn.Module
    normalisation: Normalisation
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    validation_top1: float
    validation_unseen: bool  # whether the weights have never seen the validation images

    @property
    def example(self) -> Tensor:
        """A zero image (1, C, H, W), for tracing."""
        return torch.zeros(1, *self.image_shape, device=device_of(self.model))


class _Weights(NamedTuple):
    """Weights that are taken over, with what is known of them."""

    path: Path
    normalisation: Normalisation
    trained_on: str
    validation_unseen: bool = False


def import_weights(experiment: Experiment, splits: Splits, device: torch.device) -> None:
    """Fill dense/ with published weights, those of a file, or another run's, measured on the validation images.

    Raises:
        UserError: for missing, damaged or wrong weights, or a file without `mean` and `std` on the command line.
    """
    weights = published_weights(experiment) if experiment.weights == "published" else _given(experiment, splits)
    model = build_model(experiment.model, len(splits.train.classes), seed=experiment.seed, importing=True)
    load_weights(model, weights.path)
    origin = {
        "source": str(weights.path),
        "source_sha256": sha256(weights.path),
        "trained_on": weights.trained_on,
        "validation_unseen": weights.validation_unseen,
    }
    save_dense(experiment, model.to(device), weights.normalisation, splits, origin)


def published_weights(experiment: Experiment) -> _Weights:
    """The published weights of the model for the data set, downloaded where they are not on disk.

    Raises:
        UserError: offline, for a wrong checksum, or where none are published.
    """
    path = fetch_published(experiment.model, experiment.dataset, Path(experiment.data_dir) / "weights")
    published = published_weights_of(experiment.model, experiment.dataset)
    assert published is not None  # else there was nothing to fetch
    return _Weights(path, published.normalisation, published.trained_on)


def _given(experiment: Experiment, splits: Splits) -> _Weights:
    path = Path(experiment.weights)
    if not path.exists():
        raise UserError(f"weights must be train, published, a weights file or a run folder; there is no {path}")
    if path.is_dir():
        result_path = path / "dense" / "result.json"
        if not result_path.is_file():
            raise UserError(f"weights {path} is a folder, but holds no run with a dense model (dense/result.json)")
        result = load_json(result_path, DENSE_RESULT)
        normalisation = _normalisation(result, splits, result_path)
        unseen = result["validation_unseen"] and result["split_sha256"] == fingerprint(splits)
        return _Weights(path / "dense" / "model.safetensors", normalisation, result["trained_on"], unseen)
    if experiment.mean is None or experiment.std is None:
        raise UserError(
            f"weights {path}: the file carries no normalisation; give --mean and --std, three numbers each, that the "
            "weights were trained with (or weights train, published, or a run folder)"
        )
    return _Weights(path, Normalisation(tuple(experiment.mean), tuple(experiment.std)), "unknown")


def save_dense(
    experiment: Experiment, model: nn.Module, normalisation: Normalisation, splits: Splits, origin: dict[str, Any]
) -> None:
    """Write dense/: the weights, and result.json with origin, normalisation and validation top-1.

    Raises:
        UserError: if the model does hardly better than chance.
    """
    top1 = checked_top1(model, splits, normalisation)
    folder = experiment.folder / "dense"
    save_tensors(folder / "model.safetensors", model.state_dict())
    result = {
        **origin,
        "sha256": sha256(folder / "model.safetensors"),
        "split_sha256": fingerprint(splits),
        "model": experiment.model,
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "classes": list(splits.train.classes),
        "validation_top1": top1,
        "validation_images": len(splits.validation),
    }
    save_json(folder / "result.json", result)


def load_dense(experiment: Experiment, splits: Splits, device: torch.device) -> DenseModel:
    """The model of dense/, which must agree with the data.

    Raises:
        UserError: if dense/ is missing or damaged, or its classes are not those of the data set.
    """
    path = experiment.folder / "dense" / "result.json"
    if not path.is_file():
        raise UserError(f"{experiment.folder} has no dense model yet; run pretrain.py with the same settings first")
    result = load_json(path, DENSE_RESULT)
    classes = tuple(result["classes"])
    if classes != splits.train.classes:
        raise UserError(
            f"the data set has the classes {', '.join(splits.train.classes)}, but the dense model was made for "
            f"{', '.join(classes)}; give the --data_dir of the same data"
        )
    if fingerprint(splits) != result["split_sha256"]:
        raise UserError(
            f"the images of {experiment.data_dir} are not those that {path} was made with, so validation images may "
            "have been trained on; give the --data_dir of the same data, or use another --output"
        )
    weights = path.parent / "model.safetensors"
    if sha256(weights) != result["sha256"]:
        raise UserError(
            f"{weights} is not the file that {path} describes (SHA-256); delete {path.parent} and run again"
        )
    model = build_model(experiment.model, len(classes), seed=experiment.seed, importing=True)
    load_weights(model, weights)
    return DenseModel(
        model=model.to(device).to(memory_format=torch.channels_last).eval(),
        normalisation=_normalisation(result, splits, path),
        classes=classes,
        image_shape=splits.train.image_shape,
        validation_top1=result["validation_top1"],
        validation_unseen=result["validation_unseen"],
    )


def _normalisation(result: dict[str, Any], splits: Splits, path: Path) -> Normalisation:
    """Of a dense/result.json.

    Raises:
        UserError: for one that the images cannot be normalised by.
    """
    mean, std = tuple(result["mean"]), tuple(result["std"])
    if not (len(mean) == len(std) == splits.train.image_shape[0] and all(one > 0 for one in std)):
        raise UserError(f"{path} must hold a mean and a std above 0 for each channel; restore it, or train again")
    return Normalisation(mean, std)


def checked_top1(model: nn.Module, splits: Splits, normalisation: Normalisation) -> float:
    """Top-1 of a dense model on the validation images, in fp32.

    Raises:
        UserError: if it does hardly better than chance, with what is likely wrong.
    """
    classes = len(splits.train.classes)
    top1 = evaluate_data(model, splits.validation, normalisation).top1
    least = min(3 / classes, (1 + 1 / classes) / 2)
    if top1 < least:
        raise UserError(
            f"the dense model reaches only {100 * top1:.1f} % top-1 on the validation images (chance is "
            f"{100 / classes:.1f} %, at least {100 * least:.1f} % is expected); likely wrong are the weights (another "
            "data set or model, or trained too short), the normalisation (--mean and --std must be those the weights "
            "were trained with), or the order of the classes (class folders are taken in alphabetical order)"
        )
    return top1
