"""The one slicer: `slice_model(model, groups, policy)` returns a NEW, smaller model.

Search scores the very model that export writes; there is no masked stand-in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cacp.models.resnet import ChannelPadShortcut
from cacp.schema import Axis, ChannelGroups, Policy


def slice_model(model: nn.Module, groups: ChannelGroups, policy: Policy) -> nn.Module:
    """Cut every channel that the policy drops out of a copy of the model.

    The model itself is left as it is, and shares no tensor with the copy; keeping every channel gives a bit-identical
    one. Batch-norm statistics are those of the kept channels and want recalibrating.

    Args:
        model: the model that `groups` was traced from, or one of the same structure.
        groups: from `cacp.graph.trace`.
        policy: kept indices of every prunable group.

    Raises:
        UserError: if the policy does not fit the groups.
    """
    policy.validate(groups)
    tensors = (*model.parameters(), *model.buffers())
    sliced = _copied(model, {id(tensor): _like(tensor, tensor.detach().clone()) for tensor in tensors})
    device = next(model.parameters()).device
    selections: dict[tuple[tuple[str, ...], int], _Kept | None] = {}  # one for all axes that hold the same channels
    shortcuts: dict[str, dict[str, list[int]]] = {}
    for axis in groups.axes:
        key = (axis.segments, axis.repeat)
        if key not in selections:
            entries = kept_entries(axis, groups, policy)
            selections[key] = None if entries is None else _Kept(entries, torch.tensor(entries, device=device))
        kept = selections[key]
        if kept is None:
            continue
        module = sliced.get_submodule(axis.module)
        if isinstance(module, ChannelPadShortcut):
            shortcuts.setdefault(axis.module, {})[axis.role] = kept.entries
        else:
            _cut(module, axis.role, kept.tensor)
    for name, by_role in shortcuts.items():
        shortcut = sliced.get_submodule(name)
        assert isinstance(shortcut, ChannelPadShortcut)
        shortcut.select(
            by_role.get("in", list(range(shortcut.in_channels))),
            by_role.get("out", list(range(shortcut.out_channels))),
            device,
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


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a tree of modules, in a third of the time of `copy.deepcopy`, whose generic way it goes only for
    attributes that are not PyTorch's own.

    Args:
        module: root of the tree.
        memo: copies by the id of their original, as `copy.deepcopy` keeps it; holds those of all tensors.
    """
    if id(module) in memo:
        return memo[id(module)]
    copied = memo[id(module)] = module.__new__(type(module))
    for name, value in module.__dict__.items():
        if name == "_modules":
            value = {key: child if child is None else _copied(child, memo) for key, child in value.items()}
        elif name in ("_parameters", "_buffers"):
            value = {key: memo.get(id(tensor)) for key, tensor in value.items()}  # None stays None
        elif name in _REGISTRIES:
            value = value.copy()
        elif not isinstance(value, _PLAIN):
            value = copy.deepcopy(value, memo)
        copied.__dict__[name] = value
    return copied


_REGISTRIES = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set))
_PLAIN = (int, float, str, type(None))


class _Kept(NamedTuple):
    """Entries of an axis that stay, and the same as a tensor (K,) on the model's device."""

    entries: list[int]
    tensor: Tensor


def kept_entries(axis: Axis, groups: ChannelGroups, policy: Policy) -> list[int] | None:
    """The entries of an axis that a policy keeps, sorted; None where all stay."""
    kept: list[int] = []
    offset = 0
    for name in axis.segments:
        channels = groups[name].channels
        kept += [offset + index for index in policy.keep.get(name, range(channels))]
        offset += channels
    if len(kept) == offset:
        return None
    return [index * axis.repeat + entry for index in kept for entry in range(axis.repeat)]


def _cut(module: nn.Module, role: str, kept: Tensor) -> None:
    """Keep the entries `kept` of one axis of a conv, linear or batch-norm module, in place."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        _select(module, ("weight", "bias", "running_mean", "running_var"), 0, kept)
        module.num_features = len(kept)
    elif role == "features":
        _cut_grouped(module, kept)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        unit = "features" if isinstance(module, nn.Linear) else "channels"
        if role == "in":
            _select(module, ("weight",), 1, kept)
            setattr(module, f"in_{unit}", len(kept))
        else:
            _select(module, ("weight", "bias"), 0, kept)
            setattr(module, f"out_{unit}", len(kept))
    else:
        raise AssertionError(f"trace gave an axis of {type(module).__name__}, which the slicer does not know")


def _cut_grouped(module: nn.Module, kept: Tensor) -> None:
    """Keep the outputs `kept` of a grouped or depthwise convolution, all or none of each of its groups, in place."""
    assert isinstance(module, nn.Conv2d)
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    _select(module, ("weight", "bias"), 0, kept)
    module.out_channels = len(kept)
    module.groups = len(kept) // outputs
    module.in_channels = module.groups * inputs


def _select(module: nn.Module, names: Sequence[str], dimension: int, kept: Tensor) -> None:
    for name in names:
        registry: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        tensor = registry[name]
        if tensor is not None:
            registry[name] = _like(tensor, tensor.detach().index_select(dimension, kept))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` as a parameter where `tensor` is one."""
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
