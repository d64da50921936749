"""One global threshold on Taylor scores (Molchanov et al., CVPR 2019): the least important channels of the whole model
go, until the budget is met; then those that still fit come back. No group falls below its minimum."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cacp.budget import meets_targets
from cacp.cost import CostModel
from cacp.importance import channel_orders
from cacp.methods.subject import Subject
from cacp.schema import Budget, Policy
from cacp.slicing import counts_policy


def taylor(subject: Subject, budget: Budget) -> Policy:
    """The policy that drops the fewest channels, in the order of their Taylor scores, that meets the budget."""
    importance = subject.importance("taylor")
    counts = threshold_counts(importance, subject.cost_model, budget)
    return counts_policy(subject.groups, counts, channel_orders(importance), "taylor")


def threshold_counts(importance: dict[str, Tensor], cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """Keep counts under the lowest global threshold that meets the budget, filled up to use it up.

    Args:
        importance: scores (C,) of every prunable group, comparable over groups.
        cost_model: of the same groups.
        budget: must be reachable.
    """
    scores, owners = [], []
    for position, name in enumerate(cost_model.names):
        droppable = np.sort(importance[name].numpy())[: cost_model.channels[position] - cost_model.min_keep[position]]
        scores.append(droppable)
        owners.append(np.full(len(droppable), position))
    order = np.argsort(np.concatenate(scores), kind="stable")
    dropped_from = np.concatenate(owners)[order]  # (D,) group of the channel that goes next

    def counts_after(dropped: int) -> np.ndarray:
        return cost_model.channels - np.bincount(dropped_from[:dropped], minlength=len(cost_model.names))

    fewest, most = 0, len(dropped_from)  # cost falls with every drop: bisect
    while fewest < most:
        middle = (fewest + most) // 2
        if meets_targets(cost_model.cost(counts_after(middle)), cost_model.dense, budget):
            most = middle
        else:
            fewest = middle + 1
    return tuple(_filled_up(counts_after(fewest), dropped_from[:fewest][::-1], cost_model, budget))


def _filled_up(counts: np.ndarray, dropped_from: np.ndarray, cost_model: CostModel, budget: Budget) -> list[int]:
    """Take back the dropped channels that still fit, the most important first: a threshold's last step may be wide."""
    for group in dropped_from:
        counts[group] += 1
        if not meets_targets(cost_model.cost(counts), cost_model.dense, budget):
            counts[group] -= 1
    return counts.tolist()
