"""What the layers that read a group lose when its channels go and the rest is fitted anew.

Channels are taken out one after another, each time the one whose loss is least: Optimal Brain Surgeon (Hassibi & Stork,
NIPS 1992) for blocks of weights, with the Gram matrices of `cacp.gram` as Hessians. So the order of the channels is one
for all counts, and it knows what `cacp.repair` will mend.

Letters: C channels of a group, K entries of one channel in a layer's unfolded input, E all entries, O output channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cacp.gram import RIDGE, Reader, columns, readers
from cacp.schema import Axis, ChannelGroups, UserError

STEPS = 64  # at most, in which the channels of a group go


class Fit(NamedTuple):
    """The least squares of a linear layer, Y = X W."""

    inverse: Tensor  # (E, E) of X'X
    weights: Tensor  # (E, O) W
    energy: Tensor  # sum of squares of Y


class Elimination:
    """A fit while input channels of its layer go: fewer and fewer columns of X.

    Args:
        fit: of the whole layer; left as it is.
        members: (C, K) entries of every channel.
    """

    def __init__(self, fit: Fit, members: Tensor) -> None:
        self._inverse, self._weights, self._energy = fit.inverse.clone(), fit.weights.clone(), fit.energy
        self._members = members

    def losses(self, channels: Tensor) -> Tensor:
        """(A,) squared error that is added when one channel of (A,) goes and the rest is fitted anew, as a part of the
        dense outputs' sum of squares.
        """
        entries = self._members[channels]  # (A, K)
        blocks = self._inverse[entries[:, :, None], entries[:, None, :]]  # (A, K, K)
        weights = self._weights[entries]  # (A, K, O)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)) / self._energy

    def remove(self, channels: Tensor) -> float:
        """Let channels (A,) go together; the error that this adds, as in `losses`."""
        gone = self._members[channels].flatten()  # (A K,)
        weights, rows = self._weights[gone], self._inverse[gone]  # (A K, O), (A K, E)
        solved = torch.linalg.solve(rows[:, gone], torch.cat([weights, rows], 1))  # (A K, O + E)
        steps = solved[:, weights.shape[1] :]  # (A K, E)
        self._weights.addmm_(steps.T, weights, alpha=-1)
        self._inverse.addmm_(rows.T, steps, alpha=-1)
        return float((weights * solved[:, : weights.shape[1]]).sum() / self._energy)


def removal_errors(layers: Sequence[Elimination], channels: int) -> Tensor:
    """Errors of the layers that read a group after each of its channels has gone, the cheapest first: (C,) float32.

    Of more than STEPS channels the cheapest few go at a time; they share the error that this adds by their own.

    >>> fit = Fit(torch.diag(torch.tensor([1.0, 0.25])), torch.tensor([[3.0], [1.0]]), torch.tensor(13.0))
    >>> 13 * removal_errors([Elimination(fit, torch.tensor([[0], [1]]))], 2)  # energies of the channels: 9 and 4
    tensor([13.,  4.])
    """
    errors, total, left = torch.zeros(channels), 0.0, torch.arange(channels)
    at_once = math.ceil(channels / STEPS)
    while len(left):
        losses = torch.stack([layer.losses(left) for layer in layers]).sum(0).cpu()  # (A,)
        order = losses.argsort()
        gone, own = left[order[:at_once]], losses[order[:at_once]]
        added = sum(layer.remove(gone) for layer in layers)
        errors[gone] = total + (added * own.cumsum(0) / own.sum().clamp_min(1e-30)).float()
        total += added
        left = left[order[at_once:].sort().values]
    return errors


def reconstruction_errors(model: nn.Module, groups: ChannelGroups, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Scores (C,) float32 on the CPU of the channels of every prunable group that a layer with a Gram matrix reads: the
    sum over these layers of the squared errors of their outputs after the channel has gone, as a part of their energy.

    Args:
        model: dense; left as it is.
        groups: of this model.
        images: batches (B, C, H, W) float32, normalised, on the model's device.

    Raises:
        UserError: without images.
    """
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise UserError("criterion reconstruction needs batches of training images, but got none")
    found = readers(model, groups, itertools.chain([first], batches))
    fits = {name: _fit(reader) for name, reader in found.items()}
    errors = {}
    for group in groups.prunable:
        layers = []
        for name, reader in found.items():
            if group.name in reader.inputs.segments:
                layer = model.get_submodule(name)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                entries = _entries(reader.inputs, groups, group.name)  # (C, axis entries)
                members = torch.stack([columns(layer, own) for own in entries])
                layers.append(Elimination(fits[name], members.view(-1, group.block * members.shape[1])))
        if layers:
            errors[group.name] = removal_errors(layers, group.channels // group.block).repeat_interleave(group.block)
    return errors


def _fit(reader: Reader) -> Fit:
    gram, weights = reader.gram.clone(), reader.weights
    gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp_min(1e-12))
    return Fit(torch.linalg.inv(gram), weights, (weights * (gram @ weights)).sum().clamp_min(1e-12))


def _entries(axis: Axis, groups: ChannelGroups, group: str) -> Tensor:
    """(C, ...) entries of an axis that belong to each channel of a group."""
    sizes = [groups[name].channels for name in axis.segments]
    starts = [sum(sizes[:place]) for place, name in enumerate(axis.segments) if name == group]
    channels = torch.arange(groups[group].channels)[:, None] + torch.tensor(starts)  # (C, starts)
    return (channels[..., None] * axis.repeat + torch.arange(axis.repeat)).flatten(1)
