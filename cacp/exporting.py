"""A sliced model on disk: `architecture.json` + `model.safetensors`, loaded by `load_pruned(folder)`.

Nothing named in a file is imported and nothing is unpickled: the architecture is built from a known model name (or by
a function of the caller's), sliced to the keep counts, and filled from safetensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp.checkpoint import load_json, save_json, save_tensors, sha256
from cacp.evaluation import device_of
from cacp.graph import trace
from cacp.models import build_model
from cacp.models.weights import load_weights
from cacp.own import is_own
from cacp.parsing import check_shape, shortened
from cacp.schema import ChannelGroups, Cost, Normalisation, Policy, UserError, listed
from cacp.slicing import slice_model

FORMAT = 1
LONGEST_SIDE, LARGEST_IMAGE = 2**14, 2**25  # pixels; numbers of an image, 128 MiB
MOST_CLASSES = 50_000  # twice ImageNet-21k's
ARCHITECTURE, WEIGHTS = "architecture.json", "model.safetensors"


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a pruned model again, and to use it.

    `keep_counts` names every group that was prunable; the others are whole. Images of shape `input_shape` (C, H, W), in
    [0, 1], are normalised by `normalisation` first; output k stands for `classes[k]`.
    """

    model: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    normalisation: Normalisation
    scope: str
    keep_counts: Mapping[str, int]
    cost: Cost
    dense_cost: Cost

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "classes": list(self.classes),
            "input_shape": list(self.input_shape),
            "normalisation": {key: list(value) for key, value in self.normalisation._asdict().items()},
            "scope": self.scope,
            "keep_counts": dict(self.keep_counts),
            "cost": self.cost.to_json(),
            "dense_cost": self.dense_cost.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, source: str) -> Architecture:
        """Read what `to_json` wrote.

        Raises:
            UserError: naming the file and what is wrong with it.
        """
        try:
            check_shape(data, _ARCHITECTURE_FILE)
            _check_sizes(data)
            normalisation = data["normalisation"]
            return cls(
                model=data["model"],
                classes=tuple(data["classes"]),
                input_shape=tuple(data["input_shape"]),
                normalisation=Normalisation(*(tuple(map(float, normalisation[key])) for key in ("mean", "std"))),
                scope=data["scope"],
                keep_counts=dict(data["keep_counts"]),
                cost=Cost.from_json(data["cost"]),
                dense_cost=Cost.from_json(data["dense_cost"]),
            )
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{source} does not describe a pruned model: {error}; write it again with export.py"
            ) from error


_ARCHITECTURE_FILE = {
    "format": int,
    "model": str,
    "classes": [str],
    "input_shape": [int],
    "normalisation": {"mean": [float], "std": [float]},
    "scope": str,
    "keep_counts": {str: int},
    "cost": {},
    "dense_cost": {},
}


def _check_sizes(data: dict[str, Any]) -> None:
    """Refuse what no such model has, before memory is asked for it."""
    if data["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, but got {shortened(data['format'])}")
    shape, (mean, std) = data["input_shape"], (data["normalisation"][key] for key in ("mean", "std"))
    if len(shape) != 3 or not all(1 <= size <= LONGEST_SIDE for size in shape) or math.prod(shape) > LARGEST_IMAGE:
        raise ValueError(
            f"input_shape must be channels, height and width, each from 1 to {LONGEST_SIDE}, and {LARGEST_IMAGE} "
            f"numbers at most in all, but got {shortened(shape)}"
        )
    if not len(mean) == len(std) == shape[0] or not all(one > 0 for one in std):
        raise ValueError(f"normalisation must have a mean and a std above 0 for each of {shape[0]} channels")
    if len(data["classes"]) > MOST_CLASSES:
        raise ValueError(f"classes must be at most {MOST_CLASSES}, but got {len(data['classes'])}")


def save_pruned(folder: str | Path, model: nn.Module, architecture: Architecture) -> None:
    """Write a sliced model; architecture.json last, so that a folder with it is complete."""
    save_tensors(Path(folder) / WEIGHTS, model.state_dict())
    save_json(Path(folder) / ARCHITECTURE, architecture.to_json())


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a saved model, by name.

    Raises:
        UserError: if one is missing.
    """
    return {name: sha256(folder / name) for name in (ARCHITECTURE, WEIGHTS)}


def finished(folder: Path, record: str) -> dict[str, Any]:
    """What a file of a folder (report.json, result.json) says of the model beside it, which it names by its `sha256`;
    empty where either is missing, damaged or another one, so that the command which made them makes them again. One of
    an older version, which names none, is taken as it is.
    """
    try:
        found: dict[str, Any] = load_json(folder / record, {})
        there = checksums(folder)
    except UserError:
        return {}
    return found if found.get("sha256", there) == there else {}


def load_architecture(folder: str | Path) -> Architecture:
    """The architecture.json of an exported or fine-tuned model."""
    path = Path(folder) / ARCHITECTURE
    return Architecture.from_json(load_json(path), str(path))


def load_pruned(folder: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The pruned model of an exported or fine-tuned folder, in eval mode on the CPU.

    Args:
        folder: that holds architecture.json and model.safetensors.
        build: makes the unpruned network; needed only for a network of one's own.

    Raises:
        UserError: for missing or damaged files, an unknown model, a network of one's own without `build`, or weights
            that do not fit.
    """
    architecture = load_architecture(folder)
    if build is None and is_own(architecture.model):
        raise UserError(
            f"{folder} holds a network of one's own, {architecture.model:.80}, and nothing that a file names is "
            "imported; give load_pruned(folder, build=function), where function() returns the unpruned network"
        )
    dense = build() if build else build_model(architecture.model, len(architecture.classes), seed=0)
    groups = _groups(dense, architecture, may_run=build is not None)
    model = slice_model(dense, groups, _any_policy(groups, architecture.keep_counts, folder))
    load_weights(model, Path(folder) / WEIGHTS)
    return model.eval()


def _groups(dense: nn.Module, architecture: Architecture, may_run: bool) -> ChannelGroups:
    """The groups of the unpruned network, traced without computing: a file may ask for images of any size. A network
    of one's own that makes tensors on the CPU on its way cannot be, and `may_run`.
    """
    shape, scope = (1, *architecture.input_shape), architecture.scope
    try:
        return trace(copy.deepcopy(dense).to("meta"), torch.zeros(shape, device="meta"), scope)
    except UserError:
        if not may_run:
            raise
        return trace(dense, torch.zeros(shape, device=device_of(dense)), scope)


def _any_policy(groups: ChannelGroups, keep_counts: Mapping[str, int], folder: str | Path) -> Policy:
    """A policy of these counts, other groups whole; which channels it names does not matter, since weights follow.

    Raises:
        UserError: listing every count outside its group.
    """
    channels = {group.name: group.channels for group in groups.prunable}
    wrong = [
        f"{name!s:.80}: {shortened(count)} (of {channels.get(name, 'no such group')})"
        for name, count in keep_counts.items()
        if not 1 <= count <= channels.get(name, 0)
    ]
    if wrong:
        raise UserError(f"{folder}: these keep counts do not fit the model: {listed(wrong, ', ')}; export it again")
    return Policy({name: tuple(range(count)) for name, count in {**channels, **keep_counts}.items()}, "loaded")
