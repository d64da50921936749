"""Train a model: what pretraining and fine-tuning share.

`fit` trains epoch by epoch (`cacp.steps`), exact to resume: all randomness of an epoch comes from (seed, epoch), so
that weights and momentum are all the state there is.

Differences from the paper's released fine-tuning:
- learning rate: x0.1 every 20 of 400 epochs -> "cosine" over the whole length, from one that fits it
  (`Recipe.highest_lr`); the released one, "paper", is at most 1e-5 from epoch 80 on: nothing happens in 320 of 400.
- loss: cross-entropy -> most of it compares with what the dense model answers to the same image (`Recipe.loss`).
- chosen epoch: the best on the test set -> the best on a validation split (`chosen_epoch`), else the last.
- images: all -> all but those of validation and holdout, which judge.
- precision: fp32 -> bf16 autocast where the machine computes in it; weights, optimiser and evaluation stay fp32.
- batches: a smaller last one -> ceil(N / batch_size) batches an epoch whose sizes differ by at most 1.

Letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cacp.checkpoint import UNFIT, SavedState, load_state, pack, save_state, unpack
from cacp.data import ImageData
from cacp.evaluation import check_batching, device_of, evaluate_data, resolve_precision
from cacp.recipe import Recipe, moving_average, saved_settings, sgd_optimizer
from cacp.schema import Normalisation, UserError
from cacp.steps import Learner, Stretch, check_finite, diverged, train


class EpochRecord(NamedTuple):
    """What one epoch of `fit` did.

    `epoch` counts from 1; `lr` is that of the epoch's last step; `train_top1` in [0, 1] and `train_loss` in nats are
    means over the augmented images as they were trained on; `seconds` is the whole epoch with validation,
    `images_per_second` the training part alone.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    validation_top1: float | None
    validation_loss: float | None
    seconds: float
    images_per_second: float


def chosen_epoch(records: Sequence[EpochRecord]) -> int:
    """The epoch whose weights `fit` leaves in the model: best validation top-1, then lowest loss, then earliest.

    Without validation it is the last epoch; 0 without records.
    """
    validated = [record for record in records if record.validation_top1 is not None]
    if not validated:
        return records[-1].epoch if records else 0
    return max(validated, key=lambda record: (record.validation_top1, -(record.validation_loss or 0.0))).epoch


def images_per_second(records: Sequence[EpochRecord]) -> float:
    """Of the training of all epochs together, each over as many images."""
    return harmonic_mean([record.images_per_second for record in records])


@dataclass
class FitState:
    """All that a fit carries from epoch to epoch. `best_weights` is the state dict of `chosen_epoch(records)`; `extras`
    are tensors of a method that trains.
    """

    learner: Learner
    records: list[EpochRecord] = field(default_factory=list)
    best_weights: dict[str, Tensor] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the state, with the settings it belongs to, as one checkpoint."""
        average = self.learner.average
        state = {
            "weights": self.learner.model.state_dict(),
            "average": None if average is None else average.state_dict(),
            "best_weights": self.best_weights,
            "optimizer": self.learner.optimizer.state_dict(),
            "extras": self.extras,
        }
        tensors, structure = pack(state)
        records = [record._asdict() for record in self.records]
        save_state(folder, tensors, {"settings": settings, "records": records, "structure": structure})

    def load(self, folder: Path, settings: dict[str, Any]) -> None:
        """Go on from the checkpoint in `folder`; without one nothing changes.

        Raises:
            UserError: where it was made with other settings, or for a model of another shape.
        """
        saved = load_state(folder)
        if saved is None:
            return
        try:
            self._take(saved, folder, settings)
        except UserError:
            raise
        except UNFIT as error:
            raise UserError(
                f"the checkpoint in {folder} is not of a training: {type(error).__name__}: {error!s:.300}; "
                "delete that folder to start anew"
            ) from error

    def _take(self, saved: SavedState, folder: Path, settings: dict[str, Any]) -> None:
        _check_settings(folder, saved.data["settings"], settings)
        state = unpack(saved.tensors, saved.data["structure"])
        model, optimizer, average = self.learner.model, self.learner.optimizer, self.learner.average
        _check_shapes(folder, state["weights"], model.state_dict())
        model.load_state_dict(state["weights"])
        if average is not None:
            average.load_state_dict(state["average"])
        self.best_weights = state["best_weights"]
        self.extras = state.get("extras", {})
        optimizer.load_state_dict(state["optimizer"])
        for parameter, slots in optimizer.state.items():
            # In the parameter's memory format: a mixture of two may round the update differently in the last bit.
            tensors = {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)}
            slots.update({name: torch.empty_like(parameter).copy_(slot) for name, slot in tensors.items()})
        self.records = [EpochRecord(**record) for record in saved.data["records"]]


def fit(
    model: nn.Module,
    images: ImageData,
    validation: ImageData | None,
    normalisation: Normalisation,
    recipe: Recipe,
    seed: int,
    checkpoint_dir: Path | None = None,
    after_epoch: Callable[[nn.Module], None] | None = None,
    teacher: nn.Module | None = None,
) -> Iterator[EpochRecord]:
    """Train `model` in place, on its device, and yield a record after every epoch.

    When the iterator is exhausted, the model holds the weights of `chosen_epoch(records)`, averaged if the recipe says
    so; while it runs, those of the epoch just yielded, not averaged. Before a record is yielded the checkpoint of its
    epoch is on disk. A call that finds a checkpoint of the same recipe and seed yields its records again and goes on,
    on a CPU bit-equal to a run that was never broken off.

    Args:
        model: classifier, (B, C, H, W) -> (B, classes); its memory format becomes channels_last, the fastest measured.
        images: that are trained on, augmented.
        validation: images that choose the epoch, evaluated in fp32 after every epoch; None keeps the last epoch.
        normalisation: of the model's weights.
        recipe: how to train.
        seed: fixes data order, augmentation and dropout; not the initial weights.
        checkpoint_dir: folder of this run's checkpoint alone; None saves nothing.
        after_epoch: changes the weights after every epoch, before they are validated and saved (soft pruning does).
        teacher: whose outputs a recipe with distillation compares with; on the model's device, left as it is.

    Raises:
        UserError: for an empty data set, a precision that the device does not have, or a checkpoint of another recipe,
            seed, data size or model.
        TrainingDiverged: while iterating, when loss or weights are not finite; the checkpoint before it is kept.
    """
    check_batching("images", len(images), recipe.batch_size)
    if validation is not None:
        check_batching("validation", len(validation), recipe.batch_size)
    resolve_precision(recipe.precision, device_of(model))  # refuses now what the first epoch would
    job = _Job(images.on(device_of(model)), validation, normalisation, recipe, seed, after_epoch)
    if (teacher is not None) != (recipe.distillation > 0):
        raise UserError(f"distillation needs a teacher, and a teacher distillation, but got {recipe.distillation=}")
    model.to(memory_format=torch.channels_last)
    learner = Learner(model, sgd_optimizer(model, recipe), moving_average(model, recipe), teacher)
    state = FitState(learner)
    if checkpoint_dir is not None:
        state.load(checkpoint_dir, job.settings)
    return _epochs(state, job, checkpoint_dir)  # `fit` itself is no generator: its errors are raised by the call


@dataclass(frozen=True)
class _Job:
    """The arguments of `fit`, checked."""

    images: ImageData
    validation: ImageData | None
    normalisation: Normalisation
    recipe: Recipe
    seed: int
    after_epoch: Callable[[nn.Module], None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; the device may change."""
        return {
            **asdict(self.recipe),
            "seed": self.seed,
            "train_images": len(self.images),
            "validation_images": 0 if self.validation is None else len(self.validation),
        }


def _epochs(state: FitState, job: _Job, checkpoint_dir: Path | None) -> Iterator[EpochRecord]:
    result = state.learner.result
    yield from tuple(state.records)
    for epoch in range(len(state.records) + 1, job.recipe.epochs + 1):
        state.records.append(_run_epoch(state, job, epoch))
        if job.validation is not None and chosen_epoch(state.records) == epoch:
            state.best_weights = {name: tensor.clone() for name, tensor in result.state_dict().items()}
        if checkpoint_dir is not None:
            state.save(checkpoint_dir, job.settings)
        yield state.records[-1]
    state.learner.model.load_state_dict(state.best_weights or result.state_dict())


def _run_epoch(state: FitState, job: _Job, epoch: int) -> EpochRecord:
    start = time.perf_counter()
    stretch = Stretch(job.normalisation, job.recipe, job.seed, epoch)
    learner = state.learner
    totals = train(learner, job.images, stretch)
    loss, top1 = totals.loss, totals.top1  # waits for the device
    train_seconds = time.perf_counter() - start
    check_finite(loss, learner.model, stretch, learner.optimizer)
    if job.after_epoch is not None:
        job.after_epoch(learner.model)
    scored = None if job.validation is None else evaluate_data(learner.result, job.validation, job.normalisation)
    if scored is not None and not math.isfinite(scored.loss):
        raise diverged(stretch, learner.optimizer, f"the validation loss is {scored.loss}")
    return EpochRecord(
        epoch=epoch,
        lr=learner.optimizer.param_groups[0]["lr"],
        train_loss=loss,
        train_top1=top1,
        validation_top1=None if scored is None else scored.top1,
        validation_loss=None if scored is None else scored.loss,
        seconds=time.perf_counter() - start,
        images_per_second=len(job.images) / train_seconds,
    )


def _check_settings(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    saved = saved_settings(saved)
    differing = [
        f"{key} (checkpoint {saved.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise UserError(
            f"the checkpoint in {folder} was made with other settings: {', '.join(differing)}; "
            "set them back to resume, or delete that folder to start anew"
        )


def _check_shapes(folder: Path, saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (saved, wanted)]
    differing = [
        f"{name} (checkpoint {shapes[0].get(name)}, now {shapes[1].get(name)})"
        for name in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if differing:
        raise UserError(
            f"the checkpoint in {folder} is of another model: {', '.join(differing[:8])}"
            f"{f' and {len(differing) - 8} more' if len(differing) > 8 else ''}; delete that folder to start anew"
        )
