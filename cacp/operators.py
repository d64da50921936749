"""Which operators tracing knows, by the way they treat channels, and how their arguments are read."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import stochastic_depth

# Every channel by itself: entry by entry, or over its pixels.
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout,
)  # fmt: skip
PIXEL_MODULES = (
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
    nn.ReflectionPad2d,
)  # fmt: skip
_KINDS: dict[str, tuple[Any, ...]] = {  # functions, and names of methods
    "pointwise": (
        F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid,
        F.sigmoid, F.tanh, F.dropout, torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.clamp, operator.neg,
        stochastic_depth, "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "detach", "float", "to",
    ),
    "pixels": (
        F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    ),
    "sum": (
        operator.add, operator.iadd, operator.sub, torch.add, torch.sub, torch.maximum, torch.minimum, "add", "add_",
        "sub",
    ),
    "product": (
        operator.mul, operator.imul, operator.truediv, torch.mul, torch.div, "mul", "mul_", "div", "expand_as",
    ),
    "cat": (torch.cat, torch.concat),
    "flatten": (torch.flatten, "flatten"),
    "view": ("view", "reshape"),
    "mean": (torch.mean, "mean"),
    "pad": (F.pad,),
    "index": (operator.getitem,),
    "permute": (torch.permute, "permute"),
    "layer_norm": (F.layer_norm,),
    "squeeze": (torch.unsqueeze, torch.squeeze, "unsqueeze", "squeeze"),
}  # fmt: skip
KIND_OF = {target: kind for kind, targets in _KINDS.items() for target in targets}
ANY_AXIS = (
    "pointwise",
    "sum",
    "product",
    "permute",
    "layer_norm",
)  # wherever the channels are; the rest want them second


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node makes; empty for anything but one tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def makes_tensor(node: fx.Node) -> bool:
    """Whether a node makes tensors, not sizes or other plain numbers."""
    return isinstance(node.meta.get("tensor_meta"), tuple)


def described(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """An operator, with the node or module and the line of source where it stands."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} at {node.target}{_place(node)}"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{name} at node {node.name}{_place(node)}"


def _place(node: fx.Node) -> str:
    """File and line of source that a node comes from; nothing for what PyTorch's own modules call."""
    return f" ({node.meta['place']})" if "place" in node.meta else ""


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def arguments_from(node: fx.Node, position: int) -> tuple[Any, ...]:
    """Sizes or dimensions given one by one, or as one list."""
    given: Any = node.args[position:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else tuple(given)


def pads_pixels_only(node: fx.Node) -> bool:
    padding = argument(node, 1, "pad", ())
    return isinstance(padding, list | tuple) and len(padding) <= 2 * (len(shape(node)) - 2)


def keeps_channels(node: fx.Node) -> bool:
    """Whether an index leaves the batch and channel axes alone."""
    index: Any = node.args[1]
    whole = slice(None)
    return isinstance(index, tuple) and len(index) > 2 and index[0] == whole and index[1] == whole


def averages_pixels_only(node: fx.Node) -> bool:
    dimensions = argument(node, 1, "dim")
    rank = len(shape(node.all_input_nodes[0]))
    listed = dimensions if isinstance(dimensions, list | tuple) else (dimensions,)
    return dimensions is not None and all(dimension % rank >= 2 for dimension in listed)


def changes_pixel_axes_only(node: fx.Node) -> bool:
    """Whether squeeze or unsqueeze takes away or adds a dimension behind the channels."""
    dimension = argument(node, 1, "dim")
    rank = max(len(shape(node)), len(shape(node.all_input_nodes[0])))
    return isinstance(dimension, int) and dimension % rank >= 2


def counted_tensor(size: Any) -> fx.Node | None:
    """The tensor whose number of channels an argument is: x of `x.shape[1]`, `x.size(1)` or `_, c, _, _ = x.size()`."""
    if not isinstance(size, fx.Node):
        return None
    if size.op == "call_method" and size.target == "size" and size.args[1:] == (1,):
        return size.all_input_nodes[0]
    if size.target is not operator.getitem or size.args[1] != 1:
        return None
    sizes: Any = size.args[0]
    whole = sizes.op == "call_method" and sizes.target == "size" and len(sizes.args) == 1
    return sizes.args[0] if whole or (sizes.target is getattr and sizes.args[1] == "shape") else None
