"""What the agent sees: a pure function of (groups, counts chosen so far, budget), so an episode can be told again for
another target.

Features of a step, all in [0, 1] (AMC's state, He et al., ECCV 2018, with the target of CACP in front):

    0   target: the kept fraction asked for (the mean, where a budget has several)
    1   position of the group among the prunable ones
    2-9 of the first layer that produces the group, min-max normalised over the groups: channels, input channels,
        feature-map height, kernel, stride, parameters and MACs of the layer, MACs of the layers that read the group
    10  fraction of the dense MACs that stays if all remaining groups are kept whole
    11  fraction of the dense MACs that stays if all remaining groups are pruned to their minimum
    12  even share: the keep ratio at which the remaining groups share the rest of the budget evenly
    13  least feasible keep ratio of this group
    14  largest feasible keep ratio of this group
    15  previous keep ratio (1 before the first group)
"""

from __future__ import annotations

import numpy as np

from cacp.budget import BudgetWalk, KeepInterval
from cacp.schema import Axis, Budget, ChannelGroup, ChannelGroups

FEATURES = 16
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


def mean_target(budget: Budget) -> float:
    """The target that stands for a budget: its only one, or the mean of several."""
    return sum(budget.targets.values()) / len(budget.targets)


def observe(static: np.ndarray, walk: BudgetWalk, interval: KeepInterval | None) -> np.ndarray:
    """(FEATURES,) float32 before the next count of `walk` is chosen.

    Args:
        static: (G, 8) from `static_features` of the same groups.
        walk: the counts so far, and the budget.
        interval: feasible counts of the next group; None after the last one, whose observation keeps the last step's
            static features and a closed interval.
    """
    channels, chosen = walk.cost_model.channels, walk.chosen
    step = len(chosen)
    group = min(step, len(channels) - 1)
    least, most = walk.ends[:, 0] / walk.cost_model.dense.macs
    low, even, high, _ = interval or KeepInterval(chosen[-1], chosen[-1], chosen[-1])
    observation = np.empty(FEATURES, dtype=np.float32)
    observation[0] = mean_target(walk.budget)
    observation[1] = step / len(channels)
    observation[_STATIC] = static[group]
    observation[10:12] = most, least
    observation[12:15] = np.array([even, low, high]) / channels[group]
    observation[15] = chosen[-1] / channels[step - 1] if step else 1.0
    return observation
