"""What a method gets to work on, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from cacp.cost import CostModel
from cacp.data import ImageData
from cacp.recipe import Recipe
from cacp.schema import Budget, ChannelGroups, Normalisation, Policy, Score
from cacp.training import EpochRecord


class Training(NamedTuple):
    """What a method that trains goes by.

    `recipe` has the batch size, weight decay, augmentation and precision of the run; a method sets its own epochs,
    learning rate and schedule. `folder` is for its checkpoint. `track(records, epochs)` drives a training to its end
    and shows how it goes.
    """

    images: ImageData
    recipe: Recipe
    seed: int
    folder: Path
    track: Callable[[Iterator[EpochRecord], int], list[EpochRecord]]


class Subject(NamedTuple):
    """A model as the methods see it; none changes it.

    `importance(criterion)` gives the scores (C,) of the channels of every prunable group; `criterion` is the one that
    the experiment asks for, a method with a criterion of its own ignores it. `scores(policies)` measures policies,
    equal ones once; a method that measures scores at most `evaluations` for all budgets.
    """

    model: nn.Module
    groups: ChannelGroups
    cost_model: CostModel
    importance: Callable[[str], dict[str, Tensor]]
    criterion: str
    scores: Callable[[Sequence[Policy]], list[Score]]
    evaluations: int
    normalisation: Normalisation
    training: Training


class Pruned(NamedTuple):
    """The outcome of a method.

    `policy` is None where single weights are zero and no channel falls. `weights` is the state dict of the full-size
    network that the policy goes with, where a method has trained it. `details` are figures that explain the outcome.
    """

    policy: Policy | None
    weights: Mapping[str, Tensor] | None = None
    details: Mapping[str, float] = {}


Method = Callable[[Subject, Budget], Pruned]
