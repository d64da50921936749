"""Channels of a full-size network switched off while it trains, as if they had been cut out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from cacp.importance import batch_norms
from cacp.schema import ChannelGroups


class Gates:
    """A switch for every channel behind the batch norms of its group: a closed one puts out zero.

    The weights stay as they are, so a channel may be opened again; no gradient reaches those of a closed one.

    Args:
        model: gets forward hooks; `remove` takes them away.
        groups: of this model; every prunable one needs a batch norm.

    Attributes:
        open: group name -> (C,), 1 for an open channel, 0 for a closed one.
        norms: group name -> its batch norms.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        self.norms = batch_norms(model, groups)
        self.open = {name: torch.ones_like(norms[0].weight.detach()) for name, norms in self.norms.items()}
        self._hooks = [
            norm.register_forward_hook(partial(_gated, self.open[name]))
            for name, norms in self.norms.items()
            for norm in norms
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


def _gated(gate: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Outputs (B, C, H, W) of a batch norm, closed channels zero."""
    return output * gate.to(output.dtype)[:, None, None]
