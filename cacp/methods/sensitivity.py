"""One threshold on measured degradation, as FastNAS (NVIDIA ModelOpt) does it: every group is pruned alone to a number
of widths and scored; a budget's policy prunes each group as far as its own degradation stays within one threshold, the
least that meets the budget. The measurements serve every budget.

Differences from FastNAS: widths between two measured ones take the degradation on the line between them, so that any
count can be had; what the threshold leaves of the budget goes to the groups that gain most by it for what it costs.

Shapes: G prunable groups, T targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from cacp.budget import meets_targets
from cacp.cost import CostModel
from cacp.importance import channel_orders
from cacp.methods.subject import Pruned, Subject
from cacp.schema import COSTS, Budget
from cacp.slicing import counts_policy

BISECTIONS = 60

Counts = tuple[int, ...]


def sensitivity(subject: Subject, budget: Budget) -> Pruned:
    """The policy under the least threshold on the degradation of single groups."""
    orders = channel_orders(subject.importance(subject.criterion))

    def scores(policies: Sequence[Counts]) -> list[float]:
        asked = [counts_policy(subject.groups, counts, orders, subject.criterion) for counts in policies]
        return [score.probability for score in subject.scores(asked)]

    curves = degradation_curves(scores, subject.cost_model, subject.evaluations)  # scored once for all budgets
    counts = threshold_counts(curves, subject.cost_model, budget)
    return Pruned(counts_policy(subject.groups, counts, orders, subject.criterion))


def degradation_curves(
    scores: Callable[[Sequence[Counts]], list[float]], cost_model: CostModel, evaluations: int
) -> list[np.ndarray]:
    """What the score loses when one group alone is pruned, for all its counts; no count is worse than a smaller one.

    Args:
        scores: keep counts of all prunable groups, of several policies -> a number each, the higher the better.
        cost_model: of the groups.
        evaluations: how many policies may be scored, shared evenly by the groups as far as they have so many counts, at
            least one a group; the dense one is one of them.

    Returns:
        For every group (channels + 1,), by count; nan where a group may not have that count, 0 at the end.
    """
    whole = tuple(cost_model.channels.tolist())
    spans = [len(feasible) - 1 for feasible in cost_model.feasible]
    share = _share(spans, evaluations - 1)
    widths_of = []  # G of (W,), the last one all channels
    for feasible, channels in zip(cost_model.feasible, whole, strict=True):
        asked = np.linspace(feasible[0], channels, min(share, len(feasible) - 1) + 1).round()  # (W,)
        widths_of.append(feasible[np.unique(np.abs(feasible[:, None] - asked).argmin(axis=0))])
    narrowed = [
        (*whole[:group], width, *whole[group + 1 :])
        for group, widths in enumerate(widths_of)
        for width in widths[:-1].tolist()
    ]
    dense, *values = scores([whole, *narrowed])
    remaining, curves = iter(values), []
    for feasible, channels, widths in zip(cost_model.feasible, whole, widths_of, strict=True):
        losses = [dense - value for value in itertools.islice(remaining, len(widths) - 1)]
        monotone = np.maximum.accumulate([0.0, *losses[::-1]])[::-1]
        curve = np.full(channels + 1, np.nan)
        curve[feasible] = np.interp(feasible, widths, monotone)
        curves.append(curve)
    return curves


def _share(spans: Sequence[int], evaluations: int) -> int:
    """The most evaluations a group with which all have enough, where none takes more than its span."""
    share = 1
    while share < max(spans) and sum(min(share + 1, span) for span in spans) <= evaluations:
        share += 1
    return share


def threshold_counts(curves: Sequence[np.ndarray], cost_model: CostModel, budget: Budget) -> tuple[int, ...]:
    """The counts under the least threshold on the degradation that meets the budget, filled up to it.

    Args:
        curves: from `degradation_curves`.
        cost_model: of the same groups.
        budget: must be reachable.
    """

    def counts_within(threshold: float) -> np.ndarray:
        return np.array([int(np.flatnonzero(curve <= threshold)[0]) for curve in curves])

    low, high = 0.0, max(float(np.nanmax(curve)) for curve in curves)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if meets_targets(cost_model.cost(counts_within(middle)), cost_model.dense, budget):
            high = middle
        else:
            low = middle
    return _filled_up(counts_within(high), curves, cost_model, budget)


def _filled_up(
    counts: np.ndarray, curves: Sequence[np.ndarray], cost_model: CostModel, budget: Budget
) -> tuple[int, ...]:
    """The next count of one group after another, where the degradation falls most for its cost, as long as one fits."""
    columns = [COSTS.index(cost) for cost in budget.targets]
    limits = np.array(list(budget.targets.values())) * np.array(cost_model.dense)[columns]  # (T,)
    while True:
        steps = [cost_model.next_count(counts, group) for group in range(len(counts))]
        fitting = [
            (float(curves[group][counts[group]] - curves[group][step]) / added, group)
            for group, step in enumerate(steps)
            if step > counts[group]
            for added in [float((cost_model.change(counts, group, step)[columns] / limits).sum())]
            if meets_targets(cost_model.cost(_replaced(counts, group, step)), cost_model.dense, budget)
        ]
        if not fitting:
            return tuple(counts.tolist())
        group = max(fitting)[1]
        counts = _replaced(counts, group, steps[group])


def _replaced(counts: np.ndarray, group: int, count: int) -> np.ndarray:
    """Counts (G,) with another one for a group."""
    changed = counts.copy()
    changed[group] = count
    return changed
