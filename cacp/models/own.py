"""A network of the user's own by name: `package.module:function`, where `function(classes)` returns the nn.Module."""

from __future__ import annotations

import importlib
import re

from torch import nn

from cacp.schema import UserError

_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name has the form package.module:function."""
    return bool(_OWN.fullmatch(name))


def imported_model(name: str, classes: int) -> nn.Module:
    """Import the module and call its function; what that raises itself is left as it is.

    Args:
        name: package.module:function, as the user typed it.
        classes: number of outputs.

    Raises:
        UserError: for a module that cannot be imported, one without this function, or a function that returns
            something else than a module.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"model {name}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "put it beside search.py, or name its folder in PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"model {name}: {module.__file__} must have a function {function_name}(classes), but has "
            f"{', '.join(known) or 'none'}"
        )
    model = function(classes)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {name}: {function_name}(classes) must return a torch.nn.Module, but got {type(model).__name__}"
        )
    return model
