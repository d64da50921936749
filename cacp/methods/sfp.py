"""SFP (He et al., IJCAI 2018): soft pruning of the filters with the smallest l2 norm."""

from dataclasses import dataclass

from torch import Tensor, nn

from cacp.methods.soft import SoftPruning, norm_order
from cacp.schema import ChannelGroup


@dataclass(frozen=True)
class SFP(SoftPruning):
    """With the published training."""

    criterion = "l2"

    def order(self, model: nn.Module, group: ChannelGroup, count: int) -> Tensor:
        return norm_order(model, group).cpu()
