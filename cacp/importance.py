"""Criteria: scores of a group's channels; a channel with a higher score is kept.

The formulas are pure functions of tensors; `channel_importance` applies one to every prunable group of a model.
Shapes: C channels of the group, I inputs, K kernel height x width, B images.

    l1, l2   norm of the filter (Li et al., ICLR 2017; He et al., SFP, IJCAI 2018)
    fpgm     sum over j of ||F_i - F_j||_2: the filters nearest the geometric median go (He et al., CVPR 2019)
    taylor   (gamma dL/dgamma + beta dL/dbeta)^2 of the batch norm behind the filter, averaged over mini-batches
             (Molchanov et al., CVPR 2019, gate after BN)
    reconstruction  what the layers that read the channels lose when it goes: channels are taken out one after another,
             each time the one whose loss, all others fitted anew by least squares, is least (Optimal Brain Surgeon,
             Hassibi & Stork, NIPS 1992, for blocks of weights; the Gram matrices of `cacp.gram`). The score is the sum
             of squared errors of the outputs after the channel has gone, as a part of their energy. A group that only
             layers without a Gram matrix read is ranked by l1
    random   uniform noise
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacp.gram import RIDGE, columns, readers
from cacp.models.modes import training_flags_kept
from cacp.schema import Axis, ChannelGroup, ChannelGroups, UserError

CRITERIA = ("l1", "l2", "fpgm", "taylor", "reconstruction", "random")


def l1(filters: Tensor) -> Tensor:
    """Sum of absolute weights: (C, ...) -> (C,)."""
    return filters.flatten(1).abs().sum(1)


def l2(filters: Tensor) -> Tensor:
    """Euclidean norm: (C, ...) -> (C,)."""
    return filters.flatten(1).norm(dim=1)


def fpgm(filters: Tensor) -> Tensor:
    """Sum of Euclidean distances to all filters of the layer: (C, ...) -> (C,)."""
    flat = filters.flatten(1)  # (C, I*K)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def taylor_change(gamma: Tensor, beta: Tensor, gamma_gradient: Tensor, beta_gradient: Tensor) -> Tensor:
    """First-order change of the loss when channels are gated off together behind N batch norms: four (N, C) -> (C,)."""
    return (gamma * gamma_gradient + beta * beta_gradient).sum(0)


_WEIGHT_CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "l2": l2, "fpgm": fpgm}


def channel_importance(
    model: nn.Module,
    groups: ChannelGroups,
    criterion: str,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores (C,) float32 on the CPU of the channels of every prunable group.

    A group with several producers (a residual stream) sums over them. Channels that stay or go together, those of one
    group of a grouped convolution, share the sum of their scores.

    Args:
        model: the dense model; its weights, gradients and mode are left as they are.
        groups: of this model.
        criterion: one of CRITERIA.
        batches: for taylor and reconstruction: (images (B, C, H, W) normalised, labels (B,)) on the model's device.
        seed: for random.

    Raises:
        UserError: for an unknown criterion, taylor or reconstruction without batches, or taylor without batch norm.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion must be one of {', '.join(CRITERIA)}, but got {criterion!r}")
    if criterion == "taylor":
        return _taylor(model, groups, batches)
    if criterion == "reconstruction":
        return _reconstruction(model, groups, batches)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in groups.prunable}
    else:
        score = _WEIGHT_CRITERIA[criterion]
        scores = {
            group.name: torch.stack([score(filters) for filters in _filters(model, group)]).sum(0).cpu()
            for group in groups.prunable
        }
    return {group.name: _shared(scores[group.name], group.block) for group in groups.prunable}


class Elimination:
    """The least squares of a linear layer's outputs while its input channels go: Y = X W with fewer columns of X.

    Args:
        gram: (E, E) X'X of the layer's inputs, positive definite.
        weights: (E, O) W.
        members: (C, K) entries of every channel.
    """

    def __init__(self, gram: Tensor, weights: Tensor, members: Tensor) -> None:
        self._inverse = torch.linalg.inv(gram)
        self._weights = weights  # fitted anew after every channel
        self._members = members
        self._energy = (weights * (gram @ weights)).sum().clamp_min(1e-12)

    def losses(self, channels: Tensor) -> Tensor:
        """(A,) squared error that is added when a channel of (A,) goes and the rest is fitted anew, as a part of the
        dense outputs' sum of squares.
        """
        entries = self._members[channels]  # (A, K)
        blocks = self._inverse[entries[:, :, None], entries[:, None, :]]  # (A, K, K)
        weights = self._weights[entries]  # (A, K, O)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)) / self._energy

    def remove(self, channel: int) -> None:
        gone = self._members[channel]  # (K,)
        steps = torch.linalg.solve(self._inverse[gone][:, gone], self._inverse[gone])  # (K, E)
        self._weights = self._weights - steps.T @ self._weights[gone]
        self._inverse = self._inverse - self._inverse[:, gone] @ steps


def removal_errors(layers: Sequence[Elimination], channels: int) -> Tensor:
    """Errors of the layers that read a group after each of its channels has gone, the cheapest first: (C,) float32.

    >>> gram, weights = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([[3.0], [1.0]])  # energies 9 and 4
    >>> 13 * removal_errors([Elimination(gram, weights, torch.tensor([[0], [1]]))], 2)
    tensor([13.,  4.])
    """
    errors, total, left = torch.zeros(channels), 0.0, list(range(channels))
    while left:
        losses = torch.stack([layer.losses(torch.tensor(left)) for layer in layers]).sum(0)  # (A,)
        place = int(losses.argmin())
        total += float(losses[place])
        channel = left.pop(place)
        errors[channel] = total
        for layer in layers:
            layer.remove(channel)
    return errors


def channel_orders(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channel indices (C,) of every group, the most important first; ties go to the lower index."""
    return {name: torch.argsort(scores, descending=True, stable=True) for name, scores in importance.items()}


def _shared(scores: Tensor, block: int) -> Tensor:
    """Scores (C,), those of every `block` channels in a row summed up and given to each of them."""
    return scores.view(-1, block).sum(1).repeat_interleave(block)


def _filters(model: nn.Module, group: ChannelGroup) -> list[Tensor]:
    """Weights (C, ...) of the layers that produce the group; shortcuts have none."""
    modules = [model.get_submodule(name) for name in group.producers]
    return [module.weight.detach().float() for module in modules if isinstance(module, nn.Conv2d | nn.Linear)]


def _taylor(model: nn.Module, groups: ChannelGroups, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean over mini-batches of (sum over the group's batch norms of gamma dL/dgamma + beta dL/dbeta)^2."""
    norms = _batch_norms(model, groups)
    parameters = [parameter for modules in norms.values() for norm in modules for parameter in (norm.weight, norm.bias)]
    sums = {name: torch.zeros(groups[name].channels) for name in norms}
    count = 0
    with training_flags_kept(model):
        model.eval()
        for images, labels in batches:
            gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), parameters)
            slopes = dict(zip(map(id, parameters), gradients, strict=True))
            for name, modules in norms.items():
                change = taylor_change(
                    torch.stack([norm.weight.detach() for norm in modules]),  # (norms, C)
                    torch.stack([norm.bias.detach() for norm in modules]),
                    torch.stack([slopes[id(norm.weight)] for norm in modules]),
                    torch.stack([slopes[id(norm.bias)] for norm in modules]),
                )
                sums[name] += (_shared(change, groups[name].block) ** 2).cpu()
            count += 1
    if not count:
        raise UserError("criterion taylor needs batches of training images, but got none")
    return {name: total / count for name, total in sums.items()}


def _batch_norms(model: nn.Module, groups: ChannelGroups) -> dict[str, list[nn.BatchNorm2d]]:
    """The affine batch norms of every prunable group, in forward order."""
    norms: dict[str, list[nn.BatchNorm2d]] = {group.name: [] for group in groups.prunable}
    for axis in groups.axes:
        module = model.get_submodule(axis.module)
        if isinstance(module, nn.BatchNorm2d) and module.affine and len(axis.segments) == 1 == axis.repeat:
            norms.get(axis.segments[0], []).append(module)
    without = [name for name, modules in norms.items() if not modules]
    if without:
        raise UserError(f"criterion taylor needs a batch norm behind every group, but {', '.join(without)} have none")
    return norms


def _reconstruction(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Errors of all layers that read a group, summed, as its channels go."""
    found = readers(model, groups, (images for images, _ in batches))
    eliminations: dict[str, list[Elimination]] = {group.name: [] for group in groups.prunable}
    for name, reader in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        gram = reader.gram.clone()
        if not gram.any():
            raise UserError("criterion reconstruction needs batches of training images, but got none")
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        for group in dict.fromkeys(reader.inputs.segments):
            if group in eliminations:
                members = torch.stack([columns(layer, entries) for entries in _members(reader.inputs, groups, group)])
                members = members.view(-1, groups[group].block * members.shape[1])  # (C / block, K)
                eliminations[group].append(Elimination(gram, reader.weights, members))
    unread = channel_importance(model, groups, "l1")
    return {
        group.name: removal_errors(layers, group.channels // group.block).repeat_interleave(group.block)
        if (layers := eliminations[group.name])
        else unread[group.name]
        for group in groups.prunable
    }


def _members(axis: Axis, groups: ChannelGroups, group: str) -> Tensor:
    """(C, K) entries of an axis that belong to each channel of a group."""
    sizes = [groups[name].channels for name in axis.segments]
    starts = [sum(sizes[:place]) for place, name in enumerate(axis.segments) if name == group]
    channels = torch.arange(groups[group].channels)[:, None] + torch.tensor(starts)  # (C, starts)
    return (channels[..., None] * axis.repeat + torch.arange(axis.repeat)).flatten(1)
