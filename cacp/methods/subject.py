"""What a method gets to work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cacp.cost import CostModel
from cacp.schema import ChannelGroups, Policy, Score


class Subject(NamedTuple):
    """A model as the methods see it.

    `importance(criterion)` gives the scores (C,) of the channels of every prunable group; `criterion` is the one that
    the experiment asks for, a method with a criterion of its own ignores it. `score(policy)` measures a policy, equal
    ones once; a method that measures scores at most `evaluations` for all budgets.
    """

    groups: ChannelGroups
    cost_model: CostModel
    importance: Callable[[str], dict[str, Tensor]]
    criterion: str
    score: Callable[[Policy], Score]
    evaluations: int
