"""What a policy costs, in closed form, and what a real model costs, counted.

MACs are the multiply-accumulates of conv and linear layers for one image (the papers' "FLOPs"); parameters are all of
the model's. Both are sums over layers of `coefficient * n_in * n_out` in the kept channel counts, so a policy costs
microseconds and many policies a few products. `torch.utils.flop_counter` counts 2 per MAC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cacp.models.modes import training_flags_kept
from cacp.schema import Axis, ChannelGroups, Cost


class CostModel:
    """Cost of every choice of keep counts of a model's prunable groups.

    Attributes:
        names: the prunable groups, in forward order; every array of counts follows it.
        channels: (G,) int64, channels of each of these groups.
        min_keep: (G,) int64, the least count of each.
        dense: cost of the unpruned model.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        prunable = groups.prunable
        self.names = tuple(group.name for group in prunable)
        self.channels = np.array([group.channels for group in prunable], dtype=np.int64)
        self.min_keep = np.array([group.min_keep for group in prunable], dtype=np.int64)
        self._fixed = np.array([groups.fixed_macs, groups.fixed_params], dtype=np.float64)

        layers = groups.layers
        self._inputs = _Entries.of(groups, self.names, [layer.inputs for layer in layers])
        self._outputs = _Entries.of(groups, self.names, [layer.outputs for layer in layers])
        self._macs_per_pair = np.array([layer.macs_per_pair for layer in layers], dtype=np.float64)
        self._params_per_pair = np.array([layer.params_per_pair for layer in layers], dtype=np.float64)
        self._params_per_out = np.array([layer.params_per_out for layer in layers], dtype=np.float64)
        self.dense = self.cost(self.channels)

    def costs(self, counts: np.ndarray) -> np.ndarray:
        """Costs of many policies; real-valued counts give the continuous relaxation.

        Args:
            counts: (..., G) kept channels of the prunable groups.

        Returns:
            (..., 2) float64: macs and params; exact integers (below 2**53) for integer counts.
        """
        n_in = self._inputs.kept(counts)  # (..., L)
        n_out = self._outputs.kept(counts)  # (..., L)
        pairs = n_in * n_out
        macs = pairs @ self._macs_per_pair
        params = pairs @ self._params_per_pair + n_out @ self._params_per_out
        return np.stack([macs, params], axis=-1) + self._fixed

    def cost(self, counts: Sequence[int] | np.ndarray) -> Cost:
        """Cost of one policy from its keep counts (G,)."""
        macs, params = self.costs(np.asarray(counts, dtype=np.float64))
        return Cost(round(macs), round(params))


class _Entries(NamedTuple):
    """How many entries of one axis of every layer stay: constant + sum over terms of weight * count of a group.

    An axis has few terms, mostly one, however deep the network is. Shapes: T terms of the axis that has most, L layers.
    """

    constants: np.ndarray  # (L,)
    weights: np.ndarray  # (T, L), 0 where an axis has fewer terms
    positions: np.ndarray  # (T, L) of the group among the prunable ones

    @classmethod
    def of(cls, groups: ChannelGroups, names: Sequence[str], axes: Sequence[Axis | None]) -> _Entries:
        """Of every layer's axis; an axis that is None counts as one entry."""
        position = {name: index for index, name in enumerate(names)}
        constants = np.zeros(len(axes))
        terms: list[dict[int, int]] = [{} for _ in axes]  # of every axis: position of the group -> weight
        for column, axis in enumerate(axes):
            if axis is None:
                constants[column] = 1
                continue
            for name in axis.segments:
                if name in position:
                    terms[column][position[name]] = terms[column].get(position[name], 0) + axis.repeat
                else:
                    constants[column] += axis.repeat * groups[name].channels
        most = max((len(of_axis) for of_axis in terms), default=0)
        weights, positions = np.zeros((most, len(axes))), np.zeros((most, len(axes)), dtype=np.int64)
        for column, of_axis in enumerate(terms):
            for row, (group, weight) in enumerate(of_axis.items()):
                weights[row, column], positions[row, column] = weight, group
        return cls(constants, weights, positions)

    def kept(self, counts: np.ndarray) -> np.ndarray:
        """(..., L) entries for counts (..., G)."""
        entries = self.constants
        for weights, positions in zip(self.weights, self.positions, strict=True):
            entries = entries + weights * counts[..., positions]
        return entries


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
