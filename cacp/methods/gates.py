"""Channels of a full-size network switched off while it trains, as if they had been cut out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from cacp.schema import ChannelGroups


class Gates:
    """A switch for every channel of every prunable group, in front of all layers that read it.

    What these read of a closed channel is zero, so it has no say in the outputs and gets no gradient; its own weights
    stay as they are, and it may be opened again.

    Args:
        model: gets forward hooks; `remove` takes them away.
        groups: of this model.

    Attributes:
        open: group name -> (C,), 1 for an open channel, 0 for a closed one.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        place = next(model.parameters())
        every = {group.name: torch.ones(group.channels, device=place.device) for group in groups}
        self.open = {group.name: every[group.name] for group in groups.prunable}
        self._hooks = [
            model.get_submodule(axis.module).register_forward_pre_hook(
                partial(_gated, [every[name] for name in axis.segments], axis.repeat)
            )
            for axis in groups.axes
            if axis.role == "in" and not self.open.keys().isdisjoint(axis.segments)
        ]

    def close(self, name: str, channels: Iterable[int]) -> None:
        """Switch channels of a group off."""
        self.open[name][list(channels)] = 0

    def kept(self) -> dict[str, tuple[int, ...]]:
        """The open channels of every group, sorted."""
        return {name: tuple(gate.nonzero().flatten().tolist()) for name, gate in self.open.items()}

    def remove(self) -> None:
        """Leave the model as it was, without switches."""
        for hook in self._hooks:
            hook.remove()


def _gated(segments: list[Tensor], repeat: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a module, those of closed channels zero: (..., C) of a linear layer, (B, C, H, W) of any other."""
    gate = torch.cat(segments).repeat_interleave(repeat).to(inputs[0].dtype)  # (C,)
    return (inputs[0] * (gate if isinstance(module, nn.Linear) else gate[:, None, None]), *inputs[1:])
