"""A model as Python source that needs torch and safetensors alone: `plain_source(model, ...)`.

The model is traced by torch.fx. Its modules become constructor calls under the names they have in the state dict, its
graph the lines of `forward`, so that the file reads the same weights and runs the same operators in the same order.

Not known: parametrised layers, functions that are not of torch or torch.nn.functional, and tensors that are in no state
dict. Stochastic depth, which does nothing outside of training, is left out; functional dropout stays off.
"""

from __future__ import annotations

import itertools
import keyword
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn
from torchvision.ops import stochastic_depth

from cacp.schema import Normalisation, UserError
from cacp.source import function_source, given_keywords, literal, module_source, tensor_source

LINE = 108  # characters of an expression in `forward`, where an operator alone is not longer
_NAMES = ("x", "y", "z", "u", "v", "w")  # of tensors in `forward`, each used again once its tensor is not needed
_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.eq: "==", operator.ne: "!=",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip

_TEMPLATE = '''"""{title}

    from model import load, normalised

    network = load()                       # an nn.Module in eval mode, on the CPU, with the weights beside this file
    logits = network(normalised(images))   # images {shape} in [0, 1]; output k stands for CLASSES[k]

Needs torch and safetensors. Written by cacp for inference: what only acts in training may be left out.
"""

{imports}from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

MEAN, STD = {mean}, {std}
CLASSES = (
{classes}
)


def normalised(images):
    """Images {shape} in [0, 1] as the network wants them."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def load(weights=Path(__file__).with_name("model.safetensors")):
    """The network in eval mode, on the CPU, with the weights of a safetensors file."""
    network = Network()
    tensors = load_file(weights)
    network.load_state_dict({tensors})
    return network.eval()


class Part(nn.Module):
    """Layers, parameters, buffers and parts by their names."""

    def __init__(self, members):
        super().__init__()
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            elif isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            else:
                self.register_buffer(name, member)

    def __getitem__(self, name):
        return getattr(self, name)


class Network(Part):
    def __init__(self):
        super().__init__({members})

    def forward(self, {arguments}):
{forward}
'''


def plain_source(
    model: nn.Module,
    title: str,
    input_shape: tuple[int, int, int],
    normalisation: Normalisation,
    classes: tuple[str, ...],
) -> str:
    """The source of a Python file that builds a model and loads it from `model.safetensors` beside the file.

    Args:
        model: that torch.fx can trace, in eval mode.
        title: one line that says what it is.
        input_shape: (C, H, W) of an image.
        normalisation: that the model wants.
        classes: names of its outputs.

    Raises:
        UserError: for a module, an operator or a tensor that plain source cannot name.
    """
    graph = fx.Tracer().trace(model)
    for node in list(graph.nodes):
        if node.target is stochastic_depth:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    members = _Members(model, graph)
    forward = _Forward(graph, members)
    unused = model.state_dict().keys() - members.tensor_names
    lines = "\n".join(f"        {line}" for line in forward.lines)
    return _TEMPLATE.format(
        imports="".join(f"import {module}\n" for module in ("math", "operator") if f"{module}." in lines),
        title=title.replace("\\", "").replace('"', "'"),
        shape=f"(B, {', '.join(map(str, input_shape))})",
        mean=literal(normalisation.mean),
        std=literal(normalisation.std),
        classes=_wrapped(classes),
        tensors="{name: tensors[name] for name in network.state_dict()}" if unused else "tensors",
        members=_rendered(members.tree, 2, is_root=True),
        arguments=", ".join(forward.arguments),
        forward=lines,
    )


def _wrapped(names: tuple[str, ...]) -> str:
    """The items of a tuple of strings, as many on a line as fit."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) > LINE:
            lines.append("")
        lines[-1] += f"{literal(name)}, "
    return "\n".join(f"    {line.rstrip()}" for line in lines)


# members --------------------------------------------------------------------------------------------------------------


class _Members:
    """The modules and tensors that a graph uses: a tree of names, whose leaves are source."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.tree: dict[str, Any] = {}
        self.tensor_names: set[str] = set()
        used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        state = model.state_dict()
        for name, module in model.named_modules():
            if name in used:
                self._place(name, module_source(module, name))
                self.tensor_names |= {f"{name}.{key}" for key in module.state_dict()}
                continue
            for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
                path = f"{name}.{key}".lstrip(".")
                if path in used and path in state and tensor is not None:
                    self._place(path, tensor_source(tensor))
                    self.tensor_names.add(path)
        known = self.tensor_names.union(name for name, _ in model.named_modules())
        if lost := sorted(used - known):
            raise UserError(
                f"plain source takes tensors from the state dict, but {', '.join(lost)} are not in it; "
                "register them as buffers of the model"
            )

    def _place(self, path: str, source: str) -> None:
        *parents, name = path.split(".")
        branch = self.tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = source

    def path(self, target: str) -> str:
        """The expression that looks up a module or tensor."""
        text, branch = "self", self.tree
        for name in target.split("."):
            if branch is not self.tree and _is_list(branch):
                text += f"[{name}]"
            else:
                text += f".{name}" if name.isidentifier() and not keyword.iskeyword(name) else f"[{literal(name)}]"
            branch = branch.get(name, {}) if isinstance(branch, dict) else {}
        return text


def _is_list(branch: Mapping[str, Any]) -> bool:
    """Whether members are modules whose names count up from 0."""
    modules = all(isinstance(member, dict) or member.startswith("nn.") for member in branch.values())
    parameters = any(isinstance(member, str) and member.startswith("nn.Parameter(") for member in branch.values())
    return modules and not parameters and {str(index) for index in range(len(branch))} == branch.keys()


def _rendered(branch: Mapping[str, Any], depth: int, is_root: bool = False) -> str:
    """A branch of the tree as a list of modules, or as a Part; of the root its members alone."""
    is_list = not is_root and _is_list(branch)
    lines = []
    for name in sorted(branch, key=int) if is_list else branch:
        member = branch[name]
        text = member if isinstance(member, str) else _rendered(member, depth + 1)
        lines.append("    " * (depth + 1) + (f"{text}," if is_list else f"{literal(name)}: {text},"))
    opening, closing = ("nn.ModuleList([", "])") if is_list else ("{", "}") if is_root else ("Part({", "})")
    return "\n".join([opening, *lines, "    " * depth + closing])


# forward --------------------------------------------------------------------------------------------------------------


class _Forward:
    """The lines of `forward`, operator by operator in the order of the graph.

    A result that the next operator alone needs is written inside of it. A name is used again once its tensor is not
    needed, so that memory is freed as in the model.
    """

    def __init__(self, graph: fx.Graph, members: _Members) -> None:
        self.arguments: list[str] = []
        self.lines: list[str] = []
        self._members = members
        self._names: dict[fx.Node, str] = {}
        self._pending: tuple[fx.Node, str] | None = None  # the operator that is not written yet, and its source
        steps = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self._names[node] = str(node.target)
                self.arguments.append(str(node.target) + "".join(f"={literal(default)}" for default in node.args))
            elif node.op != "get_attr" and not _is_unused_look_up(node):
                steps.append(node)
        self._place = {node: place for place, node in enumerate(steps)}
        for node in steps:
            self._add(node)
        self._write()

    def _add(self, node: fx.Node) -> None:
        text = self._source(node)
        if self._pending and (not _alone_needs(node, self._pending[0]) or len(text) > LINE):
            self._write()
            text = self._source(node)
        self._pending = (node, text)

    def _write(self) -> None:
        """Write the pending operator, and name its result."""
        if self._pending is None:
            return
        node, text = self._pending
        self._pending = None
        for source in [source for source in self._names if self._last_use(source) <= self._place[node]]:
            del self._names[source]
        if node.op == "output" or not node.users:
            self.lines.append(text)
            return
        name = next(name for name in _names() if name not in self._names.values())
        self.lines.append(f"{name} = {text}")
        self._names[node] = name

    def _last_use(self, node: fx.Node) -> int:
        return max((self._place.get(user, -1) for user in node.users), default=-1)

    def _described(self, node: fx.Node) -> str:
        if self._pending and node is self._pending[0]:
            return self._pending[1]
        return self._members.path(str(node.target)) if node.op == "get_attr" else self._names[node]

    def _operand(self, value: Any) -> str:
        """A value to the left or right of an operator or of a dot."""
        text = literal(value, self._described)
        infix = self._pending is not None and value is self._pending[0] and self._pending[0].target in _INFIX
        return f"({text})" if infix or text.startswith("-") else text

    def _source(self, node: fx.Node) -> str:
        """The call of an operator."""
        if node.op == "output":
            return f"return {literal(node.args[0], self._described)}"
        if node.op == "call_module":
            return f"{self._members.path(str(node.target))}({self._call(node.args, node.kwargs)})"
        if node.op == "call_method":
            return f"{self._operand(node.args[0])}.{node.target}({self._call(node.args[1:], node.kwargs)})"
        if node.target in _INFIX and len(node.args) == 2 and not node.kwargs:
            return f" {_INFIX[node.target]} ".join(self._operand(argument) for argument in node.args)
        if node.target is getattr:
            return f"{self._operand(node.args[0])}.{node.args[1]}"
        if node.target is operator.getitem:
            index = literal(node.args[1], self._described)
            is_tuple = isinstance(node.args[1], tuple) and node.args[1]
            return f"{self._operand(node.args[0])}[{index[1:-1] if is_tuple else index}]"
        return f"{function_source(node)}({self._call(node.args, given_keywords(node))})"

    def _call(self, args: Any, kwargs: Any) -> str:
        words = [literal(value, self._described) for value in args]
        return ", ".join([*words, *(f"{key}={literal(value, self._described)}" for key, value in kwargs.items())])


def _is_unused_look_up(node: fx.Node) -> bool:
    return not node.users and (node.target in (operator.getitem, getattr) or node.target == "size")


def _alone_needs(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node needs another's result, once, and no other node does."""
    uses: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda used: uses.append(used))
    return list(other.users) == [node] and uses.count(other) == 1


def _names() -> Iterator[str]:
    yield from _NAMES
    yield from (f"x{number}" for number in itertools.count())
