"""What a user names as `package.module:function`: a network, a method."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from cacp.schema import UserError

_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name has the form package.module:function."""
    return bool(_OWN.fullmatch(name))


def own_function(kind: str, name: str, arguments: str) -> Callable[..., Any]:
    """Import the module and find its function.

    Args:
        kind: what the function is for, as the setting is called: model, method.
        name: package.module:function, as the user typed it.
        arguments: that the function takes, for the message.

    Raises:
        UserError: for a module that cannot be imported, or one without this function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{kind} {name}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "put it beside search.py, or name its folder in PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{kind} {name}: {module.__file__} must have a function {function_name}({arguments}), but has "
            f"{', '.join(known) or 'none'}"
        )
    return function
