"""Least-squares repair of pruned layers: the weights that read a pruned group are fitted anew, so that the layer's
outputs on calibration images come as near to those of the dense network as its kept inputs allow (He et al., "Channel
Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; CACP repairs so).

The dense layer is linear in its unfolded inputs X, Y = X W. With the Gram matrix X'X kept once, a policy costs one
solve a layer: W' = (X_k'X_k + ridge)^-1 X_k'X W, X_k the columns of the kept channels. What layers before it lose is
not seen: X is that of the dense network.

Letters: C input channels, K kernel entries of one channel, O output channels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacp.schema import ChannelGroups

RIDGE = 1e-4  # of the mean diagonal entry
IMAGES = 64  # unfolded at once


class Repair:
    """Repairs sliced models of one dense model, whose groups must each be read by plain convolutions alone.

    Args:
        model: dense, in eval mode.
        groups: of this model.
        images: (N, C, H, W) normalised calibration images.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, images: Tensor) -> None:
        self._readers = {name: group.name for group in groups.prunable for name in group.consumers}
        convolutions = {name: model.get_submodule(name) for name in self._readers}
        wrong = [name for name, conv in convolutions.items() if not isinstance(conv, nn.Conv2d) or conv.groups > 1]
        assert not wrong, f"least squares is written for plain convolutions, not for {wrong}"
        self._weights = {
            name: conv.weight.detach().flatten(1).double() for name, conv in convolutions.items()
        }  # (O, CK)
        self._grams: dict[str, Tensor] = {}  # (CK, CK)
        hooks = [conv.register_forward_pre_hook(self._watch(name)) for name, conv in convolutions.items()]
        with torch.inference_mode():
            for batch in images.split(IMAGES):
                model(batch)
        for hook in hooks:
            hook.remove()

    def _watch(self, name: str):
        def add(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            patches = F.unfold(inputs[0].float(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            rows = patches.transpose(1, 2).flatten(0, 1)  # (N H W, CK)
            self._grams[name] = self._grams.get(name, 0) + (rows.T @ rows).double()

        return add

    def __call__(self, sliced: nn.Module, keep: Mapping[str, Sequence[int]]) -> nn.Module:
        """Give the sliced model the repaired weights, in place."""
        for name, group in self._readers.items():
            conv = sliced.get_submodule(name)
            gram, dense = self._grams[name], self._weights[name]
            size = conv.weight.shape[2] * conv.weight.shape[3]  # K
            kept = (torch.tensor(keep[group])[:, None] * size + torch.arange(size)).flatten()
            part = gram[kept][:, kept]
            part = part + RIDGE * part.diagonal().mean() * torch.eye(len(kept), dtype=part.dtype)
            solved = torch.linalg.solve(part, gram[kept] @ dense.T)  # (kept, O)
            conv.weight.data.copy_(solved.T.reshape(conv.weight.shape))
        return sliced
