"""FPGM (He et al., CVPR 2019): soft pruning of the filters nearest the geometric median of their layer, which the
others can stand in for; "mix" prunes a part of them by norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cacp.importance import distances, filters_of, l2, shared
from cacp.methods.soft import soft_pruning
from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget, ChannelGroup


@dataclass(frozen=True)
class FPGM:
    """The published training is SFP's. `norm_share` of the pruned filters are those with the smallest l2 norm: 0 for
    pure FPGM, 0.25 for the published mix, 10 % by norm and 30 % by distance.
    """

    method_epochs: int = 200
    method_lr: float = 0.1
    method_schedule: str = "x0.2@60,120,160/200"
    distance: str = "l2"
    norm_share: float = 0.0

    def __call__(self, subject: Subject, budget: Budget) -> Pruned:
        def orders(model: nn.Module, counts: tuple[int, ...]) -> dict[str, Tensor]:
            pairs = zip(subject.groups.prunable, counts, strict=True)
            return {group.name: self.order(model, group, count) for group, count in pairs}

        return soft_pruning(subject, budget, "fpgm", orders, self.method_epochs, self.method_lr, self.method_schedule)

    def order(self, model: nn.Module, group: ChannelGroup, count: int) -> Tensor:
        """Channels (C,) of a group, those to keep first: without the smallest, by their distance to the others left."""
        filters = filters_of(model, group)
        norms = torch.stack([l2(one) for one in filters]).sum(0)
        by_norm = shared(norms, group.block).argsort(descending=True, stable=True)
        smallest = round(self.norm_share * (group.channels - count) / group.block) * group.block
        left, lost = by_norm.tensor_split([group.channels - smallest])
        sums = torch.stack([distances(one[left], self.distance).sum(1) for one in filters]).sum(0)
        return torch.cat([left[shared(sums, group.block).argsort(descending=True, stable=True)], lost]).cpu()
