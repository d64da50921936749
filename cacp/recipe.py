"""How a model is trained: optimiser, loss, augmentation, weight averaging.

Letters: B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cacp.evaluation import PRECISIONS
from cacp.schedules import SCHEDULE_HELP, is_schedule
from cacp.schema import UserError

LARGEST_LR, ENOUGH_STEPS = 0.1, 2000
Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains: SGD, on images that are mirrored at random (`flip`), shifted by up to `padding` pixels, and
    blackened in a square of `erasing` pixels a side; with `resized_crop`, instead of a shift, random crops of any size
    and shape (ImageNet's way).

    `lr` is the highest learning rate of the schedule; None takes 0.1, less the shorter the training is (`highest_lr`).
    `decay_all` False spares batch norms and biases the weight decay. `label_smoothing` is the part of the target that
    all classes share; `distillation` the part of the loss that compares with a teacher's outputs, at `temperature`
    (Hinton et al., 2015). With `ema_decay` above 0 the weights that count are their exponential moving average.

    Raises:
        UserError: listing every value that is out of range.
    """

    epochs: int
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_all: bool = True
    batch_size: int = 256
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    ema_decay: float = 0.0
    padding: int = 4
    flip: bool = True
    erasing: int = 0
    resized_crop: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (self.lr is None or 0 < self.lr < math.inf, "positive"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "nesterov": (self.momentum > 0 or not self.nesterov, "false without momentum"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "schedule": (is_schedule(self.schedule), SCHEDULE_HELP),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "distillation": (0 <= self.distillation <= 1, "in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "positive"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "padding": (self.padding >= 0, "0 or more"),
            "erasing": (self.erasing >= 0, "0 or more"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        }
        wrong = [
            f"{name} must be {rule}, but got {getattr(self, name)!r}" for name, (met, rule) in rules.items() if not met
        ]
        if wrong:
            raise UserError("; ".join(wrong))

    def steps(self, images: int) -> int:
        """Mini-batches of a pass over so many images."""
        return math.ceil(images / self.batch_size)

    def highest_lr(self, images: int) -> float:
        """The learning rate that the schedule starts from, in a training on so many images.

        Without `lr` it is 0.1 for 2,000 steps or more and falls with the root of their number below: a pruned network
        that is trained for short must not be thrown far from where it stands (measured at 294 and 980 steps, without
        a teacher: results/LOG.md).

        >>> [round(Recipe(epochs).highest_lr(images=25_600), 3) for epochs in (1, 5, 20, 400)]
        [0.022, 0.05, 0.1, 0.1]
        """
        if self.lr is not None:
            return self.lr
        return LARGEST_LR * min(1.0, math.sqrt(self.epochs * self.steps(images) / ENOUGH_STEPS))

    def loss(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """The mean () over a batch: logits (B, K), labels (B,), and the teacher's logits (B, K), if there is one."""
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if taught is None:
            return loss
        answers, wanted = (F.log_softmax(one.float() / self.temperature, 1) for one in (logits, taught))
        difference = F.kl_div(answers, wanted, reduction="batchmean", log_target=True) * self.temperature**2
        return torch.lerp(loss, difference, self.distillation)


def saved_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings, and others, as a file holds them; those that an older version did not know have defaults."""
    return {**asdict(Recipe(epochs=1)), **settings}


def sgd_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over what is trained; `train` sets the learning rate of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not recipe.decay_all:
        spared = [parameter for parameter in parameters if parameter.dim() == 1]
        decayed = [parameter for parameter in parameters if parameter.dim() > 1]
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups,
        recipe.lr or LARGEST_LR,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


def moving_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Of the weights and batch norm statistics over the steps; None where the recipe wants none.

    Integers (indices of channels, numbers of steps) stay those of the model: a mean of them would be rounded down.
    """
    if not recipe.ema_decay:
        return None
    exponential = get_ema_multi_avg_fn(recipe.ema_decay)

    def update(averages: Tensors, latest: Tensors, steps: Tensor | int) -> None:  # all of one dtype
        if averages[0].is_floating_point():
            exponential(averages, latest, steps)
        else:
            for average, tensor in zip(averages, latest, strict=True):
                average.copy_(tensor)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
