"""Models by name."""

from __future__ import annotations

import torch
from torch import nn

from cacp.models.resnet import ResNet
from cacp.schema import UserError

_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
MODEL_NAMES = tuple(_DEPTHS)


def build_model(name: str, classes: int, seed: int | None = None) -> nn.Module:
    """A freshly initialised model on the CPU.

    Args:
        name: one of `MODEL_NAMES`.
        classes: number of outputs, at least 2.
        seed: makes the initial weights reproducible and leaves the global random state as it was; None draws from it.

    Raises:
        UserError: for an unknown name or a wrong number of classes.
    """
    wrong = []
    if name not in _DEPTHS:
        wrong.append(f"model must be one of {', '.join(MODEL_NAMES)}, but got {name!r}; choose a name from the list")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        wrong.append(f"classes must be a whole number from 2 up, but got {classes!r}; count the classes of the data")
    if wrong:
        raise UserError("\n".join(wrong))
    if seed is None:
        return ResNet(_DEPTHS[name], classes)
    # The CPU's generator alone: torch.manual_seed would reseed the GPUs too, which devices=[] does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResNet(_DEPTHS[name], classes)
