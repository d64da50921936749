"""Global filter importance (Mondal et al., GFI-AP, CVIU 2022): what a filter says of the class it says most of.

The mean of its raw output over the images of a class, its absolute value averaged over the pixels, the largest over the
classes. It compares over layers as it is. One pass over the images serves all layers, class after class, so that no
more than the feature maps of one class are held.

Letters: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cacp.models.modes import training_flags_kept
from cacp.schema import ChannelGroups


def filter_importance(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Importance (C,) float32 on the CPU of the channels of every prunable group: the mean over their filters.

    Args:
        model: dense; left as it is.
        groups: of this model.
        batches: images (B, C, H, W), normalised, and labels (B,), which are the same within a batch; all batches of a
            class come one after another.
    """
    layers = {name: model.get_submodule(name) for group in groups.prunable for name in group.producers}
    means = {name: _ClassMeans(layer) for name, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    try:
        with training_flags_kept(model), torch.inference_mode():
            model.eval()
            before = None
            for images, labels in batches:
                if before is not None and labels[0] != before:
                    for mean in means.values():
                        mean.end_class()
                before = labels[0]
                model(images)
    finally:
        for mean in means.values():
            mean.hook.remove()
    found = {}
    for group in groups.prunable:
        filters = [means[name].end_class() for name in group.producers if name in means]
        found[group.name] = torch.stack(filters).mean(0).cpu().clone()
    return found


class _ClassMeans:
    """Of a layer's filters, the largest mean response to a class so far."""

    def __init__(self, layer: nn.Module) -> None:
        self.hook = layer.register_forward_hook(self._add)
        self._largest = torch.zeros(())
        self._sum: Tensor | None = None
        self._count = 0

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        total = output.float().sum(0)  # (C, H, W); of a linear layer (..., C)
        if isinstance(layer, nn.Linear):
            total = total.movedim(-1, 0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(output)

    def end_class(self) -> Tensor:
        """Importance (C,) by the classes up to here."""
        if self._sum is not None:
            mean = (self._sum / self._count).abs()
            self._largest = torch.maximum(
                self._largest.to(mean.device), mean.flatten(1).mean(1) if mean.dim() > 1 else mean
            )
            self._sum, self._count = None, 0
        return self._largest
