"""Least-squares repair: the layers that read pruned channels get the weights with which their outputs come as near to
those of the dense network as their kept inputs allow.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017); ThiNet and CACP repair so. With the
Gram matrix X'X of a layer's unfolded inputs kept once, a policy costs one solve a layer:
W_k = (X_k'X_k + ridge)^-1 X_k'X W, where X_k are the columns of what is kept. A layer with a bias has a column of ones,
which always is. Which layers stay unrepaired: see `cacp.gram`.

Differences from CACP: all points of the feature maps, not ten an image; X is the dense network's, so what the layers
before it lose is not seen, and the Gram matrices serve every policy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cacp.gram import RIDGE, Layer, columns, readers
from cacp.schema import ChannelGroups, Policy
from cacp.slicing import kept_entries

BATCH = 64  # images of a forward pass


class Repair:
    """Repairs sliced models of one dense model.

    Args:
        model: dense; left as it is.
        groups: of this model.
        images: (N, C, H, W) float32, normalised, on the model's device.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, images: Tensor) -> None:
        self._groups = groups
        self._readers = readers(model, groups, images.split(BATCH))

    def __call__(self, sliced: nn.Module, policy: Policy) -> None:
        """Give a model that was sliced by a policy its repaired weights, in place."""
        for name, reader in self._readers.items():
            kept = kept_entries(reader.inputs, self._groups, policy)
            if kept is None:
                continue
            layer, gram, dense = sliced.get_submodule(name), reader.gram, reader.weights
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            chosen = columns(layer, torch.tensor(kept, device=gram.device))  # (K,)
            if layer.bias is not None:
                chosen = torch.cat([chosen, chosen.new_tensor([len(gram) - 1])])
            rows = gram[chosen]  # (K, E)
            part = rows[:, chosen]  # (K, K), a copy
            part.diagonal().add_((RIDGE * part.diagonal().mean()).clamp_min(1e-12))
            outputs = kept_entries(reader.outputs, self._groups, policy) if reader.outputs else None
            wanted = dense if outputs is None else dense[:, outputs]  # (E, O)
            _fill(layer, torch.cholesky_solve(rows @ wanted, torch.linalg.cholesky(part)))


def _fill(layer: Layer, weights: Tensor) -> None:
    """Write (K, O) into a layer."""
    shape, entries = layer.weight.shape, layer.weight[0].numel()
    layer.weight.data.copy_(weights[:entries].T.reshape(shape))
    if layer.bias is not None:
        layer.bias.data.copy_(weights[-1])
