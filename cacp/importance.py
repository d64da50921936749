"""Criteria: scores of a group's channels; a channel with a higher score is kept.

The formulas are pure functions of tensors; `channel_importance` applies one to every prunable group of a model.
Shapes: C channels of the group, I inputs, K kernel height x width, B images.

    l1, l2   norm of the filter (Li et al., ICLR 2017; He et al., SFP, IJCAI 2018)
    fpgm     sum over j of ||F_i - F_j||_2: the filters nearest the geometric median go (He et al., CVPR 2019)
    taylor   (gamma dL/dgamma + beta dL/dbeta)^2 of the batch norm behind the filter, averaged over mini-batches
             (Molchanov et al., CVPR 2019, gate after BN)
    reconstruction  what the layers that read the channel lose, see `cacp.reconstruction`; a group that only layers
             without a Gram matrix read is ranked by l1
    gfi      the largest mean response to a class, see `cacp.gfi`; mean over the producers of a group
    random   uniform noise
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacp.gfi import filter_importance
from cacp.models.modes import training_flags_kept
from cacp.reconstruction import reconstruction_errors
from cacp.schema import ChannelGroup, ChannelGroups, UserError

DISTANCES = ("l2", "l1", "cosine")
CRITERIA = ("l1", "l2", "fpgm", "taylor", "reconstruction", "gfi", "random")


def l1(filters: Tensor) -> Tensor:
    """Sum of absolute weights: (C, ...) -> (C,)."""
    return filters.flatten(1).abs().sum(1)


def l2(filters: Tensor) -> Tensor:
    """Euclidean norm: (C, ...) -> (C,)."""
    return filters.flatten(1).norm(dim=1)


def fpgm(filters: Tensor) -> Tensor:
    """Sum of Euclidean distances to all filters of the layer: (C, ...) -> (C,)."""
    return distances(filters, "l2").sum(1)


def distances(filters: Tensor, distance: str) -> Tensor:
    """Distances between all filters of a layer, one of DISTANCES: (C, ...) -> (C, C)."""
    flat = filters.flatten(1)  # (C, I*K)
    if distance == "cosine":
        unit = F.normalize(flat)
        return 1 - unit @ unit.T
    return torch.cdist(flat, flat, p=float(distance[1:]), compute_mode="donot_use_mm_for_euclid_dist")


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
        batches: for taylor, reconstruction and gfi (class after class): (images (B, C, H, W) normalised, labels (B,))
            on the model's device.
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
    if criterion == "gfi":
        scores = filter_importance(model, groups, batches)
    elif criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in groups.prunable}
    else:
        score = _WEIGHT_CRITERIA[criterion]
        scores = {
            group.name: torch.stack([score(filters) for filters in filters_of(model, group)]).sum(0).cpu()
            for group in groups.prunable
        }
    return {group.name: shared(scores[group.name], group.block) for group in groups.prunable}


def channel_orders(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channel indices (C,) of every group, the most important first; ties go to the lower index."""
    return {name: torch.argsort(scores, descending=True, stable=True) for name, scores in importance.items()}


def shared(scores: Tensor, block: int) -> Tensor:
    """Scores (C,), those of every `block` channels in a row summed up and given to each of them."""
    return scores.view(-1, block).sum(1).repeat_interleave(block)


def filters_of(model: nn.Module, group: ChannelGroup) -> list[Tensor]:
    """Weights (C, ...) of the layers that produce the group; shortcuts have none."""
    modules = [model.get_submodule(name) for name in group.producers]
    return [module.weight.detach().float() for module in modules if isinstance(module, nn.Conv2d | nn.Linear)]


def _taylor(model: nn.Module, groups: ChannelGroups, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean over mini-batches of (sum over the group's batch norms of gamma dL/dgamma + beta dL/dbeta)^2."""
    norms = batch_norms(model, groups)
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
                sums[name] += (shared(change, groups[name].block) ** 2).cpu()
            count += 1
    if not count:
        raise UserError("criterion taylor needs batches of training images, but got none")
    return {name: total / count for name, total in sums.items()}


def batch_norms(model: nn.Module, groups: ChannelGroups) -> dict[str, list[nn.BatchNorm2d]]:
    """The affine batch norms of every prunable group, in forward order."""
    norms: dict[str, list[nn.BatchNorm2d]] = {group.name: [] for group in groups.prunable}
    for axis in groups.axes:
        module = model.get_submodule(axis.module)
        if isinstance(module, nn.BatchNorm2d) and module.affine and len(axis.segments) == 1 == axis.repeat:
            norms.get(axis.segments[0], []).append(module)
    without = [name for name, modules in norms.items() if not modules]
    if without:
        raise UserError(
            "taylor and caie need a batch norm behind every group; keep those without whole: "
            f"--ignore {' '.join(without)}"
        )
    return norms


def _reconstruction(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Errors of all layers that read a group, summed, as its channels go."""
    errors = reconstruction_errors(model, groups, (images for images, _ in batches))
    return {**channel_importance(model, groups, "l1"), **errors}
