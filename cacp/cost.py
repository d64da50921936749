"""What a policy costs, in closed form, and what a real model costs, counted.

MACs are the multiply-accumulates of conv and linear layers for one image (the papers' "FLOPs"); parameters are all of
the model's. Both are sums over layers of `coefficient * n_in * n_out` in the kept channel counts, so a policy costs
microseconds and many policies one matrix product. `torch.utils.flop_counter` counts 2 per MAC.
"""

from __future__ import annotations

from collections.abc import Sequence

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

        # n_in = counts @ in_weights + in_constants, likewise n_out; L layers
        layers = groups.layers
        self._in_weights, self._in_constants = self._linear_maps(groups, [layer.inputs for layer in layers])
        self._out_weights, self._out_constants = self._linear_maps(groups, [layer.outputs for layer in layers])
        self._macs_per_pair = np.array([layer.macs_per_pair for layer in layers], dtype=np.float64)
        self._params_per_pair = np.array([layer.params_per_pair for layer in layers], dtype=np.float64)
        self._params_per_out = np.array([layer.params_per_out for layer in layers], dtype=np.float64)
        self.dense = self.cost(self.channels)

    def _linear_maps(self, groups: ChannelGroups, axes: Sequence[Axis | None]) -> tuple[np.ndarray, np.ndarray]:
        """(G, L) weights and (L,) constants that give the kept entries of each axis; None counts as one entry."""
        position = {name: index for index, name in enumerate(self.names)}
        weights = np.zeros((len(self.names), len(axes)))
        constants = np.zeros(len(axes))
        for column, axis in enumerate(axes):
            if axis is None:
                constants[column] = 1
                continue
            for name in axis.segments:
                if name in position:
                    weights[position[name], column] += axis.repeat
                else:
                    constants[column] += axis.repeat * groups[name].channels
        return weights, constants

    def costs(self, counts: np.ndarray) -> np.ndarray:
        """Costs of many policies; real-valued counts give the continuous relaxation.

        Args:
            counts: (..., G) kept channels of the prunable groups.

        Returns:
            (..., 2) float64: macs and params; exact integers (below 2**53) for integer counts.
        """
        n_in = counts @ self._in_weights + self._in_constants  # (..., L)
        n_out = counts @ self._out_weights + self._out_constants  # (..., L)
        pairs = n_in * n_out
        macs = pairs @ self._macs_per_pair
        params = pairs @ self._params_per_pair + n_out @ self._params_per_out
        return np.stack([macs, params], axis=-1) + self._fixed

    def cost(self, counts: Sequence[int] | np.ndarray) -> Cost:
        """Cost of one policy from its keep counts (G,)."""
        macs, params = self.costs(np.asarray(counts, dtype=np.float64))
        return Cost(round(macs), round(params))


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
