"""Training flags of modules, kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Restore `training` of every module, as `model.train()` would also set those that were frozen."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
