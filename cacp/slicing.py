"""The one slicer: `slice_model(model, groups, policy)` returns a NEW, smaller model.

Search scores the very model that export writes; there is no masked stand-in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cacp.models.resnet import ChannelPadShortcut
from cacp.schema import Axis, ChannelGroups, Policy


def slice_model(model: nn.Module, groups: ChannelGroups, policy: Policy) -> nn.Module:
    """Cut every channel that the policy drops out of a copy of the model.

    The model itself is left as it is; keeping every channel gives a bit-identical copy. Batch-norm statistics are
    those of the kept channels and want recalibrating.

    Args:
        model: the model that `groups` was traced from, or one of the same structure.
        groups: from `cacp.graph.trace`.
        policy: kept indices of every prunable group.

    Raises:
        UserError: if the policy does not fit the groups.
    """
    policy.validate(groups)
    sliced = copy.deepcopy(model)
    shortcuts: dict[str, dict[str, list[int]]] = {}
    with torch.no_grad():
        for axis in groups.axes:
            kept = _kept_entries(axis, groups, policy.keep)
            if kept is None:
                continue
            module = sliced.get_submodule(axis.module)
            if isinstance(module, ChannelPadShortcut):
                shortcuts.setdefault(axis.module, {})[axis.role] = kept
            else:
                _cut(module, axis.role, kept)
    for name, kept_by_role in shortcuts.items():
        shortcut = sliced.get_submodule(name)
        assert isinstance(shortcut, ChannelPadShortcut)
        shortcut.select(
            kept_by_role.get("in", list(range(shortcut.in_channels))),
            kept_by_role.get("out", list(range(shortcut.out_channels))),
            next(model.parameters()).device,
        )
    return sliced


def counts_policy(groups: ChannelGroups, counts: Sequence[int], orders: Mapping[str, Tensor], criterion: str) -> Policy:
    """The policy that keeps the `counts[g]` highest-ranked channels of every prunable group.

    Args:
        groups: of the model.
        counts: keep count of every prunable group, in forward order.
        orders: group name -> (C,) channel indices, the most important first.
        criterion: name of the criterion that ranked them.
    """
    keep = {
        group.name: tuple(sorted(orders[group.name][:count].tolist()))
        for group, count in zip(groups.prunable, counts, strict=True)
    }
    return Policy(keep, criterion)


def _kept_entries(axis: Axis, groups: ChannelGroups, keep: Mapping[str, Sequence[int]]) -> list[int] | None:
    """Entries of the axis that stay; None where all do."""
    kept: list[int] = []
    offset = 0
    for name in axis.segments:
        channels = groups[name].channels
        kept += [offset + index for index in keep.get(name, range(channels))]
        offset += channels
    if len(kept) == offset:
        return None
    if axis.repeat == 1:
        return kept
    return [index * axis.repeat + entry for index in kept for entry in range(axis.repeat)]


def _cut(module: nn.Module, role: str, kept: Sequence[int]) -> None:
    """Keep the entries `kept` of one axis of a conv, linear or batch-norm module, in place."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        _select(module, ("weight", "bias", "running_mean", "running_var"), 0, kept)
        module.num_features = len(kept)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        unit = "features" if isinstance(module, nn.Linear) else "channels"
        if role == "in":
            _select(module, ("weight",), 1, kept)
            setattr(module, f"in_{unit}", len(kept))
        else:
            _select(module, ("weight", "bias"), 0, kept)
            setattr(module, f"out_{unit}", len(kept))
        if role == "features":  # depthwise: every channel is its own group
            setattr(module, f"in_{unit}", len(kept))
            module.groups = len(kept)
    else:
        raise AssertionError(f"trace gave an axis of {type(module).__name__}, which the slicer does not know")


def _select(module: nn.Module, names: Sequence[str], dimension: int, kept: Sequence[int]) -> None:
    for name in names:
        tensor = getattr(module, name)
        if tensor is None:
            continue
        selected = tensor.detach().index_select(dimension, torch.tensor(kept, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            selected = nn.Parameter(selected, requires_grad=tensor.requires_grad)
        setattr(module, name, selected)
