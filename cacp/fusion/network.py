"""`FusedNetwork`: models of one structure, run with their patterns fused."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cacp.evaluation import autocast, recalibrate_batchnorm
from cacp.fusion.patterns import Pattern, is_call_of, module_of
from cacp.fusion.units import Moments, Recorder, Unit
from cacp.graph import traced

NEARBY = 1e-6  # difference of two inputs, of their standard deviation: a few roundings in fp32
CHECK_TOLERANCE = 2e-2  # of the largest logit, fused against plain PyTorch; fp32 differs by 1e-6, TF32 by 1e-3


class Unfusable(Exception):
    """The message says why a network must be run in plain PyTorch."""


class FusedNetwork:
    """Runs models of one structure: load one, give it statistics, then call it. Passes may run in many threads at once.

        network.load(sliced)
        network.set_statistics([network.moments(batch) for batch in calibration_batches])
        logits = network(images)

    Args:
        model: of this structure, traceable by torch.fx.
        example: an input (1, C, H, W) on the model's device.
        precision: of the convolutions and of what passes between layers; statistics are float32.

    Raises:
        UserError: for a model that cannot be traced.
        Unfusable: where the fused network would not compute what the model does.
    """

    def __init__(self, model: nn.Module, example: Tensor, precision: torch.dtype = torch.float32) -> None:
        self._precision = torch.float32
        self._recorder = Recorder()
        self._network = traced(model, example)
        self._units: list[Unit] = []
        graph = self._network.graph
        for node in list(graph.nodes):
            if is_call_of(node, self._network, _BatchNorm) and module_of(node, self._network).track_running_stats:
                self._replace(Pattern.around(node, self._network))
        graph.eliminate_dead_code()
        self._network.delete_all_unused_submodules()
        self._network.recompile()
        fused = {unit.name for unit in self._units}
        names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        # Modules and tensors outside of the units; a tensor that forward makes is the traced copy's own.
        self._others = [name for name in names if name not in fused and _has(model, name)]
        self._check(model, example)
        self._precision = precision
        self._trial(model, _noise(example, 0))

    def _replace(self, pattern: Pattern) -> None:
        name = f"fused_{len(self._units)}"
        while hasattr(self._network, name):
            name += "_"
        unit = Unit(name, len(self._units), pattern, self._recorder)
        self._units.append(unit)
        self._network.add_module(name, unit)
        with self._network.graph.inserting_after(pattern.last):
            fused = self._network.graph.call_module(name, pattern.inputs)
        fused.meta = pattern.last.meta
        pattern.last.replace_all_uses_with(fused)

    def _check(self, model: nn.Module, example: Tensor) -> None:
        """Compare with plain PyTorch, in fp32: fusing changes the order in which writes in place are seen.

        A network that enlarges rounding errors may differ by what it makes of input that differs by rounding.
        """
        images = _noise(example, 0)
        expected = _recalibrated_outputs(model, images)
        difference = _difference(self._trial(model, images), expected)
        if difference <= CHECK_TOLERANCE:
            return
        nearby = images + NEARBY * _noise(example, 1)
        if not difference <= 10 * _difference(_recalibrated_outputs(model, nearby), expected):
            raise Unfusable(
                f"{type(model).__name__} gives other outputs with batch norm fused, by {difference:.2g} of the "
                "largest; its forward may write in place what is read elsewhere"
            )

    def _trial(self, model: nn.Module, images: Tensor) -> Tensor:
        trial = copy.deepcopy(model).eval()
        try:
            self.load(trial)
            self.set_statistics([self.moments(images.clone())])
            return self(images.clone())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            name = type(model).__name__
            raise Unfusable(f"{name} cannot be run with batch norm fused: {type(error).__name__}: {error}") from error

    def load(self, model: nn.Module) -> None:
        """Run this model from the next `set_statistics` on."""
        for name in self._others:
            owner, _, attribute = name.rpartition(".")
            value = getattr(model.get_submodule(owner), attribute)
            setattr(self._network.get_submodule(owner), attribute, value)
            if isinstance(value, nn.Module):
                value.eval()
        for unit in self._units:
            unit.load(model, self._precision)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> list[Moments]:
        """What every batch norm sees when images (B, C, H, W) pass as in training: each normalises by this batch.

        Nothing but batch norm behaves as in training, and no state changes.
        """
        self._recorder.moments = {}
        try:
            with autocast(images.device, self._precision):
                self._network(images)
            return [self._recorder.moments[unit.position] for unit in self._units]
        finally:
            self._recorder.moments = None

    @torch.no_grad()
    def set_statistics(self, batches: Sequence[list[Moments]]) -> None:
        """Give every batch norm of the loaded model the mean over batches of what `moments` returned for each."""
        rows: dict[_BatchNorm, list[Moments]] = {}
        for unit, seen in zip(self._units, zip(*batches, strict=True), strict=True):
            rows.setdefault(unit.norm, []).extend(seen)  # a module called twice has two rows a batch
        for norm, all_seen in rows.items():
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(torch.stack([moments.mean for moments in all_seen]).mean(0))
            norm.running_var.copy_(torch.stack([moments.variance for moments in all_seen]).mean(0))
        for unit in self._units:
            unit.fold()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        with autocast(images.device, self._precision):
            return self._network(images)


def _has(model: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def _difference(outputs: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected."""
    return float((outputs - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _recalibrated_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in plain PyTorch, with the batch-norm statistics of these images."""
    reference = copy.deepcopy(model).eval()
    recalibrate_batchnorm(reference, images.clone(), len(images))
    with torch.inference_mode():
        return reference(images.clone())


def _noise(example: Tensor, seed: int) -> Tensor:
    """Four images of the example's shape, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, *example.shape[1:], generator=generator).to(example.device)
