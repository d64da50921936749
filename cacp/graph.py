"""From a model to its channel groups: `trace(model, example) -> ChannelGroups`.

The model is traced with torch.fx and every tensor gets a channel layout, see `cacp.propagation`.

Known: conv (grouped ones shrink by whole groups, depthwise ones by channels), batch norm, linear, element-wise
operators, gates of one factor a channel, pooling, cat, flatten, spatial padding, mean over pixels, permute, layer norm
(which keeps its channels whole), and the option A shortcut `ChannelPadShortcut`.
Not known: anything else, such as chunk, split and channel shuffle. It is listed in `ChannelGroups.unknown` with its
line of source, and the groups it touches stay whole.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import io
import math
import os
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from cacp import operators
from cacp.cost import counted_cost
from cacp.models.resnet import ChannelPadShortcut
from cacp.propagation import LayerDraft, Propagation
from cacp.schema import Axis, ChannelGroup, ChannelGroups, Cost, Layer, UserError
from cacp.spaces import Layout

SCOPES = ("inner", "all")
MIN_KEEP_RATIO = 0.1  # no group falls below a tenth of its channels: AMC and CACP prune at most 90 % of a layer
_TORCH = os.path.dirname(torch.__file__) + os.sep


def trace(
    model: nn.Module,
    example: Tensor,
    scope: str = "inner",
    ignore: Sequence[str] = (),
    min_keep: float = MIN_KEEP_RATIO,
    channel_multiple: int = 1,
) -> ChannelGroups:
    """Find the channel groups of a model.

    Args:
        model: any module that torch.fx can trace; it is left as it is.
        example: an input (1, C, H, W) on the model's device; spatial sizes, and so MACs, are those of this input.
        scope: "inner" prunes the channels inside a block or a plain chain, gates with what they scale; "all" prunes
            residual streams too, where several layers add up.
        ignore: groups that stay whole: patterns with *, ? and [] of their names, or of modules that produce them.
        min_keep: the least keep ratio of every group, in (0, 1].
        channel_multiple: keep counts are multiples of this number, or all channels of the group.

    Returns:
        The groups in forward order, with the axes to cut and the layers to count.

    Raises:
        UserError: for an argument out of range, a pattern that nothing matches, or a model whose forward cannot be
            traced.
    """
    wrong = _wrong_arguments(scope, ignore, min_keep, channel_multiple)
    if wrong:
        raise UserError("\n".join(wrong))
    graph_module = traced(model, example)
    propagation = Propagation(graph_module)
    for node in graph_module.graph.nodes:
        propagation.visit(node)
    groups = _Assembly(propagation, scope, tuple(ignore), min_keep, channel_multiple)
    return groups.assembled(counted_cost(model, example.shape[1:]))


def _wrong_arguments(scope: str, ignore: Sequence[str], min_keep: float, channel_multiple: int) -> list[str]:
    wrong = []
    if scope not in SCOPES:
        wrong.append(f"scope must be one of {', '.join(SCOPES)}, but got {scope!r}")
    if isinstance(ignore, str):
        wrong.append(f"ignore must be a list of patterns, but got {ignore!r}; write [{ignore!r}]")
    if not 0 < min_keep <= 1:
        wrong.append(f"min_keep must be a keep ratio in (0, 1], but got {min_keep!r}; 0.1 keeps a tenth of every group")
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        wrong.append(f"channel_multiple must be a whole number from 1 up, but got {channel_multiple!r}; 1 is no bound")
    return wrong


# graph ----------------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Leaves the option A shortcut whole, and notes the line of source that every node comes from."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, ChannelPadShortcut) or super().is_leaf_module(module, qualified_name)

    def create_node(self, *arguments: Any, **keywords: Any) -> fx.Node:
        node = super().create_node(*arguments, **keywords)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename != __file__:  # no forward but PyTorch's own
            node.meta["place"] = _place(frame.f_code.co_filename, frame.f_lineno)
        return node


class _Shapes(ShapeProp):
    """Notes the node that is being run."""

    node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def traced(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a copy in eval mode, every node with the shape of its tensor in `meta["tensor_meta"]`.

    Raises:
        UserError: for a model whose forward cannot be traced, with the operator and its line of source.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph_module = fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:
        raise _untraceable(model, example, error, _raising_line(error)) from error
    shapes = _Shapes(graph_module)
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # ShapeProp prints what it raises
            shapes.propagate(example)
    except Exception as error:
        what = operators.described(shapes.node, dict(graph_module.named_modules()))
        raise _untraceable(model, example, error.__cause__ or error, what) from error
    return graph_module


def _untraceable(model: nn.Module, example: Tensor, error: BaseException, where: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be traced by torch.fx: {type(error).__name__}: {error}; in {where}; "
        "forward must not branch on tensor values and must accept the example of shape "
        f"{tuple(example.shape)}; rewrite the operator named above, or wrap it in a module of its own"
    )


def _raising_line(error: BaseException) -> str:
    """The last line of an error's traceback that is not PyTorch's: the operator, and where it stands."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
    return f"`{frames[-1].line}` ({_place(frames[-1].filename, frames[-1].lineno)})"


def _place(file: str, line: int | None) -> str:
    return f"{os.path.basename(file)}:{line}"


# groups ---------------------------------------------------------------------------------------------------------------


class _Assembly:
    """Groups out of the spaces that were joined: their names, and which of them may be pruned how far."""

    def __init__(
        self, propagation: Propagation, scope: str, ignore: tuple[str, ...], min_keep: float, channel_multiple: int
    ) -> None:
        self.propagation = propagation
        self.spaces = propagation.spaces
        self.scope = scope
        self.ignore = ignore
        self.min_keep = min_keep
        self.channel_multiple = channel_multiple
        self.members = self.spaces.joined()
        self.producers = {
            root: tuple(self.spaces.producer[space] for space in spaces if self.spaces.producer[space])
            for root, spaces in self.members.items()
        }
        self.names = {root: next(iter(names), f"tensor{root}") for root, names in self.producers.items()}
        self._check_patterns()

    def _check_patterns(self) -> None:
        known = sorted({*self.names.values(), *(name for names in self.producers.values() for name in names)})
        wrong = [
            f"ignore: no group and no module that produces one matches {pattern!r}; near: {_near(pattern, known)}"
            for pattern in self.ignore
            if not fnmatch.filter(known, pattern)
        ]
        if wrong:
            raise UserError("\n".join([*wrong, "print(trace(model, example)) shows all names"]))

    def assembled(self, counted: Cost) -> ChannelGroups:
        """The groups; what `counted` has more than the known layers is fixed."""
        consumers: dict[int, list[str]] = {root: [] for root in self.members}
        for (module, role), layout in self.propagation.axes.items():
            for space in layout.spaces if role == "in" else ():
                consumers[self.spaces.root(space)].append(module)
        drafts = self.propagation.drafts
        macs, params = 0, 0
        for draft in drafts.values():
            n_in = self.spaces.width(draft.inputs) if draft.inputs else 1
            n_out = self.spaces.width(draft.outputs)
            macs += draft.macs_per_pair * n_in * n_out
            params += (draft.params_per_pair * n_in + draft.params_per_out) * n_out
        return ChannelGroups(
            groups=tuple(self._group(root, tuple(consumers[root])) for root in self.members),
            axes=tuple(self._axis(module, role, layout) for (module, role), layout in self.propagation.axes.items()),
            layers=tuple(self._layer(module, draft) for module, draft in drafts.items()),
            fixed_macs=counted.macs - macs,
            fixed_params=counted.params - params,
            unknown=tuple(self.propagation.unknown),
        )

    def _group(self, root: int, consumers: tuple[str, ...]) -> ChannelGroup:
        channels = self.spaces.channels[root]
        block = math.lcm(*(self.spaces.block[space] for space in self.members[root]))
        multiple = math.lcm(block, self.channel_multiple)
        least = max(1, math.ceil(self.min_keep * channels - 1e-9))
        least = min(-(-least // multiple) * multiple, channels)
        return ChannelGroup(
            name=self.names[root],
            channels=channels,
            producers=self.producers[root],
            consumers=consumers,
            min_keep=least,
            fixed_reason=self._fixed_reason(root, least),
            multiple=multiple,
            block=block,
        )

    def _fixed_reason(self, root: int, least: int) -> str:
        spaces, channels = self.members[root], self.spaces.channels[root]
        pattern = next((pattern for pattern in self.ignore if self._matches(root, pattern)), None)
        reasons = (
            *(self.spaces.fixed[space] for space in spaces if space in self.spaces.fixed),
            "a single channel" if channels == 1 else "",
            "" if any(name in self.propagation.drafts for name in self.producers[root]) else "no layer produces it",
            f"ignored by pattern {pattern!r}" if pattern else "",
            "residual stream, outside scope inner"
            if self.scope == "inner" and not self.spaces.streams.isdisjoint(spaces)
            else "",
            f"no keep count below its {channels} channels: see min_keep and channel_multiple"
            if least == channels
            else "",
        )
        return next((reason for reason in reasons if reason), "")

    def _matches(self, root: int, pattern: str) -> bool:
        return bool(fnmatch.filter((self.names[root], *self.producers[root]), pattern))

    def _axis(self, module: str, role: str, layout: Layout) -> Axis:
        return Axis(
            module, role, tuple(self.names[self.spaces.root(space)] for space in layout.spaces), layout.repeat
        )  # fmt: skip

    def _layer(self, module: str, draft: LayerDraft) -> Layer:
        inputs = self._axis(module, "in", draft.inputs) if draft.inputs else None
        role = "out" if draft.inputs else "features"
        return Layer(module, draft.kind, inputs, self._axis(module, role, draft.outputs), *draft[3:])


def _near(pattern: str, names: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5])
