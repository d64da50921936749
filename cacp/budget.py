"""Which keep counts are still feasible under a budget, while a policy is chosen group by group.

Costs never fall when a count grows, so from any prefix of chosen counts the feasible counts of the next group form an
interval: small enough that the rest, pruned to its minimum, still meets every target, and large enough that the rest,
kept whole, still uses one of them up. A policy that stays inside these intervals meets the budget at its last group,
and no tail of layers is left to pay for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cacp.cost import CostModel
from cacp.schema import COSTS, TARGET_TOLERANCE, Budget, Cost, UserError


class KeepInterval(NamedTuple):
    """Feasible keep counts of one group: low and high, and the real count at an even share of the rest, between."""

    low: int
    even: float
    high: int


class _Bounds(NamedTuple):
    """Window of every targeted cost: columns of CostModel.costs, and (T,) limits in units of the cost."""

    columns: list[int]
    upper: np.ndarray
    lower: np.ndarray


def _bounds(cost_model: CostModel, budget: Budget) -> _Bounds:
    columns = [COSTS.index(cost) for cost in budget.targets]
    dense = np.array([cost_model.dense[column] for column in columns], dtype=np.float64)
    targets = np.array(list(budget.targets.values()))
    return _Bounds(columns, targets * dense + 1e-6, (targets - TARGET_TOLERANCE) * dense - 1e-6)


def keep_interval(cost_model: CostModel, budget: Budget, chosen: Sequence[int]) -> KeepInterval:
    """Feasible counts of group number `len(chosen)`, given the counts chosen for the groups before it.

    Where the channel grain leaves no count that meets the targets and uses one up, the largest that meets them is the
    only one left; the targets themselves always hold if they held for `chosen`.

    Args:
        cost_model: of the model.
        budget: must be reachable, see `check_reachable`.
        chosen: counts of the first groups, in the order of `cost_model.names`.
    """
    group = len(chosen)
    bounds = _bounds(cost_model, budget)
    candidates = np.arange(cost_model.min_keep[group], cost_model.channels[group] + 1)  # (K,)
    completed = [_completed(chosen, candidates, rest) for rest in (cost_model.min_keep, cost_model.channels)]
    smallest, largest = cost_model.costs(np.stack(completed))[..., bounds.columns]  # (K, T) each
    meets = (smallest <= bounds.upper).all(axis=1)  # (K,)
    uses_up = (largest >= bounds.lower).any(axis=1)  # (K,)
    high = int(candidates[meets][-1]) if meets.any() else int(candidates[0])
    feasible = candidates[meets & uses_up]
    low = int(feasible[0]) if len(feasible) else high
    even = even_ratio(cost_model, budget, chosen) * float(cost_model.channels[group])
    return KeepInterval(low, min(max(even, low), high), high)


def _completed(chosen: Sequence[int], candidates: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(K, G) counts: the chosen ones, each candidate, and `rest` for the groups after it."""
    counts = np.tile(rest.astype(np.float64), (len(candidates), 1))
    counts[:, : len(chosen)] = chosen
    counts[:, len(chosen)] = candidates
    return counts


def even_ratio(cost_model: CostModel, budget: Budget, chosen: Sequence[int] = ()) -> float:
    """The largest keep ratio in (0, 1] that all remaining groups can share within the budget (real-valued counts)."""
    bounds = _bounds(cost_model, budget)
    low, high = 0.0, 1.0
    for _ in range(4):  # four times a grid of 33 ratios: resolution 1e-6
        ratios = np.linspace(low, high, 33)
        counts = np.maximum(ratios[:, None] * cost_model.channels, cost_model.min_keep)  # (R, G)
        counts[:, : len(chosen)] = chosen
        meets = (cost_model.costs(counts)[:, bounds.columns] <= bounds.upper).all(axis=1)
        last = int(np.flatnonzero(meets)[-1]) if meets.any() else 0
        low, high = ratios[last], ratios[min(last + 1, 32)]
    return float(low)


def keep_count(interval: KeepInterval, action: float) -> int:
    """The keep count for an action in [-1, 1]: 0 is the even share, -1 and 1 the ends, linear between.

    >>> [keep_count(KeepInterval(4, 8.0, 16), action) for action in (-1, -0.5, 0, 0.5, 1)]
    [4, 6, 8, 12, 16]
    """
    end = interval.high if action >= 0 else interval.low
    count = interval.even + abs(action) * (end - interval.even)
    return min(max(round(count), interval.low), interval.high)


def uniform_counts(cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """Keep counts of the uniform policy: every group takes its even share of what is left."""
    chosen: list[int] = []
    for _ in cost_model.names:
        chosen.append(keep_count(keep_interval(cost_model, budget, chosen), 0.0))
    return tuple(chosen)


def reachable_fractions(cost_model: CostModel) -> dict[str, float]:
    """The least fraction of each dense cost that a policy can reach (every group at its minimum)."""
    least = cost_model.cost(cost_model.min_keep)
    return {cost: least[column] / cost_model.dense[column] for column, cost in enumerate(COSTS)}


def check_reachable(cost_model: CostModel, budget: Budget) -> None:
    """Refuse a budget that no policy can meet.

    Raises:
        UserError: naming the cost, the target and the reachable range.
    """
    if not cost_model.names:
        raise UserError("the model has no prunable group; scope all prunes residual streams too")
    least = reachable_fractions(cost_model)
    wrong = [
        f"{cost} {target:g} (reachable: {least[cost]:.3f} to 1)"
        for cost, target in budget.targets.items()
        if target < least[cost]
    ]
    if wrong:
        raise UserError(
            f"no policy meets {', '.join(wrong)}; every group keeps at least a tenth of its channels: "
            "raise the target, or use scope all to prune residual streams too"
        )


def meets_targets(cost: Cost, dense: Cost, budget: Budget) -> bool:
    """Whether a cost lies at or below every target."""
    return all(fraction <= target + 1e-12 for fraction, target in _fractions(cost, dense, budget))


def in_window(cost: Cost, dense: Cost, budget: Budget) -> bool:
    """Whether a cost meets every target and lies within the tolerance below at least one of them."""
    used_up = any(fraction >= target - TARGET_TOLERANCE - 1e-12 for fraction, target in _fractions(cost, dense, budget))
    return used_up and meets_targets(cost, dense, budget)


def _fractions(cost: Cost, dense: Cost, budget: Budget) -> list[tuple[float, float]]:
    """(kept fraction, target) of every targeted cost."""
    columns = [(COSTS.index(name), target) for name, target in budget.targets.items()]
    return [(cost[column] / dense[column], target) for column, target in columns]
