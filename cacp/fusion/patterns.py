"""What is fused: [convolution ->] batch norm [-> addition] [-> ReLU] in a torch.fx graph."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn


class Pattern(NamedTuple):
    """[convolution ->] batch norm [-> addition] [-> ReLU], each the only reader of the one before."""

    source: fx.Node
    convolution: str | None
    norm: str
    residual: fx.Node | None
    relu: bool
    last: fx.Node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @classmethod
    def around(cls, norm: fx.Node, network: fx.GraphModule) -> Pattern:
        source, convolution = _input(norm), None
        last, residual, relu = norm, None, False
        addition = _only_reader(last)
        if addition is not None and (other := _same_shape_addend(addition, last)) is not None:
            last, residual = addition, other
        reader = _only_reader(last)
        if reader is not None and _is_relu(reader, network):
            last, relu = reader, True
        if _is_plain_convolution(source, network) and len(source.users) == 1:
            source, convolution = _input(source), str(source.target)
        return cls(source, convolution, str(norm.target), residual, relu, last)


def module_of(node: fx.Node, network: fx.GraphModule) -> Any:
    return network.get_submodule(str(node.target))


def is_call_of(node: fx.Node, network: fx.GraphModule, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(module_of(node, network), kind)


def _is_plain_convolution(node: fx.Node, network: fx.GraphModule) -> bool:
    if not is_call_of(node, network, nn.Conv2d):
        return False
    convolution = module_of(node, network)
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    return is_call_of(node, network, nn.ReLU) or (node.op == "call_function" and node.target in (F.relu, torch.relu))


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same_shape_addend(addition: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand where `addition` adds an equally shaped tensor to `node`."""
    if addition.op != "call_function" or addition.target not in (operator.add, torch.add):
        return None
    others = [operand for operand in addition.args if operand is not node]
    if len(others) != 1 or addition.kwargs or not isinstance(others[0], fx.Node):
        return None
    shapes = [getattr(operand.meta.get("tensor_meta"), "shape", None) for operand in (node, others[0])]
    return others[0] if shapes[0] == shapes[1] else None


def _input(node: fx.Node) -> fx.Node:
    """The tensor that a one-input module is called with."""
    (source,) = node.all_input_nodes
    return source
