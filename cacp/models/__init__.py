"""Models by name: CIFAR ResNets and VGGs, torchvision's CNNs for classification, and the user's own."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from cacp.models.resnet import ResNet
from cacp.models.vgg import STAGES, VGG
from cacp.own import is_own, own_function
from cacp.schema import UserError

_TRANSFORMERS = ("vit_", "swin_", "maxvit_")  # tracing knows no attention: little or nothing of these could be pruned
_NO_AUXILIARY = {"aux_logits": False, "init_weights": True}  # evaluation does not run auxiliary heads: none to trace
_KEYWORDS: dict[str, dict[str, Any]] = {"googlenet": _NO_AUXILIARY, "inception_v3": _NO_AUXILIARY}


def _torchvision(name: str, classes: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **_KEYWORDS.get(name, {}))


_CIFAR: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": functools.partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_vgg{depth}_bn": functools.partial(VGG, depth) for depth in STAGES},
}
CIFAR_NAMES = tuple(_CIFAR)
TORCHVISION_NAMES = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(_TRANSFORMERS) and name not in _CIFAR
)
MODEL_NAMES = (*CIFAR_NAMES, *TORCHVISION_NAMES)
MODEL_HELP = (
    f"one of {', '.join(CIFAR_NAMES)}; a CNN of torchvision by its name there (resnet50, mobilenet_v2, ...); "
    "or your own, package.module:function, with function(classes) -> nn.Module"
)


def build_model(name: str, classes: int, seed: int | None = None, importing: bool = False) -> nn.Module:
    """A freshly initialised model on the CPU.

    Args:
        name: one of `MODEL_NAMES`, or package.module:function.
        classes: number of outputs, at least 2.
        seed: makes the initial weights reproducible and leaves the global random state as it was; None draws from it.
        importing: whether a module may be imported for its name: only where the user typed it, never for one that was
            read from a model's files.

    Raises:
        UserError: for an unknown name or a wrong number of classes, or a network of one's own that cannot be built.
    """
    wrong = [fault] if (fault := wrong_name(name, importing)) else []
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        wrong.append(
            f"classes must be a whole number from 2 up, but got {classes!r:.80}; count the classes of the data"
        )
    if wrong:
        raise UserError("\n".join(wrong))
    if seed is None:
        return _built(name, classes)
    # The CPU's generator alone: torch.manual_seed would reseed the GPUs too, which devices=[] does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _built(name, classes)


def _built(name: str, classes: int) -> nn.Module:
    if name in _CIFAR:
        return _CIFAR[name](classes)
    return _torchvision(name, classes) if name in TORCHVISION_NAMES else _own(name, classes)


def _own(name: str, classes: int) -> nn.Module:
    """A network of the user's own; what the function raises itself is left as it is."""
    model = own_function("model", name, "classes")(classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name} must return a torch.nn.Module, but got {type(model).__name__}")
    return model


def wrong_name(name: str, importing: bool) -> str:
    """What is wrong with a model's name; empty for nothing. `importing`: as for `build_model`."""
    if name in MODEL_NAMES or (importing and is_own(name)):
        return ""
    near = ", ".join(difflib.get_close_matches(name[:100], MODEL_NAMES, n=4, cutoff=0.5))
    return f"model must be {MODEL_HELP}, but got {name!r:.100}" + (f"; near: {near}" if near else "")
