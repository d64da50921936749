"""Gram matrices of the inputs of layers that read prunable channels: what it takes to fit these layers anew.

A layer is linear in its unfolded inputs X, Y = X W. Whatever columns of X are left, the best weights, and what is lost
with them, follow from X'X and W alone: see `cacp.repair`, and the criterion `reconstruction` of `cacp.importance`.

Not covered: grouped convolutions, padding by anything but zeros, and layers of LARGEST inputs an output or more, whose
Gram matrices are too large to keep.

Letters: N images, P points of an output feature map, E entries of a layer's unfolded input (input channels x kernel
height x width, and 1 for a bias), O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacp.models.modes import training_flags_kept
from cacp.schema import Axis, ChannelGroups

RIDGE = 1e-4  # of the mean diagonal entry
LARGEST = 8192  # entries
CHUNK_BYTES = 64 * 1024**2  # of inputs unfolded at once

Layer = nn.Conv2d | nn.Linear


@dataclass
class Reader:
    """A dense layer that reads prunable channels.

    Attributes:
        inputs: its axis of inputs.
        outputs: of outputs; None where these are nobody's.
        weights: (E, O) float64.
        gram: (E, E) float64, X'X.
    """

    inputs: Axis
    outputs: Axis | None
    weights: Tensor
    gram: Tensor


def readers(model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor]) -> dict[str, Reader]:
    """By module name, all layers that read prunable channels, with the Gram matrices of these images.

    Args:
        model: dense; left as it is.
        groups: of this model.
        batches: of images (N, C, H, W) float32, normalised, on the model's device.
    """
    axes = {(axis.module, axis.role): axis for axis in groups.axes}
    prunable = {group.name for group in groups.prunable}
    found, hooks = dict[str, Reader](), []
    for (name, role), axis in axes.items():
        layer = model.get_submodule(name)
        if role == "in" and prunable & set(axis.segments) and _is_plain(layer):
            weights = _weights(layer)
            found[name] = Reader(axis, axes.get((name, "out")), weights, weights.new_zeros(len(weights), len(weights)))
            hooks.append(layer.register_forward_pre_hook(_watch(found[name])))
    with training_flags_kept(model), torch.inference_mode():
        model.eval()
        for images in batches if found else ():
            model(images)
    for hook in hooks:
        hook.remove()
    return found


def columns(layer: Layer, channels: Tensor) -> Tensor:
    """(K,) entries of a layer's unfolded input that belong to channels (C,) of its input axis; not that of the bias."""
    area = kernel_area(layer)
    return (channels[:, None] * area + torch.arange(area, device=channels.device)).flatten()


def kernel_area(layer: Layer) -> int:
    """Height x width."""
    return layer.weight[0, 0].numel()


def _watch(reader: Reader) -> Callable[[Layer, tuple[Tensor, ...]], None]:
    def add(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        images = inputs[0].float()
        for part in images.split(max(1, CHUNK_BYTES // (images[:1].nbytes * kernel_area(layer)))):
            rows = _unfolded(layer, part)  # (N P, E)
            reader.gram += rows.T @ rows

    return add


def _is_plain(layer: nn.Module) -> TypeGuard[Layer]:
    if isinstance(layer, nn.Conv2d):
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return layer.groups == 1 and zeros and layer.weight[0].numel() < LARGEST
    return isinstance(layer, nn.Linear) and layer.in_features < LARGEST


def _weights(layer: Layer) -> Tensor:
    """(E, O) float64."""
    weights = layer.weight.detach().flatten(1)
    return (weights if layer.bias is None else torch.cat([weights, layer.bias.detach()[:, None]], 1)).double().T


def _unfolded(layer: Layer, inputs: Tensor) -> Tensor:
    """(N P, E) of a layer's inputs: (N, C, H, W), or (N, ..., C) of a linear one."""
    if isinstance(layer, nn.Linear):
        rows = inputs.flatten(0, -2)
    else:
        assert not isinstance(layer.padding, str)
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, E, P)
        rows = patches.transpose(1, 2).flatten(0, 1)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
