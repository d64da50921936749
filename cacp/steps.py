"""A stretch of training: mini-batches one after another, on one process or on several.

The data order, the augmentation and dropout of a stretch are drawn from its seed alone.

Letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cacp.data import ImageData, augment, normalise
from cacp.evaluation import autocast, device_of, resolve_precision
from cacp.models.modes import training_flags_kept
from cacp.parallel import as_one, own_share, process, processes, send_to_others, summed
from cacp.recipe import Recipe, sgd_optimizer
from cacp.schedules import learning_rate
from cacp.schema import Normalisation, UserError

DIVERGENCE_CHECK_STEPS = 100  # reading the loss waits for the device, so not every step


class TrainingDiverged(UserError):
    """The loss or the weights became nan or infinite."""


class Totals:
    """Correct answers and summed loss, on the device; reading `top1` or `loss` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # (3,): correct images, nats, images

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,), mean loss ()."""
        correct = (logits.argmax(1) == labels).sum()
        count = torch.full((), len(labels), dtype=torch.float64, device=correct.device)
        self._sums += torch.stack([correct.double(), mean_loss.double() * count, count])

    def of_all(self) -> Totals:
        """Those of all processes together."""
        together = Totals(self._sums.device)
        together._sums = summed(self._sums)
        return together

    @property
    def top1(self) -> float:
        return float(self._sums[0] / self._sums[2])

    @property
    def loss(self) -> float:
        return float(self._sums[1] / self._sums[2])


@dataclass
class Learner:
    """What `train` changes, and the teacher it learns from where the recipe distils: (B, C, H, W) -> (B, classes)."""

    model: nn.Module
    optimizer: torch.optim.SGD
    average: AveragedModel | None = None
    teacher: nn.Module | None = None

    @property
    def result(self) -> nn.Module:
        """What is validated and kept: the average, if there is one."""
        if self.average is None:
            return self.model
        module: nn.Module = self.average.module
        return module


@dataclass(frozen=True)
class Stretch:
    """Mini-batches that are trained on one after another; `number`, from 1, is that of the epoch or a method's step.

    There are `batches` of them, or as many as one pass over the images has.
    """

    normalisation: Normalisation
    recipe: Recipe
    seed: int
    number: int
    batches: int | None = None


def train(
    learner: Learner,
    images: ImageData,
    stretch: Stretch,
    after_backward: Callable[[], None] | None = None,
) -> Totals:
    """Train a model in place, on all processes; all randomness comes from the stretch's seed and number.

    Args:
        learner: classifier, (B, C, H, W) -> (B, classes), and what goes with it.
        images: that it is trained on, augmented.
        stretch: of which mini-batches, and how.
        after_backward: called for every mini-batch when the gradients, of the whole batch, are there.

    Raises:
        TrainingDiverged: when the loss is not finite.
        UserError: on several processes, for fewer images in a mini-batch than these, or a parameter without gradient.
    """
    smallest = len(images) // stretch.recipe.steps(len(images))
    if smallest < processes():
        raise UserError(
            f"batch_size must be at least the number of processes that share a mini-batch ({processes()}), but got "
            f"{stretch.recipe.batch_size}"
        )
    send_to_others(_follow, (learner.model, learner.optimizer.state_dict(), learner.teacher, stretch), images)
    return _train(learner, images, stretch, after_backward)


def _follow(work: tuple[nn.Module, dict[str, Any], nn.Module | None, Stretch], images: ImageData) -> None:
    """What the other processes do meanwhile; the first one tells of what goes wrong, and averages the weights."""
    model, optimizer_state, teacher, stretch = work
    optimizer = sgd_optimizer(model, stretch.recipe)
    optimizer.load_state_dict(optimizer_state)
    with suppress(UserError):
        _train(Learner(model, optimizer, teacher=teacher), images, stretch, None)


def _train(learner: Learner, data: ImageData, stretch: Stretch, after_backward: Callable[[], None] | None) -> Totals:
    model, optimizer = learner.model, learner.optimizer
    device, recipe, seed = device_of(model), stretch.recipe, epoch_seed(stretch.seed, stretch.number)
    totals, dtype = Totals(device), resolve_precision(recipe.precision, device)
    steps, highest_lr = stretch.batches or recipe.steps(len(data)), recipe.highest_lr(len(data))
    batches = _batches(data, stretch, torch.Generator().manual_seed(seed), device)
    with training_flags_kept(model), seeded(seed + process(), device), as_one(model) as network:
        model.train()
        for step, (images, labels, whole) in enumerate(itertools.islice(batches, steps)):
            progress = stretch.number - 1 + (step + 0.5) / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.schedule, highest_lr, progress, recipe.epochs)
            model.zero_grad()
            with autocast(device, dtype):
                logits = network(images)  # (B, classes)
                taught = _answers(learner.teacher, images)
            loss = recipe.loss(logits, labels, taught)
            (loss * (len(labels) * processes() / whole)).backward()
            if step == 0 and processes() > 1:
                _check_all_take_part(model)
            if after_backward is not None:
                after_backward()
            optimizer.step()
            if learner.average is not None:
                learner.average.update_parameters(model)
            totals.add(logits.detach(), labels, loss.detach())
            if (step + 1) % DIVERGENCE_CHECK_STEPS == 0 and not math.isfinite(loss_so_far := totals.of_all().loss):
                raise diverged(stretch, optimizer, f"the training loss is {loss_so_far}")
    return totals.of_all()


def _answers(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    """A teacher's logits (B, classes)."""
    if teacher is None:
        return None
    with training_flags_kept(teacher), torch.no_grad():
        return teacher.eval()(images)


def _check_all_take_part(model: nn.Module) -> None:
    """Refuse parameters without gradient, for which DistributedDataParallel would wait."""
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle:
        raise UserError(
            f"on several processes every parameter must take part in the loss, but {', '.join(idle)} do not; set their "
            "requires_grad to False, or train without torchrun"
        )


def check_finite(loss: float, model: nn.Module, stretch: Stretch, optimizer: torch.optim.SGD) -> None:
    """Refuse a loss, weights or statistics that are not finite.

    Raises:
        TrainingDiverged: naming the epoch or step, the learning rate and the remedy.
    """
    if not math.isfinite(loss):
        raise diverged(stretch, optimizer, f"the training loss is {loss}")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise diverged(stretch, optimizer, "weights or batch norm statistics are not finite")


def diverged(stretch: Stretch, optimizer: torch.optim.SGD, what: str) -> TrainingDiverged:
    """The error that says where a training diverged, and what to do about it."""
    recipe, lr = stretch.recipe, optimizer.param_groups[0]["lr"]
    remedy = "lower the learning rate (--pretrain_lr, --finetune_lr, --method_lr)"
    device = optimizer.param_groups[0]["params"][0].device
    if resolve_precision(recipe.precision, device) != torch.float32:
        remedy += " or use --precision fp32"
    return TrainingDiverged(
        f"training diverged in epoch {stretch.number} at learning rate {lr:.3g}: {what}; {remedy}. "
        f"Nothing of epoch {stretch.number} was saved"
    )


def _batches(
    data: ImageData, stretch: Stretch, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Endless passes over the images in random order, augmented: this process's part of every batch, images
    (B, C, H, W), channels last in memory, and labels (B,), and the images of the whole batch.

    A pass has `recipe.steps(N)` batches, of sizes that differ by at most 1; no more are begun than the stretch has.
    """
    recipe = stretch.recipe
    while True:
        order = torch.randperm(len(data), generator=generator)  # (N,)
        batches = order.tensor_split(recipe.steps(len(data)))[: stretch.batches]
        for indices, pixels in zip(batches, _augmented(data, batches, recipe, generator, device), strict=True):
            images = normalise(pixels.to(device), stretch.normalisation)
            labels = data.labels[own_share(indices)].to(device, non_blocking=True)
            yield images.contiguous(memory_format=torch.channels_last), labels, len(indices)


def _augmented(
    data: ImageData, batches: Sequence[Tensor], recipe: Recipe, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """This process's part of the images at the indices (B,) of each batch, augmented: uint8 (B, C, H, W)."""
    if recipe.resized_crop:
        yield from data.cropped(batches, generator, recipe.flip, own_share)
        return
    for indices in batches:
        yield own_share(augment(data.batch(indices).to(device), generator, recipe.padding, recipe.flip, recipe.erasing))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch of a run; seed 0 in epoch 2 does not repeat seed 1 in epoch 1."""
    return (seed * 1_000_003 + epoch) % 2**63


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout knows only the global generators: seed them, and put them back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
