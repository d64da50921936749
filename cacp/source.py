"""Values, functions and modules of PyTorch as Python source."""

from __future__ import annotations

import inspect
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cacp.operators import described
from cacp.schema import UserError

_SPACES: dict[str, Any] = {"F": F, "torch": torch, "operator": operator, "math": math}  # what source may import


def literal(value: Any, node_source: Callable[[fx.Node], str] | None = None) -> str:
    """A value as source.

    Args:
        value: plain, or made of plain values and nodes of a graph.
        node_source: what stands for a node.

    Raises:
        UserError: for anything that no literal of Python or torch stands for.

    >>> literal((1, slice(None, None, 2), float("inf")))
    '(1, ::2, float("inf"))'
    """
    if isinstance(value, fx.Node) and node_source:
        return node_source(value)
    if isinstance(value, slice):
        parts = ["" if part is None else literal(part, node_source) for part in (value.start, value.stop, value.step)]
        return ":".join(parts if parts[2] else parts[:2])
    if isinstance(value, dict):
        pairs = (f"{literal(key, node_source)}: {literal(item, node_source)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        items = ", ".join(literal(item, node_source) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if value is None or isinstance(value, bool | int | float | torch.dtype | torch.memory_format):
        return repr(value)
    raise UserError(f"plain source cannot hold the {type(value).__name__} {value!r:.80} that the model computes with")


def tensor_source(tensor: Tensor) -> str:
    """An empty tensor of this shape, a parameter where it is one."""
    empty = f"torch.zeros({literal(tuple(tensor.shape))}, dtype={tensor.dtype})"
    return f"nn.Parameter({empty})" if isinstance(tensor, nn.Parameter) else empty


def module_source(module: nn.Module, name: str) -> str:
    """The call that builds a module of PyTorch's like this one, from the attributes that keep its arguments."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        raise UserError(f"plain source builds modules of torch.nn, but {name} is a {kind.__module__}.{kind.__name__}")
    words: list[str] = []
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.name in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, parameter.default)
        if value is parameter.empty:
            raise UserError(f"plain source cannot build {name}: a {kind.__name__} does not keep its {parameter.name}")
        if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
            value = value is not None  # bias=True
        if parameter.default is parameter.empty:
            words.append(literal(value))
        elif not _same(value, parameter.default):
            words.append(f"{parameter.name}={literal(value)}")
    return f"nn.{kind.__name__}({', '.join(words)})"


def _same(value: Any, default: Any) -> bool:
    """Whether a value is an argument's default, which may be one number for several axes."""
    return value == default or (isinstance(value, tuple) and set(value) == {default})


def function_source(node: fx.Node) -> str:
    """The name of a function that the source imports."""
    name = getattr(node.target, "__name__", "")
    for space, module in _SPACES.items():
        if name and getattr(module, name, None) is node.target:
            return f"{space}.{name}"
    raise UserError(f"plain source calls functions of torch, but the model calls {described(node, {})}")


def given_keywords(node: fx.Node) -> dict[str, Any]:
    """The keyword arguments of a function that differ from their defaults, where these are known."""
    try:
        parameters = inspect.signature(node.target).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # of C
        return node.kwargs
    known = {key: parameters[key].default for key in node.kwargs if key in parameters}
    return {key: value for key, value in node.kwargs.items() if key not in known or not _same(value, known[key])}
