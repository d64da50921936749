"""A sliced model on disk: `architecture.json` + `model.safetensors`, loaded by `load_pruned(folder)`.

Nothing named in a file is imported and nothing is unpickled: the architecture is built from a known model name (or by
a function of the caller's), sliced to the keep counts, and filled from safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp.checkpoint import load_json, save_json, save_tensors
from cacp.graph import trace
from cacp.models import build_model
from cacp.models.weights import load_weights
from cacp.own import is_own
from cacp.schema import ChannelGroups, Cost, Normalisation, Policy, UserError
from cacp.slicing import slice_model

FORMAT = 1
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
            "cost": self.cost._asdict(),
            "dense_cost": self.dense_cost._asdict(),
        }

    @classmethod
    def from_json(cls, data: Any, source: str) -> Architecture:
        """Read what `to_json` wrote.

        Raises:
            UserError: naming the file and what is wrong with it.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, but got {data['format']!r}")
            channels, height, width = (int(size) for size in data["input_shape"])
            normalisation = data["normalisation"]
            return cls(
                model=str(data["model"]),
                classes=tuple(str(name) for name in data["classes"]),
                input_shape=(channels, height, width),
                normalisation=Normalisation(
                    tuple(float(value) for value in normalisation["mean"]),
                    tuple(float(value) for value in normalisation["std"]),
                ),
                scope=str(data["scope"]),
                keep_counts={str(name): _whole(count) for name, count in data["keep_counts"].items()},
                cost=Cost(int(data["cost"]["macs"]), int(data["cost"]["params"])),
                dense_cost=Cost(int(data["dense_cost"]["macs"]), int(data["dense_cost"]["params"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{source} does not describe a pruned model: {type(error).__name__}: {error}; "
                "write it again with export.py"
            ) from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a keep count must be a whole number, but got {value!r}")
    return value


def save_pruned(folder: str | Path, model: nn.Module, architecture: Architecture) -> None:
    """Write a sliced model; architecture.json last, so that a folder with it is complete."""
    save_tensors(Path(folder) / WEIGHTS, model.state_dict())
    save_json(Path(folder) / ARCHITECTURE, architecture.to_json())


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
            f"{folder} holds a network of one's own, {architecture.model}, and nothing that a file names is imported; "
            "give load_pruned(folder, build=function), where function() returns the unpruned network"
        )
    dense = build() if build else build_model(architecture.model, len(architecture.classes), seed=0)
    groups = trace(dense, torch.zeros(1, *architecture.input_shape), architecture.scope)
    model = slice_model(dense, groups, _any_policy(groups, architecture.keep_counts, folder))
    load_weights(model, Path(folder) / WEIGHTS)
    return model.eval()


def _any_policy(groups: ChannelGroups, keep_counts: Mapping[str, int], folder: str | Path) -> Policy:
    """A policy of these counts, other groups whole; which channels it names does not matter, since weights follow.

    Raises:
        UserError: listing every count outside its group.
    """
    channels = {group.name: group.channels for group in groups.prunable}
    wrong = [
        f"{name}: {count} (of {channels.get(name, 'no such group')})"
        for name, count in keep_counts.items()
        if not 1 <= count <= channels.get(name, 0)
    ]
    if wrong:
        raise UserError(f"{folder}: these keep counts do not fit the model: {', '.join(wrong)}; export it again")
    return Policy({name: tuple(range(count)) for name, count in {**channels, **keep_counts}.items()}, "loaded")
