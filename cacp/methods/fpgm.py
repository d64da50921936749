"""FPGM (He et al., CVPR 2019): soft pruning of the filters nearest the geometric median of their layer, which the
others can stand in for; "mix" prunes a part of them by norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cacp.importance import distances, filters_of, shared
from cacp.methods.soft import SoftPruning, norm_order
from cacp.schema import ChannelGroup


@dataclass(frozen=True)
class FPGM(SoftPruning):
    """The published training is SFP's. `norm_share` of the pruned filters are those with the smallest l2 norm: 0 for
    pure FPGM, 0.25 for the published mix, 10 % by norm and 30 % by distance.
    """

    distance: str = "l2"
    norm_share: float = 0.0

    criterion = "fpgm"

    def order(self, model: nn.Module, group: ChannelGroup, count: int) -> Tensor:
        """Those to keep first: without the smallest, by their distance to the others left."""
        smallest = round(self.norm_share * (group.channels - count) / group.block) * group.block
        left, lost = norm_order(model, group).tensor_split([group.channels - smallest])
        filters = filters_of(model, group)
        sums = torch.stack([distances(one[left], self.distance).sum(1) for one in filters]).sum(0)
        return torch.cat([left[shared(sums, group.block).argsort(descending=True, stable=True)], lost]).cpu()
