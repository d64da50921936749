"""Criterion-driven methods: (subject, budget) -> Pruned, without episodes. One file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cacp.graph import SCOPES
from cacp.methods.caie import CAIE
from cacp.methods.fpgm import FPGM
from cacp.methods.gfi_ap import GFIAP
from cacp.methods.magnitude import magnitude
from cacp.methods.sensitivity import sensitivity
from cacp.methods.sfp import SFP
from cacp.methods.subject import Method, Pruned, Subject, Training
from cacp.methods.taylor import taylor
from cacp.methods.uniform import uniform
from cacp.own import is_own, own_function
from cacp.schema import UserError


class Entry(NamedTuple):
    """A method by name: how it is made from its options, the scope that its source prunes, and all that it can."""

    make: Callable[..., Method]
    scope: str = "inner"
    scopes: tuple[str, ...] = SCOPES

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(item.name for item in dataclasses.fields(self.make)) if dataclasses.is_dataclass(self.make) else ()


METHODS: dict[str, Entry] = {
    "uniform": Entry(lambda: uniform),
    "taylor": Entry(lambda: taylor),
    "sensitivity": Entry(lambda: sensitivity),
    "caie": Entry(CAIE, scope="all"),
    "gfi_ap": Entry(GFIAP, scope="all"),
    "sfp": Entry(SFP, scopes=("inner",)),  # a filter of a stream can be zeroed, but what a shortcut brings stays
    "fpgm": Entry(FPGM, scopes=("inner",)),
    "magnitude": Entry(lambda: magnitude),
}
METHOD_HELP = (
    f"one of {', '.join(METHODS)}, or your own, package.module:function, with function(subject, budget) -> Pruned"
)


def known_method(name: str) -> bool:
    """Whether a name is one of METHODS or has the form package.module:function."""
    return name in METHODS or is_own(name)


def method_entry(name: str) -> Entry:
    """A method of `METHODS`, or the user's own, whose module is imported when it is made."""
    return METHODS[name] if name in METHODS else Entry(lambda: _own(name))


def _own(name: str) -> Method:
    function = own_function("method", name, "subject, budget")

    def method(subject: Subject, budget: Any) -> Pruned:
        pruned = function(subject, budget)
        if not isinstance(pruned, Pruned):
            raise UserError(f"method {name} must return cacp.methods.Pruned, but got {type(pruned).__name__}")
        return pruned

    return method


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method with its options; those that are None keep the method's defaults."""
    return method_entry(name).make(**{key: value for key, value in options.items() if value is not None})


__all__ = [
    "METHODS",
    "METHOD_HELP",
    "Method",
    "Pruned",
    "Subject",
    "Training",
    "known_method",
    "make_method",
    "method_entry",
    "sensitivity",
    "taylor",
    "uniform",
]
