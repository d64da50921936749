"""A network at full speed: every batch norm in one operation with the convolution, addition and ReLU around it.

The layers of a pruned CNN are thin, so passes over memory cost as much as the arithmetic. A `FusedNetwork` computes
what its model does, in the precision asked for, with fewer of them:

- evaluation: batch norm is folded into the convolution (Jacob et al., CVPR 2018, section 3.2); on a CPU, oneDNN adds
  the residual and applies ReLU before the result leaves the cache.
- recalibration: on a CPU, the statistics of a batch come from sums over wide rows. PyTorch's batch norm in training
  mode lets the threads share cache lines: below 16 channels, two threads take twice the time of one.

Letters: B images, C channels, H height, W width, N = B * H * W.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cacp.evaluation import recalibrate_batchnorm
from cacp.graph import traced

_DIAGONAL_CHANNELS = 32  # up to here a 1x1 convolution by a diagonal matrix is faster than scale, addition and ReLU
_ROW_ENTRIES = 512  # of the wide rows that are summed
_PARTS = 16  # partial sums
LARGEST_SQUARED_MEAN = 16.0  # in variances: up to here the variance is the mean square minus the squared mean
CHECK_TOLERANCE = 1e-3  # of the largest logit, fused against plain PyTorch, fp32


class Moments(NamedTuple):
    """Mean and unbiased variance of a batch norm's input over one batch: (C,) float32 each."""

    mean: Tensor
    variance: Tensor


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
        self._recorder = _Recorder()
        self._network = traced(model, example)
        self._units: list[_Unit] = []
        graph = self._network.graph
        for node in list(graph.nodes):
            if _is_call_of(node, self._network, _BatchNorm) and _module(node, self._network).track_running_stats:
                self._replace(_Pattern.around(node, self._network))
        graph.eliminate_dead_code()
        self._network.delete_all_unused_submodules()
        self._network.recompile()
        fused = {unit.name for unit in self._units}
        names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        # Modules and tensors outside of the units; a tensor that forward makes is the traced copy's own.
        self._others = [name for name in names if name not in fused and _has(model, name)]
        self._check(model, example)
        self._precision = precision
        self._trial(model, _noise(example))

    def _replace(self, pattern: _Pattern) -> None:
        name = f"fused_{len(self._units)}"
        while hasattr(self._network, name):
            name += "_"
        unit = _Unit(name, len(self._units), pattern, self._recorder)
        self._units.append(unit)
        self._network.add_module(name, unit)
        with self._network.graph.inserting_after(pattern.last):
            fused = self._network.graph.call_module(name, pattern.inputs)
        fused.meta = pattern.last.meta
        pattern.last.replace_all_uses_with(fused)

    def _check(self, model: nn.Module, example: Tensor) -> None:
        """Compare with plain PyTorch, in fp32: fusing changes the order in which writes in place are seen."""
        reference, images = copy.deepcopy(model).eval(), _noise(example)
        recalibrate_batchnorm(reference, images.clone(), len(images))
        with torch.inference_mode():
            expected = reference(images.clone())
        difference = (self._trial(model, images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if not difference <= CHECK_TOLERANCE:
            raise Unfusable(
                f"{type(model).__name__} gives other outputs with batch norm fused, by {float(difference):.2g} of the "
                "largest; something in its forward writes in place what is read elsewhere"
            )

    def _trial(self, model: nn.Module, images: Tensor) -> Tensor:
        trial = copy.deepcopy(model).eval()
        try:
            self.load(trial)
            self.set_statistics([self.moments(images.clone())])
            return self(images.clone())
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
            with self._autocast(images.device):
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
        with self._autocast(images.device):
            return self._network(images)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32)


class _Recorder(threading.local):
    """Where the units of a pass as in training leave their moments, by position; None in evaluation."""

    moments: dict[int, Moments] | None = None


# patterns -------------------------------------------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """[convolution ->] batch norm [-> addition] [-> ReLU], each the only reader of the one before."""

    source: fx.Node
    convolution: str | None
    norm: str
    residual: fx.Node | None
    relu: bool
    last: fx.Node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @classmethod
    def around(cls, norm: fx.Node, network: fx.GraphModule) -> _Pattern:
        source, convolution = _input(norm), None
        last, residual, relu = norm, None, False
        addition = _only_reader(last)
        if addition is not None and (other := _same_shape_addend(addition, last)) is not None:
            last, residual = addition, other
        reader = _only_reader(last)
        if reader is not None and _is_relu(reader, network):
            last, relu = reader, True
        if _is_plain_convolution(source, network) and len(source.users) == 1:
            source, convolution = _input(source), str(source.target)
        return cls(source, convolution, str(norm.target), residual, relu, last)


def _module(node: fx.Node, network: fx.GraphModule) -> Any:
    return network.get_submodule(str(node.target))


def _is_call_of(node: fx.Node, network: fx.GraphModule, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(_module(node, network), kind)


def _is_plain_convolution(node: fx.Node, network: fx.GraphModule) -> bool:
    if not _is_call_of(node, network, nn.Conv2d):
        return False
    convolution = _module(node, network)
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    return _is_call_of(node, network, nn.ReLU) or (node.op == "call_function" and node.target in (F.relu, torch.relu))


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same_shape_addend(addition: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand where `addition` adds an equally shaped tensor to `node`."""
    if addition.op != "call_function" or addition.target not in (operator.add, torch.add):
        return None
    others = [operand for operand in addition.args if operand is not node]
    if len(others) != 1 or addition.kwargs or not isinstance(others[0], fx.Node):
        return None
    shapes = [getattr(operand.meta.get("tensor_meta"), "shape", None) for operand in (node, others[0])]
    return others[0] if shapes[0] == shapes[1] else None


def _input(node: fx.Node) -> fx.Node:
    """The tensor that a one-input module is called with."""
    (source,) = node.all_input_nodes
    return source


def _has(model: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def _noise(example: Tensor) -> Tensor:
    """Four images of the example's shape, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *example.shape[1:], generator=generator).to(example.device)


# units ----------------------------------------------------------------------------------------------------------------


class _Unit(nn.Module):
    """A pattern as one module. The model's own modules stay outside: the unit holds references to two of them."""

    def __init__(self, name: str, position: int, pattern: _Pattern, recorder: _Recorder) -> None:
        super().__init__()
        self.name = name
        self.position = position
        self._pattern = pattern
        self._recorder = recorder
        self._precision = torch.float32
        self._modules_of_model: tuple[nn.Conv2d | None, _BatchNorm]
        self._raw: _Convolution | None = None
        self._folded: _Convolution | None = None

    @property
    def norm(self) -> _BatchNorm:
        return self._modules_of_model[1]

    def load(self, model: nn.Module, precision: torch.dtype) -> None:
        self._precision, name = precision, self._pattern.convolution
        convolution = None if name is None else model.get_submodule(name)
        norm = model.get_submodule(self._pattern.norm)
        assert isinstance(convolution, nn.Conv2d | None)
        assert isinstance(norm, _BatchNorm)
        self._modules_of_model = convolution, norm
        if convolution is not None:
            self._raw = _Convolution.of(convolution, convolution.weight, convolution.bias, self._precision)

    def fold(self) -> None:
        """Take the norm's running statistics into the convolution's weights."""
        convolution, norm = self._modules_of_model
        if convolution is None:
            return
        scale, shift = _scale_and_shift(norm, norm.running_mean, norm.running_var)
        if convolution.bias is not None:
            shift = shift + convolution.bias * scale
        weight = convolution.weight * scale[:, None, None, None]
        self._folded = _Convolution.of(convolution, weight, shift, self._precision)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        relu, norm = self._pattern.relu, self.norm
        if self._recorder.moments is not None:
            y = x if self._raw is None else self._raw(x.to(self._precision))
            self._recorder.moments[self.position], result = _normalised(y, norm, residual, relu)
            return result
        if self._folded is not None:
            return self._folded(x.to(self._precision), residual, relu)
        return _affine(x, norm, norm.running_mean, norm.running_var, residual, relu)


class _Convolution(NamedTuple):
    """A convolution's tensors as they are run, and its geometry."""

    weight: Tensor  # (C, inputs / groups, kernel, kernel), channels last, in the precision
    bias: Tensor | None  # (C,)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Conv2d, weight: Tensor, bias: Tensor | None, precision: torch.dtype) -> _Convolution:
        assert not isinstance(module.padding, str)
        weight = weight.detach().to(precision, memory_format=torch.channels_last)
        bias = None if bias is None else bias.detach().to(precision)
        return cls(weight, bias, module.stride, module.padding, module.dilation, module.groups)

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """ReLU of (convolution of x (B, inputs, H, W) plus residual): (B, C, H', W'), what is asked for of it."""
        weight, bias, stride, padding, dilation, groups = self
        if _has_onednn(x) and residual is None:
            unary = "relu" if relu else "none"
            return _onednn(x, weight, bias, padding, stride, dilation, groups, unary, [], None)
        if residual is not None and _has_onednn(x) and groups == 1 and residual.dtype == x.dtype:
            x = x.contiguous(memory_format=torch.channels_last)  # else oneDNN may leave the addition to PyTorch
            unary_or_none = "relu" if relu else None
            return _onednn(
                x, residual, weight, bias, padding, stride, dilation, groups, "add", 1.0, unary_or_none, [], None
            )
        return _finished(F.conv2d(x, weight, bias, stride, padding, dilation, groups), residual, relu)


# arithmetic -----------------------------------------------------------------------------------------------------------

_onednn = torch.ops.mkldnn._convolution_pointwise  # torch.compile's own fused convolution; oneDNN's post-operations


def _has_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """y plus residual, then ReLU; y is overwritten."""
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def _scale_and_shift(norm: _BatchNorm, mean: Tensor | None, variance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch norm as scale * y + shift: (C,) each."""
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _affine(
    y: Tensor, norm: _BatchNorm, mean: Tensor | None, variance: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    """Batch norm of y (B, C, ...) with these statistics, plus residual, then ReLU."""
    channels = y.shape[1]
    if _has_onednn(y) and y.dim() == 4 and channels <= _DIAGONAL_CHANNELS:
        scale, shift = (tensor.to(y.dtype) for tensor in _scale_and_shift(norm, mean, variance))
        return _Convolution(torch.diag(scale)[:, :, None, None], shift)(y, residual, relu)
    normalised = F.batch_norm(y, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return _finished(normalised, residual, relu)


def _normalised(y: Tensor, norm: _BatchNorm, residual: Tensor | None, relu: bool) -> tuple[Moments, Tensor]:
    """Batch norm of y (B, C, ...) with its own statistics, plus residual, then ReLU; and the statistics."""
    count = y.numel() // y.shape[1]  # N
    unbiased = count / max(count - 1, 1)
    if y.device.type == "cpu":
        mean, variance = _mean_and_variance(y)
        result = _affine(y, norm, mean, variance, residual, relu)
    else:
        result, mean, deviation = torch.native_batch_norm(y, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        variance = deviation.square().reciprocal() - norm.eps
        result = _finished(result, residual, relu)
    return Moments(mean, variance * unbiased), result


def _mean_and_variance(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of y (B, C, ...) over all but the channels: (C,) float32 each."""
    channels = y.shape[1]
    rows = y.movedim(1, -1).reshape(-1, channels)  # (N, C); a view where channels are last in memory
    width = _power_of_two(len(rows), _ROW_ENTRIES // channels)  # pixels side by side: sums of short rows are slow
    parts = _power_of_two(len(rows) // width, _PARTS)
    wide = rows.reshape(parts, -1, width * channels)  # (P, N / width / P, width * C)
    # Sums are made in float32 and rounded to y's precision once; the errors of many partial sums cancel.
    sums = torch.stack([wide.sum(1), wide.square().sum(1)]).float()  # (2, P, width * C)
    mean, square = sums.view(2, parts * width, channels).sum(1) / len(rows)
    variance = square - mean.square()
    if bool((mean.square() > LARGEST_SQUARED_MEAN * variance).any()):  # the difference has lost too many digits
        variance, mean = torch.var_mean(rows.float(), 0, correction=0)
    return mean, variance


def _power_of_two(number: int, limit: int) -> int:
    """The largest power of two that divides a number and is at most `limit`; at least 1."""
    power = 1
    while number % (2 * power) == 0 and 2 * power <= limit:
        power *= 2
    return power
