"""Which images may be trained on, which score an episode, and which score the best policies again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cacp.data.images import ImageData
from cacp.schema import UserError


@dataclass(frozen=True)
class Splits:
    """Parts of the images that search may see; the test set is not among them.

    Attributes:
        train: may be trained on.
        validation: scores an episode; disjoint from `train`.
        holdout: as many images again, disjoint from both, that score the best policies a second time.
        calibration: a part of `train`, for batch-norm statistics.
    """

    train: ImageData
    validation: ImageData
    holdout: ImageData
    calibration: ImageData


def fingerprint(splits: Splits) -> str:
    """SHA-256 of the validation and holdout images and of the training labels: equal for equal splits of equal data."""
    digest = hashlib.sha256(splits.train.labels.numpy().tobytes())
    for part in (splits.validation, splits.holdout):
        digest.update(part.labels.numpy().tobytes())
        for indices in torch.arange(len(part)).split(512):
            digest.update(part.batch(indices).numpy().tobytes())
    return digest.hexdigest()


def make_splits(
    train: ImageData, val: ImageData | None, validation_images: int, calibration_images: int, seed: int
) -> Splits:
    """Split by a seed, independent of the global random state.

    Validation and holdout come from `val`, half each and at most `validation_images` each, or else from `train`. Every
    part is in random order and stratified by class: so is any prefix of it.

    Args:
        train: training images.
        val: validation images that come with the data set, None where there are none.
        validation_images: size of validation and of holdout.
        calibration_images: size of calibration.
        seed: any whole number.

    Raises:
        UserError: listing every size that the images do not suffice for, with what is available.
    """
    _check_sizes(train, val, validation_images, calibration_images)
    generator = torch.Generator().manual_seed(seed)
    order = stratified_order(train.labels, generator)
    if val is None:
        scored, source, rest = order, train, order[2 * validation_images :]
    else:
        scored, source, rest = stratified_order(val.labels, generator), val, order
        validation_images = min(validation_images, len(val) // 2)
    return Splits(
        train=train.subset(rest),
        validation=source.subset(scored[:validation_images]),
        holdout=source.subset(scored[validation_images : 2 * validation_images]),
        calibration=train.subset(rest[:calibration_images]),
    )


def _check_sizes(train: ImageData, val: ImageData | None, validation_images: int, calibration_images: int) -> None:
    wrong = [
        f"{name} must be a whole number from 1 up, but got {value!r}"
        for name, value in (("validation_images", validation_images), ("calibration_images", calibration_images))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if val is not None and (val.classes != train.classes or val.image_shape != train.image_shape):
        wrong.append(
            "validation and training images must have the same classes and shape, but got "
            f"{len(val.classes)} classes, {val.image_shape} and {len(train.classes)} classes, {train.image_shape}"
        )
    if val is not None and len(val) < 2:
        wrong.append(f"val must hold at least 2 images, one for each half, but got {len(val)}")
    if not wrong:
        taken = 0 if val is not None else 2 * validation_images
        if taken + calibration_images > len(train):
            wrong.append(
                f"the training set has {len(train)} images, but validation_images={validation_images} takes {taken} "
                f"(validation and holdout) and calibration_images={calibration_images} needs as many of the rest"
            )
    if wrong:
        raise UserError("\n".join(wrong) + "\nset validation_images and calibration_images to what the data set has")


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of which every prefix has the classes in their proportions, to within rounding.

    Image r of the n of its class, in random order, stands at the fraction (r + 1/2) / n of the whole.
    """
    shuffled = torch.randperm(len(labels), generator=generator)  # (N,)
    fraction = torch.empty(len(labels), dtype=torch.float64)  # (N,), by place in `shuffled`
    for label in labels.unique():
        places = (labels[shuffled] == label).nonzero().view(-1)
        fraction[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return shuffled[fraction.argsort(stable=True)]
