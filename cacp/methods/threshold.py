"""One threshold for the channels of all groups: the least important of the whole model go, wherever they are."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cacp.budget import in_window, meets_targets
from cacp.cost import CostModel
from cacp.schema import Budget


def most_important_counts(importance: dict[str, Tensor], cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """Keep counts of the most important channels of the whole model that a reachable budget has room for.

    Args:
        importance: scores (C,) of every prunable group, comparable over groups.
        cost_model: of the same groups.
        budget: must be reachable.
    """
    return filled_up(threshold_counts(importance, cost_model, budget), importance, cost_model, budget)


def threshold_counts(importance: dict[str, Tensor], cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """Keep counts under the lowest threshold that meets the budget.

    Args:
        importance: scores (C,) of every prunable group, comparable over groups.
        cost_model: of the same groups.
        budget: must be reachable.
    """
    dropped_from = _drop_order(importance, cost_model, cost_model.min_keep)

    def counts_after(dropped: int) -> np.ndarray:
        kept = cost_model.channels - np.bincount(dropped_from[:dropped], minlength=len(cost_model.names))
        return cost_model.rounded_down(kept)

    fewest, most = 0, len(dropped_from)  # cost never grows with a drop: bisect
    while fewest < most:
        middle = (fewest + most) // 2
        if meets_targets(cost_model.cost(counts_after(middle)), cost_model.dense, budget):
            most = middle
        else:
            fewest = middle + 1
    return tuple(counts_after(fewest).tolist())


def filled_up(
    counts: tuple[int, ...], importance: dict[str, Tensor], cost_model: CostModel, budget: Budget
) -> tuple[int, ...]:
    """Take back dropped channels that still fit, the most important first, until the budget is used up.

    The last channel under a threshold may be one of a residual stream, several percent of the MACs wide.
    """
    filled = np.array(counts)
    lost = {
        name: importance[name].sort(descending=True).values[count:]
        for name, count in zip(cost_model.names, counts, strict=True)
    }
    for group in _drop_order(lost, cost_model, np.zeros_like(filled))[::-1]:
        if in_window(cost_model.cost(filled), cost_model.dense, budget):
            break
        before, filled[group] = filled[group], cost_model.next_count(filled, group)
        if not meets_targets(cost_model.cost(filled), cost_model.dense, budget):
            filled[group] = before
    return tuple(filled.tolist())


def _drop_order(importance: dict[str, Tensor], cost_model: CostModel, kept: np.ndarray) -> np.ndarray:
    """(D,) group of the channel that goes next, the least important first; the best `kept` of each group never go."""
    scores = [np.sort(importance[name].numpy()) for name in cost_model.names]
    scores = [values[: len(values) - count] for values, count in zip(scores, kept, strict=True)]
    owners = [np.full(len(values), group) for group, values in enumerate(scores)]
    return np.concatenate(owners)[np.argsort(np.concatenate(scores), kind="stable")]
