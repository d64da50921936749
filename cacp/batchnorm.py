"""The statistics of batch norm, and batch norm in training, on a CPU without threads that wait for each other.

PyTorch's kernels give every thread a row of C sums to write to. If rows are no whole cache lines, the rows of two
threads share one; if they are short, the vector units are half idle. Layers of a pruned CNN are that thin. Here several
pixels side by side are taken for one with as many times the channels: a view, in memory that has channels last. Their
sums are added in the end.

Letters: B batch, C channels, H height, W width, K pixels side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_WIDTH = 256  # channels of a wide pixel, at most
_LINE = 16  # float32 values in a cache line


@contextmanager
def wide_batch_norms(model: nn.Module) -> Iterator[None]:
    """Within, batch norms of a model on a CPU whose sums are no whole cache lines train at full speed: same result, to
    rounding.
    """
    norms = [
        module
        for module in model.modules()
        if type(module) is nn.BatchNorm2d and module.affine and module.num_features % _LINE
    ]
    for norm in norms:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    """Of inputs (B, C, H, W)."""
    count = inputs.numel() // inputs.shape[1]
    last = inputs.is_contiguous(memory_format=torch.channels_last)
    if not norm.training or inputs.device.type != "cpu" or not last or count < 2:  # one value is refused there
        return nn.BatchNorm2d.forward(norm, inputs)
    outputs, mean, variance = _WideBatchNorm.apply(inputs, norm.weight, norm.bias, norm.eps)
    update_running_statistics(norm, mean, variance, count)
    return outputs


def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """As training does, from the mean and the biased variance, (C,) each, of `count` values a channel."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * count / (count - 1), share)


def mean_and_variance(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of inputs (B, C, ...) over all but the channels: (C,) each, at least float32."""
    precision = torch.promote_types(inputs.dtype, torch.float32)
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        others = [0, *range(2, inputs.dim())]
        variance, mean = torch.var_mean(inputs.to(precision), others, correction=0)
        return mean, variance
    wide = _wide(inputs)
    unused = torch.zeros(wide.shape[1], dtype=precision)  # running statistics; their precision is that of the result
    rows = torch.batch_norm_update_stats(wide, unused, unused.clone(), 0.0)
    means, variances = (row.view(-1, inputs.shape[1]) for row in rows)  # (K, C)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


class _WideBatchNorm(torch.autograd.Function):
    """Of inputs (B, C, H, W), channels last in memory: the outputs, and mean and biased variance (C,) of the inputs."""

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = mean_and_variance(inputs)
        inverse = (variance + eps).rsqrt()
        scale = inverse * weight
        context.save_for_backward(inputs, weight, mean, inverse)
        context.mark_non_differentiable(mean, variance)
        return _affine(inputs, scale, bias - mean * scale), mean, variance

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse = context.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        wide = _wide(inputs)
        width = wide.shape[1] // inputs.shape[1]
        scales, means, inverses = (one.repeat(width) for one in (weight, mean, inverse))
        wanted = [False, True, True]
        _, *rows = torch.ops.aten.native_batch_norm_backward(
            _wide(gradient), wide, scales, None, None, means, inverses, True, 0.0, wanted
        )
        by_weight, by_bias = (row.view(width, -1).sum(0) for row in rows)  # (C,)
        count = inputs.numel() // inputs.shape[1]
        scale = weight * inverse
        slope = -scale * inverse * by_weight / count
        by_inputs = _affine(gradient, scale, torch.zeros_like(scale))
        by_inputs += _affine(inputs, slope, -scale * by_bias / count - slope * mean)
        return by_inputs, by_weight, by_bias, None


def _affine(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * inputs (B, C, H, W) + shift; (C,) each."""
    outputs = torch.empty_like(inputs)  # no view, which ReLU could not overwrite
    wide = _wide(inputs)
    width = wide.shape[1] // inputs.shape[1]
    no_mean, no_scale = torch.zeros_like(scale).repeat(width), torch.ones_like(scale).repeat(width)
    result = _wide(outputs), scale.new_empty(0), scale.new_empty(0)
    scales, shifts = scale.repeat(width), shift.repeat(width)
    torch.native_batch_norm(wide, scales, shifts, no_mean, no_scale, False, 0.0, 0.0, out=result)
    return outputs


def _wide(inputs: Tensor) -> Tensor:
    """(B, K C, H W / K, 1) of inputs (B, C, H, W): a view where these have channels last in memory."""
    batch, channels, height, columns = inputs.shape
    pixels, width = height * columns, 1
    while 2 * width * channels <= _WIDTH and pixels % (2 * width) == 0 and 2 * width < pixels:
        width *= 2
    rows = inputs.permute(0, 2, 3, 1).reshape(batch, pixels // width, 1, width * channels)
    return rows.permute(0, 3, 1, 2)
