"""From a model to its channel groups: `trace(model, example) -> ChannelGroups`.

The model is traced with torch.fx and every tensor gets a channel layout: the sequence of *spaces* its channels come
from. A convolution or linear layer opens a new space, an addition joins spaces, a concatenation strings them together;
joined spaces become one group. The idea of coupled channels is that of DepGraph (Fang et al., CVPR 2023).

Known: conv (plain, depthwise; other grouped convolutions stay whole), batch norm, linear, element-wise operators,
pooling, cat, flatten, spatial padding, mean over pixels, and the option A shortcut `ChannelPadShortcut`.
Not known: anything else. It is listed in `ChannelGroups.unknown`, and the groups it touches stay whole.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from cacp.cost import counted_cost
from cacp.models.resnet import ChannelPadShortcut
from cacp.schema import Axis, ChannelGroup, ChannelGroups, Cost, Layer, UserError
from cacp.spaces import ChannelSpaces, Layout

SCOPES = ("inner", "all")
MIN_KEEP_RATIO = 0.1  # no group falls below a tenth of its channels: AMC and CACP prune at most 90 % of a layer

_UNARY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
)  # fmt: skip
_UNARY_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid, F.sigmoid,
    F.tanh, F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.interpolate, torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.clamp, operator.neg,
)  # fmt: skip
_UNARY_METHODS = ("relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "detach", "float", "to")
_BINARY = (
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, torch.add, torch.sub,
    torch.mul, torch.div, torch.maximum, torch.minimum,
)  # fmt: skip
_BINARY_METHODS = ("add", "add_", "sub", "mul", "mul_", "div")


def trace(model: nn.Module, example: Tensor, scope: str = "inner") -> ChannelGroups:
    """Find the channel groups of a model.

    Args:
        model: any module that torch.fx can trace; it is left as it is.
        example: an input (1, C, H, W) on the model's device; spatial sizes, and so MACs, are those of this input.
        scope: "inner" prunes groups with a single producer (the channels inside a residual block, a plain chain);
            "all" prunes residual streams too.

    Returns:
        The groups in forward order, with the axes to cut and the layers to count.

    Raises:
        UserError: for an unknown scope, or a model whose forward cannot be traced.
    """
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}, but got {scope!r}")
    graph_module = traced(model, example)
    propagation = _Propagation(graph_module, counted_cost(model, example.shape[1:]))
    for node in graph_module.graph.nodes:
        propagation.visit(node)
    return propagation.groups(scope)


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, ChannelPadShortcut) or super().is_leaf_module(module, qualified_name)


def traced(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a copy in eval mode, every node with the shape of its tensor in `meta["tensor_meta"]`.

    Raises:
        UserError: for a model whose forward cannot be traced.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph_module = fx.GraphModule(model, _LeafTracer().trace(model))
        with torch.no_grad():
            ShapeProp(graph_module).propagate(example)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.fx: {type(error).__name__}: {error}; "
            "forward must not branch on tensor values and must accept the example of shape "
            f"{tuple(example.shape)}; rewrite the operator named above, or wrap it in a module of its own"
        ) from error
    return graph_module


class _LayerDraft(NamedTuple):
    """A layer whose axes still name spaces; `inputs` is None for a per-channel module."""

    kind: str
    inputs: Layout | None
    outputs: Layout
    macs_per_pair: int = 0
    params_per_pair: int = 0
    params_per_out: int = 0
    height: int = 1
    width: int = 1
    kernel: int = 1
    stride: int = 1


class _Propagation:
    """Carries layouts through the graph, node by node, and joins spaces on the way."""

    def __init__(self, graph_module: fx.GraphModule, counted: Cost) -> None:
        self.modules = dict(graph_module.named_modules())
        self.counted = counted
        self.layouts: dict[fx.Node, Layout] = {}
        self.spaces = ChannelSpaces()
        self.drafts: dict[str, _LayerDraft] = {}  # by module name, in forward order
        self.axes: dict[tuple[str, str], Layout] = {}  # (module name, role) -> layout
        self.unknown: list[str] = []

    # nodes ------------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.layouts[node] = self.spaces.new(_shape(node)[1], "", "the model's input")
        elif node.op == "output":
            for source in self._sources(node):
                self.spaces.fix(self.layouts[source], "the model's output")
        elif node.op == "call_module":
            self._visit_module(node)
        elif node.op in ("call_function", "call_method"):
            self._visit_function(node)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.layouts]

    def _visit_module(self, node: fx.Node) -> None:
        module, name, sources = self.modules[str(node.target)], str(node.target), self._sources(node)
        handlers: tuple[tuple[Any, Callable[[fx.Node, str, Any, Layout], Layout | None]], ...] = (
            (nn.Conv2d, self._conv),
            (nn.modules.batchnorm._BatchNorm, self._batch_norm),
            (nn.Linear, self._linear),
            (ChannelPadShortcut, self._shortcut),
            (nn.Flatten, self._flatten_module),
            (_UNARY_MODULES, lambda node, name, module, layout: layout),
        )
        handler = next((handler for kind, handler in handlers if isinstance(module, kind)), None)
        layout = handler(node, name, module, self.layouts[sources[0]]) if handler and len(sources) == 1 else None
        if layout is None:
            self._unknown(node, f"{type(module).__name__} at {name}")
        else:
            self.layouts[node] = layout

    def _visit_function(self, node: fx.Node) -> None:
        sources = self._sources(node)
        if not sources:
            if len(_shape(node)) > 1:  # a part of what an unknown operator made
                self.layouts[node] = self.spaces.new(_shape(node)[1], "", f"made at node {node.name}")
            return
        if not isinstance(node.meta.get("tensor_meta"), tuple):
            return  # sizes and other plain numbers
        if node.op == "call_method":
            layout = self._method(node, str(node.target), sources)
        else:
            layout = self._function(node, node.target, sources)
        if layout is None:
            label = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            self._unknown(node, f"{label} at node {node.name}")
        else:
            self.layouts[node] = layout

    def _function(self, node: fx.Node, function: Any, sources: list[fx.Node]) -> Layout | None:
        first = self.layouts[sources[0]]
        if function in _UNARY_FUNCTIONS:
            return first
        if function in _BINARY:
            return self._elementwise(node)
        if function in (torch.cat, torch.concat):
            return self._cat(node)
        if function is torch.flatten:
            return self._flattened(node, first)
        if function is torch.mean:
            return self._pixel_mean(node, first)
        if function is F.pad:
            return first if _pads_pixels_only(node) else None
        if function is operator.getitem:
            return first if _keeps_channels(node.args[1]) else None
        return None

    def _method(self, node: fx.Node, method: str, sources: list[fx.Node]) -> Layout | None:
        first = self.layouts[sources[0]]
        if method in _UNARY_METHODS:
            return first
        if method in _BINARY_METHODS:
            return self._elementwise(node)
        if method in ("flatten", "view", "reshape"):
            return self._flattened(node, first)
        if method == "mean":
            return self._pixel_mean(node, first)
        return None

    def _unknown(self, node: fx.Node, what: str) -> None:
        self.unknown.append(what)
        for source in self._sources(node):
            self.spaces.fix(self.layouts[source], f"touched by {what}")
        shape = _shape(node)
        if len(shape) > 1:
            self.layouts[node] = self.spaces.new(shape[1], "", f"made by {what}")

    # modules ----------------------------------------------------------------------------------------------------

    def _layer(self, name: str, draft: _LayerDraft) -> Layout:
        """Register a layer; one that is called again (shared weights) joins its own spaces."""
        known = self.drafts.get(name)
        if known is None:
            self.drafts[name] = draft
            return draft.outputs
        pairs = [(known.outputs, draft.outputs)]
        if known.inputs is not None and draft.inputs is not None:
            pairs.append((known.inputs, draft.inputs))
        if not all(self.spaces.join(first, second) for first, second in pairs):
            raise UserError(f"layer {name} is called with inputs of different channel layouts; use two layers")
        self.drafts[name] = known._replace(macs_per_pair=known.macs_per_pair + draft.macs_per_pair)
        return known.outputs

    def _conv(self, node: fx.Node, name: str, module: nn.Conv2d, layout: Layout) -> Layout:
        height, width = _shape(node)[-2:]
        area = math.prod(module.kernel_size)
        bias = int(module.bias is not None)
        facts = dict(height=height, width=width, kernel=module.kernel_size[0], stride=module.stride[0])
        if module.groups == 1:
            outputs = self._outputs(name, module.out_channels)
            self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
            draft = _LayerDraft("conv", layout, outputs, height * width * area, area, bias, **facts)
        elif module.groups == module.in_channels == module.out_channels:
            self.axes[name, "features"] = layout
            draft = _LayerDraft("depthwise", None, layout, height * width * area, 0, area + bias, **facts)
        else:
            reason = f"grouped convolution {name}"
            outputs = self._outputs(name, module.out_channels, reason)
            self.spaces.fix(layout, reason)
            per_out = area * module.in_channels // module.groups
            draft = _LayerDraft("grouped", None, outputs, height * width * per_out, 0, per_out + bias, **facts)
        return self._layer(name, draft)

    def _outputs(self, name: str, channels: int, fixed_reason: str = "") -> Layout:
        known = self.drafts.get(name)
        return known.outputs if known else self.spaces.new(channels, name, fixed_reason)

    def _batch_norm(self, node: fx.Node, name: str, module: nn.BatchNorm2d, layout: Layout) -> Layout:
        self.axes[name, "features"] = layout
        return self._layer(name, _LayerDraft("batchnorm", None, layout, params_per_out=2 if module.affine else 0))

    def _linear(self, node: fx.Node, name: str, module: nn.Linear, layout: Layout) -> Layout | None:
        if len(_shape(node)) != 2:
            return None  # channels are not the last axis
        outputs = self._outputs(name, module.out_features)
        self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
        return self._layer(name, _LayerDraft("linear", layout, outputs, 1, 1, int(module.bias is not None)))

    def _shortcut(self, node: fx.Node, name: str, module: ChannelPadShortcut, layout: Layout) -> Layout:
        outputs = self.spaces.new(_shape(node)[1], name)
        self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
        return outputs

    def _flatten_module(self, node: fx.Node, name: str, module: nn.Flatten, layout: Layout) -> Layout | None:
        return self._repeated(node, layout) if (module.start_dim, module.end_dim) == (1, -1) else None

    # functions --------------------------------------------------------------------------------------------------

    def _elementwise(self, node: fx.Node) -> Layout | None:
        tensors = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("tensor_meta"), tuple)]
        if any(operand not in self.layouts for operand in tensors):
            return None  # a parameter or buffer of the model's own
        if any(len(_shape(operand)) != len(_shape(node)) for operand in tensors):
            return None  # broadcasting from the right: channels meet pixels
        wide = [operand for operand in tensors if _shape(operand)[1] == _shape(node)[1]]
        layout = self.layouts[wide[0]]
        return layout if all(self.spaces.join(layout, self.layouts[other]) for other in wide[1:]) else None

    def _cat(self, node: fx.Node) -> Layout | None:
        tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]
        dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        layouts = [self.layouts[tensor] for tensor in tensors if tensor in self.layouts]
        rank = len(_shape(node))
        same_repeat = len({layout.repeat for layout in layouts}) == 1
        if len(layouts) != len(tensors) or not same_repeat or dimension not in (1, 1 - rank):
            return None
        return Layout(tuple(space for layout in layouts for space in layout.spaces), layouts[0].repeat)

    def _flattened(self, node: fx.Node, layout: Layout) -> Layout | None:
        sizes: Any = node.args[1:]
        if node.target in (torch.flatten, "flatten"):
            start = sizes[0] if sizes else node.kwargs.get("start_dim", 0)
            return self._repeated(node, layout) if start == 1 and len(sizes) < 2 else None
        # view and reshape: (batch, -1) follows the channels, a number in the second place would not
        return self._repeated(node, layout) if len(sizes) == 2 and sizes[1] == -1 else None

    def _repeated(self, node: fx.Node, layout: Layout) -> Layout | None:
        entries = _shape(node)[1]
        factor, rest = divmod(entries, self.spaces.width(layout))
        return layout._replace(repeat=layout.repeat * factor) if rest == 0 and len(_shape(node)) == 2 else None

    def _pixel_mean(self, node: fx.Node, layout: Layout) -> Layout | None:
        dimensions: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        rank = len(_shape(node.all_input_nodes[0]))
        if dimensions is None:
            return None
        listed = dimensions if isinstance(dimensions, list | tuple) else (dimensions,)
        return layout if all(dimension % rank >= 2 for dimension in listed) else None

    # result -----------------------------------------------------------------------------------------------------

    def groups(self, scope: str) -> ChannelGroups:
        members = self.spaces.joined()
        names = {root: self._group_name(spaces) for root, spaces in members.items()}
        consumers: dict[int, list[str]] = {root: [] for root in members}
        for (module, role), layout in self.axes.items():
            for space in layout.spaces if role == "in" else ():
                consumers[self.spaces.root(space)].append(module)
        groups = tuple(
            self._group(names[root], spaces, tuple(consumers[root]), scope) for root, spaces in members.items()
        )
        drafts = tuple(self.drafts.values())
        layers = tuple(self._finished(module, draft, names) for module, draft in self.drafts.items())
        sizes = [
            ((self.spaces.width(draft.inputs) if draft.inputs else 1), self.spaces.width(draft.outputs))
            for draft in drafts
        ]
        macs = sum(draft.macs_per_pair * n_in * n_out for draft, (n_in, n_out) in zip(drafts, sizes, strict=True))
        params = sum(
            (draft.params_per_pair * n_in + draft.params_per_out) * n_out
            for draft, (n_in, n_out) in zip(drafts, sizes, strict=True)
        )
        return ChannelGroups(
            groups=groups,
            axes=tuple(self._axis(module, role, layout, names) for (module, role), layout in self.axes.items()),
            layers=layers,
            fixed_macs=self.counted.macs - macs,
            fixed_params=self.counted.params - params,
            unknown=tuple(self.unknown),
        )

    def _group_name(self, spaces: list[int]) -> str:
        return next(
            (self.spaces.producer[space] for space in spaces if self.spaces.producer[space]), f"tensor{spaces[0]}"
        )

    def _group(self, name: str, spaces: list[int], consumers: tuple[str, ...], scope: str) -> ChannelGroup:
        channels = self.spaces.channels[spaces[0]]
        reason = next((self.spaces.fixed[space] for space in spaces if space in self.spaces.fixed), "")
        if not reason and channels == 1:
            reason = "a single channel"
        if not reason and not any(self.spaces.producer[space] in self.drafts for space in spaces):
            reason = "no layer produces it"
        if not reason and scope == "inner" and len(spaces) > 1:
            reason = "residual stream, outside scope inner"
        return ChannelGroup(
            name=name,
            channels=channels,
            producers=tuple(self.spaces.producer[space] for space in spaces if self.spaces.producer[space]),
            consumers=consumers,
            min_keep=max(1, math.ceil(MIN_KEEP_RATIO * channels - 1e-9)),
            fixed_reason=reason,
        )

    def _axis(self, module: str, role: str, layout: Layout, names: dict[int, str]) -> Axis:
        return Axis(module, role, tuple(names[self.spaces.root(space)] for space in layout.spaces), layout.repeat)

    def _finished(self, module: str, draft: _LayerDraft, names: dict[int, str]) -> Layer:
        inputs = self._axis(module, "in", draft.inputs, names) if draft.inputs else None
        role = "out" if draft.inputs else "features"
        return Layer(
            module, draft.kind, inputs, self._axis(module, role, draft.outputs, names), *draft[3:]
        )  # fmt: skip


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node makes; empty for anything but one tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _pads_pixels_only(node: fx.Node) -> bool:
    padding = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    return isinstance(padding, list | tuple) and len(padding) <= 2 * (len(_shape(node)) - 2)


def _keeps_channels(index: Any) -> bool:
    """Whether x[index] leaves the batch and channel axes alone."""
    whole = slice(None)
    return isinstance(index, tuple) and len(index) > 2 and index[0] == whole and index[1] == whole
