"""What a policy costs, in closed form, and what a real model costs, counted.

MACs are the multiply-accumulates of conv and linear layers for one image (the papers' "FLOPs"); parameters are all of
the model's. Both are sums over layers of `coefficient * n_in * n_out`, so polynomials of second degree in the kept
channel counts: a policy costs microseconds, and many policies a few products. `torch.utils.flop_counter` counts 2 per
MAC. Latency is a third polynomial of this kind where the groups have one, measured by `cacp.latency_table`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cacp.models.modes import training_flags_kept
from cacp.schema import COSTS, Axis, ChannelGroups, Cost, Layer


class CostModel:
    """Cost of every choice of keep counts of a model's prunable groups.

    Attributes:
        names: the prunable groups, in forward order; every array of counts follows it.
        channels: (G,) int64, channels of each of these groups.
        min_keep: (G,) int64, the least count of each.
        multiple: (G,) int64, what the counts of each are multiples of, all its channels aside.
        feasible: for each the counts that it may have, (K,) int64, ascending.
        cost_names: what is known of a policy, the D first of COSTS: latency only with a table of it.
        dense: cost of the unpruned model.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        prunable = groups.prunable
        self.names = tuple(group.name for group in prunable)
        self.channels = np.array([group.channels for group in prunable], dtype=np.int64)
        self.min_keep = np.array([group.min_keep for group in prunable], dtype=np.int64)
        self.multiple = np.array([group.multiple for group in prunable], dtype=np.int64)
        self.feasible = [
            np.array([*range(group.min_keep, group.channels, group.multiple), group.channels], dtype=np.int64)
            for group in prunable
        ]

        self.cost_names = COSTS if groups.latency else COSTS[:2]
        terms = _polynomial(groups, self.names, self.cost_names)
        positions, width = range(len(self.names)), len(self.cost_names)
        self._constant = terms[()]  # (D,)
        self._linear = np.array([terms[group,] for group in positions]).reshape(-1, width)  # (G, D)
        self._squares = np.array([terms[group, group] for group in positions]).reshape(-1, width)  # (G, D)
        pairs = [key for key in terms if len(set(key)) == 2]
        self._first, self._second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T  # (E,) each
        self._products = np.array([terms[key] for key in pairs]).reshape(-1, width)  # (E, D)
        ends = np.concatenate([self._first, self._second])  # (2E,), and in the same order the other ends and weights:
        others, weights = np.concatenate([self._second, self._first]), np.concatenate([self._products] * 2)
        self._partners = [(others[ends == group], weights[ends == group]) for group in positions]
        self.dense = self.cost(self.channels)

    def rounded_down(self, counts: np.ndarray) -> np.ndarray:
        """The largest counts (..., G) that groups may have, up to those given; these must not be below the minimum."""
        return np.where(counts < self.channels, counts // self.multiple * self.multiple, self.channels)

    def next_count(self, counts: np.ndarray, group: int) -> int:
        """The least count above `counts` (G,) that a group may have; all its channels where there is none."""
        multiple = self.multiple[group]
        return int(min((counts[group] // multiple + 1) * multiple, self.channels[group]))

    def previous_count(self, counts: np.ndarray, group: int) -> int:
        """The largest count below `counts` (G,) that a group may have; its minimum where there is none."""
        multiple = self.multiple[group]
        return int(max((counts[group] - 1) // multiple * multiple, self.min_keep[group]))

    def costs(self, counts: np.ndarray) -> np.ndarray:
        """Costs of many policies; real-valued counts give the continuous relaxation.

        Args:
            counts: (..., G) kept channels of the prunable groups.

        Returns:
            (..., D) float64: macs, params and latency in picoseconds; exact (below 2**53) for integer counts.
        """
        products = counts[..., self._first] * counts[..., self._second]  # (..., E)
        return self._constant + counts @ self._linear + counts**2 @ self._squares + products @ self._products

    def change(self, counts: np.ndarray, group: int, count: np.ndarray | int) -> np.ndarray:
        """What is added to the costs when one group gets another count: however deep the network is, a matter of the
        groups that share a layer with it.

        Args:
            counts: (..., G) before.
            group: position of the group.
            count: (...) afterwards.

        Returns:
            (..., D) float64, exact as `costs` is.
        """
        partners, weights = self._partners[group]
        now = counts[..., group]
        slope = self._linear[group] + counts[..., partners] @ weights  # (..., D)
        return (count - now)[..., None] * slope + (count**2 - now**2)[..., None] * self._squares[group]

    def cost(self, counts: Sequence[int] | np.ndarray) -> Cost:
        """Cost of one policy from its keep counts (G,)."""
        macs, params, *latency_ps = self.costs(np.asarray(counts, dtype=np.float64)).tolist()
        return Cost(round(macs), round(params), *latency_ps)

    def fits(self, counts: Sequence[int], cost: Cost) -> bool:
        """Whether these are keep counts of the model's groups, and what they cost."""
        channels = self.channels.tolist()
        return (
            len(counts) == len(channels)
            and all(1 <= count <= most for count, most in zip(counts, channels, strict=True))
            and self.cost(counts) == cost
        )


def _polynomial(
    groups: ChannelGroups, names: Sequence[str], costs: Sequence[str]
) -> defaultdict[tuple[int, ...], np.ndarray]:
    """The costs as a polynomial of the counts: (D,) coefficients of products of none, one or two groups' counts, by the
    groups' positions in ascending order.
    """
    position = {name: index for index, name in enumerate(names)}
    terms: defaultdict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(len(costs)))
    macs, params = (cost == np.array(costs) for cost in COSTS[:2])  # (D,) each
    terms[()] += groups.fixed_macs * macs + groups.fixed_params * params
    for layer in groups.layers:
        inputs, outputs = (_entries(groups, position, axis) for axis in (layer.inputs, layer.outputs))
        per_pair = layer.macs_per_pair * macs + layer.params_per_pair * params
        for out_key, n_out in outputs.items():
            terms[out_key] += layer.params_per_out * n_out * params
            for in_key, n_in in inputs.items():
                terms[tuple(sorted(in_key + out_key))] += per_pair * n_in * n_out
    for timed in groups.latency:
        inputs, outputs = (_entries(groups, position, axis) for axis in (timed.inputs, timed.outputs))
        terms[()][-1] += timed.fixed_ps
        for in_key, n_in in inputs.items():
            terms[in_key][-1] += timed.per_in_ps * n_in
        for out_key, n_out in outputs.items():
            terms[out_key][-1] += timed.per_out_ps * n_out
            for in_key, n_in in inputs.items():
                terms[tuple(sorted(in_key + out_key))][-1] += timed.per_pair_ps * n_in * n_out
    return terms


def _entries(groups: ChannelGroups, position: Mapping[str, int], axis: Axis | None) -> dict[tuple[int, ...], int]:
    """Entries of an axis for one kept channel of each prunable group, and under () those that are always there.

    An axis that is None counts as one entry.
    """
    if axis is None:
        return {(): 1}
    entries: dict[tuple[int, ...], int] = {}
    for name in axis.segments:
        key, count = ((position[name],), 1) if name in position else ((), groups[name].channels)
        entries[key] = entries.get(key, 0) + count * axis.repeat
    return entries


class LayerCost(NamedTuple):
    """A layer, the entries of its axes that are kept (`inputs` is 0 for a per-channel layer), and what it costs."""

    layer: Layer
    inputs: int
    outputs: int
    cost: Cost


def layer_costs(groups: ChannelGroups, keep_counts: Mapping[str, int]) -> list[LayerCost]:
    """Cost of every layer that tracing knows, in forward order.

    Args:
        groups: of the model.
        keep_counts: kept channels by group; a group that is not named is whole.
    """

    def kept(axis: Axis) -> int:
        return axis.repeat * sum(keep_counts.get(name, groups[name].channels) for name in axis.segments)

    found = []
    for layer in groups.layers:
        n_in, n_out = kept(layer.inputs) if layer.inputs else 0, kept(layer.outputs)
        pairs = (n_in if layer.inputs else 1) * n_out
        params = layer.params_per_pair * pairs + layer.params_per_out * n_out
        found.append(LayerCost(layer, n_in, n_out, Cost(layer.macs_per_pair * pairs, params)))
    return found


def counted_cost(model: nn.Module, image_shape: Sequence[int]) -> Cost:
    """Cost of a real model, by running it once on a zero image of shape (C, H, W).

    Source of the count: torch.utils.flop_counter, which reports two operations per multiply-accumulate.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    with training_flags_kept(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()
        model(image)
    return Cost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))
