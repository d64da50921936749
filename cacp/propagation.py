"""Channel layouts carried through a torch.fx graph, operator by operator: what `cacp.graph.trace` builds groups from.

A convolution or linear layer opens a new space, an addition or product joins spaces, a concatenation strings them
together; joined spaces become one group. The idea of coupled channels is that of DepGraph (Fang et al., CVPR 2023).
What an operator that is not known touches stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn

from cacp import operators
from cacp.models.resnet import ChannelPadShortcut
from cacp.operators import argument, arguments_from, shape
from cacp.schema import UserError
from cacp.spaces import ChannelSpaces, Layout


class LayerDraft(NamedTuple):
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


class Propagation:
    """Carries layouts through the graph, node by node, and joins spaces on the way.

    Attributes:
        spaces: the channels of all tensors.
        drafts: layers by module name, in forward order.
        axes: (module name, role) -> layout.
        unknown: operators that were not known, with the place where each stands.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.modules = dict(graph_module.named_modules())
        self.layouts: dict[fx.Node, Layout] = {}
        self.spaces = ChannelSpaces()
        self.drafts: dict[str, LayerDraft] = {}
        self.axes: dict[tuple[str, str], Layout] = {}
        self.unknown: list[str] = []
        self._of_module: tuple[tuple[Any, Callable[[fx.Node, str, Any, Layout], Layout | None]], ...] = (
            (nn.Conv2d, self._conv),
            (nn.modules.batchnorm._BatchNorm, self._batch_norm),
            (nn.Linear, self._linear),
            (ChannelPadShortcut, self._shortcut),
            (nn.Flatten, self._flatten_module),
            (nn.LayerNorm, lambda node, name, module, layout: self._normalised(node, layout)),
            (operators.POINTWISE_MODULES, lambda node, name, module, layout: layout),
            (operators.PIXEL_MODULES, lambda node, name, module, layout: layout if layout.axis == 1 else None),
        )
        self._of_kind: dict[str, Callable[[fx.Node, Layout], Layout | None]] = {
            "pointwise": lambda node, layout: layout,
            "pixels": lambda node, layout: layout,
            "sum": lambda node, layout: self._elementwise(node, product=False),
            "product": lambda node, layout: self._elementwise(node, product=True),
            "cat": lambda node, layout: self._cat(node),
            "flatten": self._flattened,
            "view": self._viewed,
            "mean": lambda node, layout: layout if operators.averages_pixels_only(node) else None,
            "pad": lambda node, layout: layout if operators.pads_pixels_only(node) else None,
            "index": lambda node, layout: layout if operators.keeps_channels(node) else None,
            "permute": self._permuted,
            "layer_norm": self._normalised,
            "squeeze": lambda node, layout: layout if operators.changes_pixel_axes_only(node) else None,
        }

    # nodes ------------------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.layouts[node] = self.spaces.new(shape(node)[1], "", "the model's input")
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
        name, sources = str(node.target), self._sources(node)
        module = self.modules[name]
        handler = next((handler for kind, handler in self._of_module if isinstance(module, kind)), None)
        layout = handler(node, name, module, self.layouts[sources[0]]) if handler and len(sources) == 1 else None
        self._settle(node, layout)

    def _visit_function(self, node: fx.Node) -> None:
        sources = self._sources(node)
        if not sources:
            if len(shape(node)) > 1:  # a part of what an unknown operator made
                self.layouts[node] = self.spaces.new(shape(node)[1], "", f"made at node {node.name}")
            return
        if not operators.makes_tensor(node):
            return
        kind = operators.KIND_OF.get(node.target, "")
        layout = self.layouts[sources[0]]
        known = kind in operators.ANY_AXIS or (kind and layout.axis == 1)
        self._settle(node, self._of_kind[kind](node, layout) if known else None)

    def _settle(self, node: fx.Node, layout: Layout | None) -> None:
        """Give a node its layout; where there is none, keep whole what it touches."""
        if layout is not None:
            self.layouts[node] = layout
            return
        what = operators.described(node, self.modules)
        self.unknown.append(what)
        for source in self._sources(node):
            self.spaces.fix(self.layouts[source], f"touched by {what}")
        if len(shape(node)) > 1:
            self.layouts[node] = self.spaces.new(shape(node)[1], "", f"made by {what}")

    # modules ----------------------------------------------------------------------------------------------------------

    def _layer(self, name: str, draft: LayerDraft) -> Layout:
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

    def _conv(self, node: fx.Node, name: str, module: nn.Conv2d, layout: Layout) -> Layout | None:
        if layout.axis != 1:
            return None
        height, width = shape(node)[-2:]
        area, bias = math.prod(module.kernel_size), int(module.bias is not None)
        facts = dict(height=height, width=width, kernel=module.kernel_size[0], stride=module.stride[0])
        if module.groups == 1:
            outputs = self._outputs(name, module.out_channels)
            self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
            return self._layer(name, LayerDraft("conv", layout, outputs, height * width * area, area, bias, **facts))
        per_group = module.in_channels // module.groups, module.out_channels // module.groups
        cuttable = self.spaces.grouped(layout, *per_group)
        if cuttable is None:
            reason = f"grouped convolution {name}"
            outputs = self._outputs(name, module.out_channels, reason)
            self.spaces.fix(layout, reason)
        else:
            outputs = self.axes[name, "features"] = cuttable
        kind = "depthwise" if per_group == (1, 1) else "grouped"
        per_out = area * per_group[0]
        return self._layer(name, LayerDraft(kind, None, outputs, height * width * per_out, 0, per_out + bias, **facts))

    def _outputs(self, name: str, channels: int, fixed_reason: str = "") -> Layout:
        known = self.drafts.get(name)
        return known.outputs if known else self.spaces.new(channels, name, fixed_reason)

    def _batch_norm(self, node: fx.Node, name: str, module: nn.BatchNorm2d, layout: Layout) -> Layout | None:
        if layout.axis != 1:
            return None
        self.axes[name, "features"] = layout
        return self._layer(name, LayerDraft("batchnorm", None, layout, params_per_out=2 if module.affine else 0))

    def _linear(self, node: fx.Node, name: str, module: nn.Linear, layout: Layout) -> Layout | None:
        places = shape(node)[1:-1]
        if layout.axis != len(places) + 1:
            return None  # channels are not the last axis
        outputs = self._outputs(name, module.out_features)._replace(axis=layout.axis)
        self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
        height, width = places if len(places) == 2 else (math.prod(places), 1)
        bias = int(module.bias is not None)
        return self._layer(name, LayerDraft("linear", layout, outputs, height * width, 1, bias, height, width))

    def _shortcut(self, node: fx.Node, name: str, module: ChannelPadShortcut, layout: Layout) -> Layout:
        outputs = self.spaces.new(shape(node)[1], name)
        self.axes[name, "in"], self.axes[name, "out"] = layout, outputs
        return outputs

    def _flatten_module(self, node: fx.Node, name: str, module: nn.Flatten, layout: Layout) -> Layout | None:
        known = layout.axis == 1 and (module.start_dim, module.end_dim) == (1, -1)
        return self._repeated(node, layout) if known else None

    # functions --------------------------------------------------------------------------------------------------------

    def _elementwise(self, node: fx.Node, product: bool) -> Layout | None:
        tensors = [operand for operand in node.all_input_nodes if operators.makes_tensor(operand)]
        if any(operand not in self.layouts for operand in tensors):
            return None  # a parameter or buffer of the model's own
        if any(len(shape(operand)) != len(shape(node)) for operand in tensors):
            return None  # broadcasting from the right: channels meet pixels
        axis = self.layouts[tensors[0]].axis
        if any(self.layouts[operand].axis != axis for operand in tensors):
            return None
        wide = [self.layouts[operand] for operand in tensors if shape(operand)[axis] == shape(node)[axis]]
        return wide[0] if all(self.spaces.join(wide[0], other, product) for other in wide[1:]) else None

    def _cat(self, node: fx.Node) -> Layout | None:
        tensors, dimension = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        layouts = [self.layouts[tensor] for tensor in tensors if tensor in self.layouts]
        same = len({layout[1:] for layout in layouts}) == 1
        if len(layouts) != len(tensors) or not same or dimension not in (1, 1 - len(shape(node))):
            return None
        return layouts[0]._replace(spaces=tuple(space for layout in layouts for space in layout.spaces))

    def _flattened(self, node: fx.Node, layout: Layout) -> Layout | None:
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        return self._repeated(node, layout) if (start, end) == (1, -1) else None

    def _viewed(self, node: fx.Node, layout: Layout) -> Layout | None:
        """(batch, -1) follows the channels, and so does a tensor's number of channels; a plain number would not."""
        sizes = arguments_from(node, 1)
        if len(sizes) < 2:
            return None
        if sizes[1] == -1:
            return self._repeated(node, layout) if len(sizes) == 2 else None
        counted = operators.counted_tensor(sizes[1])
        if counted not in self.layouts or shape(node)[1] != shape(node.all_input_nodes[0])[1]:
            return None
        return layout if self.spaces.join(layout, self.layouts[counted], product=True) else None

    def _repeated(self, node: fx.Node, layout: Layout) -> Layout | None:
        factor, rest = divmod(shape(node)[1], self.spaces.width(layout))
        return layout._replace(repeat=layout.repeat * factor) if rest == 0 and len(shape(node)) == 2 else None

    def _permuted(self, node: fx.Node, layout: Layout) -> Layout | None:
        dimensions = [dimension % len(shape(node)) for dimension in arguments_from(node, 1)]
        return layout._replace(axis=dimensions.index(layout.axis)) if dimensions and dimensions[0] == 0 else None

    def _normalised(self, node: fx.Node, layout: Layout) -> Layout | None:
        """Layer norm over the channels: every one of them is in the others' mean and variance."""
        widths = {shape(source)[-1] for source in self._sources(node)}
        if layout.axis != len(shape(node)) - 1 or widths != {self.spaces.width(layout)}:
            return None
        self.spaces.fix(layout, f"normalised over all channels by {operators.described(node, self.modules)}")
        return layout
