"""What runs in place of a pattern: one module, in training statistics or folded, and its arithmetic.

Letters: B images, C channels, H height, W width, N = B * H * W.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cacp.batchnorm import mean_and_variance
from cacp.fusion.patterns import Pattern

_DIAGONAL_CHANNELS = 32  # up to here a 1x1 convolution by a diagonal matrix is faster than scale, addition and ReLU


class Moments(NamedTuple):
    """Mean and unbiased variance of a batch norm's input over one batch: (C,) float32 each."""

    mean: Tensor
    variance: Tensor


class Recorder(threading.local):
    """Where the units of a pass as in training leave their moments, by position; None in evaluation."""

    moments: dict[int, Moments] | None = None


class Unit(nn.Module):
    """A pattern as one module. The model's own modules stay outside: the unit holds references to two of them."""

    def __init__(self, name: str, position: int, pattern: Pattern, recorder: Recorder) -> None:
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
        onednn = _onednn() if x.device.type == "cpu" else None
        if onednn is not None and residual is None:
            unary = "relu" if relu else "none"
            return onednn.default(x, weight, bias, padding, stride, dilation, groups, unary, [], None)
        if onednn is not None and residual is not None and groups == 1 and residual.dtype == x.dtype:
            x = x.contiguous(memory_format=torch.channels_last)  # else oneDNN may leave the addition to PyTorch
            last = "relu" if relu else None
            return onednn.binary(
                x, residual, weight, bias, padding, stride, dilation, groups, "add", 1.0, last, [], None
            )
        return _finished(F.conv2d(x, weight, bias, stride, padding, dilation, groups), residual, relu)


# arithmetic -----------------------------------------------------------------------------------------------------------


@cache
def _onednn() -> Any:
    """oneDNN's convolution with operations behind it, as torch.compile uses it; None where PyTorch has no oneDNN."""
    return torch.ops.mkldnn._convolution_pointwise if torch.backends.mkldnn.is_available() else None


def _finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """y plus residual, then ReLU; y is overwritten."""
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def _scale_and_shift(norm: _BatchNorm, mean: Tensor | None, variance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch norm as scale * y + shift: (C,) each."""
    assert mean is not None and variance is not None
    scale = (variance + norm.eps).rsqrt_()
    if norm.weight is None:
        return scale, -mean * scale
    scale *= norm.weight
    return scale, torch.addcmul(norm.bias, mean, scale, value=-1)


def _affine(
    y: Tensor, norm: _BatchNorm, mean: Tensor | None, variance: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    """Batch norm of y (B, C, ...) with these statistics, plus residual, then ReLU."""
    channels = y.shape[1]
    if y.device.type == "cpu" and y.dim() == 4 and channels <= _DIAGONAL_CHANNELS and _onednn() is not None:
        scale, shift = _scale_and_shift(norm, mean, variance)
        diagonal = _identity(channels, y.dtype) * scale.to(y.dtype)
        return _Convolution(diagonal.view(channels, channels, 1, 1), shift.to(y.dtype))(y, residual, relu)
    normalised = F.batch_norm(y, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return _finished(normalised, residual, relu)


def _normalised(y: Tensor, norm: _BatchNorm, residual: Tensor | None, relu: bool) -> tuple[Moments, Tensor]:
    """Batch norm of y (B, C, ...) with its own statistics, plus residual, then ReLU; and the statistics."""
    count = y.numel() // y.shape[1]  # N
    unbiased = count / max(count - 1, 1)
    if y.device.type == "cpu":
        mean, variance = mean_and_variance(y)
        result = _affine(y, norm, mean, variance, residual, relu)
    else:
        result, mean, inverse = torch.native_batch_norm(y, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        variance = (inverse.square().reciprocal() - norm.eps).clamp_(min=0)  # inverse: of sqrt(variance + eps)
        result = _finished(result, residual, relu)
    return Moments(mean, variance * unbiased), result


@cache
def _identity(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(channels, dtype=dtype)
