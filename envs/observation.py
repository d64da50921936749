"""What the agent sees: a pure function of (groups, counts chosen so far, budget), so an episode can be told again for
another target.

Features of a step, all in [0, 1] (AMC's state, He et al., ECCV 2018, with the target of CACP in front):

    0   target: the kept fraction asked for (the mean, where the budget is of several costs)
    1   position of the group among the prunable ones
    2-9 of the first layer that produces the group, min-max normalised over the groups: channels, input channels,
        feature-map height, kernel, stride, parameters and MACs of the layer, MACs of the layers that read the group
    10  fraction of the dense cost (MACs, or else params or latency) that stays if all remaining groups are kept whole
    11  the same if all remaining groups are pruned to their minimum
    12  even share: the keep ratio at which the remaining groups share the rest of the budget evenly
    13  least feasible keep ratio of this group
    14  largest feasible keep ratio of this group
    15  previous keep ratio (1 before the first group)

A budget of several costs adds three for each cost: its target, and what 10 and 11 say of it.
"""

from __future__ import annotations

import numpy as np

from cacp.budget import BudgetWalk, KeepInterval
from cacp.schema import COSTS, Axis, ChannelGroup, ChannelGroups

_STATIC = slice(2, 10)


def static_features(groups: ChannelGroups) -> np.ndarray:
    """(G, 8) float64 features of the prunable groups, min-max normalised over them; 0 where all are equal."""
    rows = np.array([_group_features(groups, group) for group in groups.prunable], dtype=np.float64)
    least = rows.min(axis=0)
    spread = rows.max(axis=0) - least
    return (rows - least) / np.where(spread > 0, spread, 1.0)


def _group_features(groups: ChannelGroups, group: ChannelGroup) -> list[float]:
    layers = {layer.module: layer for layer in groups.layers}
    producers = [layers[name] for name in group.producers if name in layers]
    first = producers[0]
    inputs = _entries(groups, first.inputs) if first.inputs else 1
    readers = [layers[name] for name in group.consumers if name in layers]
    reading_macs = sum(
        layer.macs_per_pair * _entries(groups, layer.inputs) * _entries(groups, layer.outputs)
        for layer in readers
        if layer.inputs
    )
    return [
        group.channels,
        inputs,
        first.height,
        first.kernel,
        first.stride,
        first.params_per_pair * inputs * group.channels,
        first.macs_per_pair * inputs * group.channels,
        reading_macs,
    ]


def _entries(groups: ChannelGroups, axis: Axis) -> int:
    return axis.repeat * sum(groups[name].channels for name in axis.segments)


def features(costs: int) -> int:
    """Entries of an observation under budgets of so many costs."""
    return 16 + (3 * costs if costs > 1 else 0)


def observe(static: np.ndarray, walk: BudgetWalk, interval: KeepInterval | None) -> np.ndarray:
    """(features(costs of the budget),) float32 before the next count of `walk` is chosen.

    Args:
        static: (G, 8) from `static_features` of the same groups.
        walk: the counts so far, and the budget.
        interval: feasible counts of the next group; None after the last one, whose observation keeps the last step's
            static features and a closed interval.
    """
    channels, chosen = walk.cost_model.channels, walk.chosen
    step = len(chosen)
    group = min(step, len(channels) - 1)
    targets = walk.budget.targets
    columns = [COSTS.index(cost) for cost in targets]
    least, most = walk.ends[:, columns] / np.array(walk.cost_model.dense)[columns]  # (costs,) each
    low, even, high, _ = interval or KeepInterval(chosen[-1], chosen[-1], chosen[-1])
    observation = np.empty(features(len(columns)), dtype=np.float32)
    observation[0] = walk.budget.mean_target
    observation[1] = step / len(channels)
    observation[_STATIC] = static[group]
    observation[10:12] = most[0], least[0]
    observation[12:15] = np.array([even, low, high]) / channels[group]
    observation[15] = chosen[-1] / channels[step - 1] if step else 1.0
    if len(columns) > 1:
        observation[16:] = np.stack([list(targets.values()), most, least]).T.ravel()
    return observation
