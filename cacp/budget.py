"""Which keep counts are still feasible under a budget, while a policy is chosen group by group.

Costs never fall when a count grows, so from any prefix of chosen counts the feasible counts of the next group form an
interval: small enough that the rest, pruned to its minimum, still meets every target, and large enough that the rest,
kept whole, still uses one of them up. A policy that stays inside these intervals meets the budget at its last group,
and no tail of layers is left to pay for the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cacp.cost import CostModel
from cacp.schema import COSTS, TARGET_TOLERANCE, Budget, Cost, UserError

SCALING_STEPS = 25  # bisections: the factor is known to 1e-6 of the largest


class KeepInterval(NamedTuple):
    """Feasible keep counts of one group: low and high, and the real count at an even share of the rest, between.

    Counts between low and high are multiples of `multiple`.
    """

    low: int
    even: float
    high: int
    multiple: int = 1


class BudgetWalk:
    """Keep counts chosen group after group, in the order of `cost_model.names`, under a budget.

    The costs are kept up to date for the rest of the groups at a few keep ratios: 0, 1, and those at which a group
    leaves its minimum. The time of a step grows with their number (one for each different width) and with the groups
    that share a layer, not with depth.

    Args:
        cost_model: of the model.
        budget: must be reachable, see `check_reachable`.

    Attributes:
        chosen: counts of the first groups.
    """

    def __init__(self, cost_model: CostModel, budget: Budget) -> None:
        self.cost_model = cost_model
        self.budget = budget
        self.chosen: list[int] = []
        self._columns = [COSTS.index(cost) for cost in budget.targets]  # (T,) of the costs
        dense = np.array([cost_model.dense[column] for column in self._columns], dtype=np.float64)
        targets = np.array(list(budget.targets.values()))
        self._upper = targets * dense + 1e-6  # (T,) in units of the costs
        self._lower = (targets - TARGET_TOLERANCE) * dense - 1e-6  # (T,)
        self._ratios = _ratios(cost_model)  # (R,)
        # (R, G): the chosen counts, then the rest at each ratio, real-valued
        self._counts = np.maximum(self._ratios[:, None] * cost_model.channels, cost_model.min_keep)
        self._costs = cost_model.costs(self._counts)  # (R, D)

    @property
    def finished(self) -> bool:
        return len(self.chosen) == len(self.cost_model.names)

    def choose(self, count: int) -> None:
        """Keep this many channels of the next group."""
        group = len(self.chosen)
        self._costs = self._costs + self.cost_model.change(self._counts, group, np.array(count))
        self._counts[:, group] = count
        self.chosen.append(count)

    @property
    def ends(self) -> np.ndarray:
        """(2, D) costs if all remaining groups are pruned to their minimum, and if they are kept whole."""
        return self._costs[[0, -1]]

    def interval(self) -> KeepInterval:
        """Feasible counts of the next group.

        Where the channel grain leaves no count that meets the targets and uses one up, the largest that meets them is
        the only one left; the targets themselves always hold if they held so far.
        """
        group, model = len(self.chosen), self.cost_model
        candidates = model.feasible[group]  # (K,)
        changes = model.change(self._counts[[0, -1], None], group, candidates)  # (2, K, D)
        smallest, largest = (self.ends[:, None] + changes)[..., self._columns]  # (K, T) each
        meets = (smallest <= self._upper).all(axis=1)  # (K,)
        uses_up = (largest >= self._lower).any(axis=1)  # (K,)
        high = int(candidates[meets][-1]) if meets.any() else int(candidates[0])
        feasible = candidates[meets & uses_up]
        low = int(feasible[0]) if len(feasible) else high
        even = self.even_ratio() * float(model.channels[group])
        return KeepInterval(low, min(max(even, low), high), high, int(model.multiple[group]))

    def even_ratio(self) -> float:
        """The largest keep ratio in [0, 1] that all remaining groups can share within the budget (real-valued counts).

        Between two ratios at which a group leaves its minimum, a cost is a polynomial of second degree.
        """
        costs = self._costs[:, self._columns]  # (R, T)
        meets: np.ndarray = np.all(costs[::2] <= self._upper, axis=1)  # at every ratio but the middles
        if not meets[0] or meets[-1]:
            return float(meets[0])
        first = 2 * (int(np.argmin(meets)) - 1)
        low, middle, high = costs[first : first + 3]  # (T,) each
        room = self._upper - low
        slope, bend = 4 * middle - 3 * low - high, 2 * low - 4 * middle + 2 * high  # cost = low + slope u + bend u^2
        root = np.sqrt(np.maximum(slope**2 + 4 * bend * room, 0.0))
        parts = np.divide(2 * room, slope + root, out=np.ones_like(room), where=slope + root > 0)  # (T,) u in [0, 1]
        start, end = self._ratios[[first, first + 2]]
        return float(start + min(parts.min(), 1.0) * (end - start))


def _ratios(cost_model: CostModel) -> np.ndarray:
    """(R,) ascending: 0, those at which a group leaves its minimum, 1, and the middle between each of these."""
    bends = np.unique([0.0, *cost_model.min_keep / cost_model.channels, 1.0])
    return np.sort(np.concatenate([bends, (bends[1:] + bends[:-1]) / 2]))


def keep_count(interval: KeepInterval, action: float) -> int:
    """The keep count for an action in [-1, 1]: 0 is the even share, -1 and 1 the ends, linear between.

    >>> [keep_count(KeepInterval(4, 8.0, 16), action) for action in (-1, -0.5, 0, 0.5, 1)]
    [4, 6, 8, 12, 16]
    >>> [keep_count(KeepInterval(8, 14.0, 20, multiple=8), action) for action in (-1, 0, 0.5, 1)]
    [8, 16, 16, 20]
    """
    end = interval.high if action >= 0 else interval.low
    count = interval.even + abs(action) * (end - interval.even)
    nearest = round(count / interval.multiple) * interval.multiple
    if abs(interval.high - count) < abs(nearest - count):  # all channels of a group, which may be no multiple
        nearest = interval.high
    return min(max(nearest, interval.low), interval.high)


def keep_action(interval: KeepInterval, count: int) -> float:
    """The action in [-1, 1] for a count: `keep_count` of it gives that count, or the nearest in the interval.

    >>> [keep_action(KeepInterval(4, 8.0, 16), count) for count in (4, 6, 8, 12, 16, 20)]
    [-1.0, -0.5, 0.0, 0.5, 1.0, 1.0]
    """
    end = interval.high if count >= interval.even else interval.low
    width = abs(end - interval.even)
    return max(-1.0, min(1.0, (count - interval.even) / width)) if width else 0.0


def scaled_ratios(cost_model: CostModel, budget: Budget, ratios: np.ndarray) -> np.ndarray:
    """Each policy's keep ratios times the one number with which it just meets the budget (real-valued counts).

    Args:
        cost_model: of the groups.
        budget: must be reachable.
        ratios: (N, G), positive; results stay between a group's minimum and 1.

    Returns:
        (N, G).
    """
    least = cost_model.min_keep / cost_model.channels  # (G,)
    columns = [COSTS.index(cost) for cost in budget.targets]
    limits = np.array(list(budget.targets.values())) * np.array(cost_model.dense)[columns]  # (T,)

    def scaled(factors: np.ndarray) -> np.ndarray:
        return np.clip(ratios * factors[:, None], least, 1.0)

    low, high = np.zeros(len(ratios)), 1 / ratios.min(axis=1)  # all at their minimum, and all whole
    for _ in range(SCALING_STEPS):
        middle = (low + high) / 2
        costs = cost_model.costs(scaled(middle) * cost_model.channels)[:, columns]  # (N, T)
        meets = (costs <= limits).all(axis=1)
        low, high = np.where(meets, middle, low), np.where(meets, high, middle)
    return scaled(low)


def uniform_counts(cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """Keep counts of the uniform policy: every group takes its even share of what is left."""
    walk = BudgetWalk(cost_model, budget)
    while not walk.finished:
        walk.choose(keep_count(walk.interval(), 0.0))
    return tuple(walk.chosen)


def reachable_fractions(cost_model: CostModel) -> dict[str, float]:
    """The least fraction of each dense cost that a policy can reach (every group at its minimum)."""
    least = cost_model.cost(cost_model.min_keep)
    return {cost: least[column] / cost_model.dense[column] for column, cost in enumerate(cost_model.cost_names)}


def check_prunable(cost_model: CostModel) -> None:
    """Refuse a model without a prunable group.

    Raises:
        UserError: with what may be in the way.
    """
    if not cost_model.names:
        raise UserError(
            "the model has no prunable group; scope all prunes residual streams too, ignore keeps groups whole"
        )


def check_reachable(cost_model: CostModel, budget: Budget) -> None:
    """Refuse a budget that no policy can meet.

    Raises:
        UserError: naming the cost, the target and the reachable range; or for a cost that is not known.
    """
    check_prunable(cost_model)
    least = reachable_fractions(cost_model)
    if unknown := [cost for cost in budget.targets if cost not in least]:
        raise UserError(
            f"{', '.join(unknown)} of a policy is not known, but the budget is {budget.name}; the groups must have a "
            "latency table: cacp.latency_table.measure_table"
        )
    wrong = [
        f"{cost} {target:g} (reachable: {least[cost]:.3f} to 1)"
        for cost, target in budget.targets.items()
        if target < least[cost]
    ]
    if wrong:
        raise UserError(
            f"no policy meets {', '.join(wrong)}; no group falls below its least keep ratio: "
            "raise the target, lower min_keep or channel_multiple, ignore less, or use scope all"
            + (", or a larger latency_batch" if "latency" in budget.targets else "")
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
