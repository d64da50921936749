"""Judge a model: accuracy and loss, batch-norm recalibration, precision, and the device that a model is on.

Batch norm recalibration is EagleEye's (Li et al., ECCV 2020). Evaluation is in the precision of the caller's autocast
context; outside of one, of the weights.

Letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cacp.data import ImageData, normalise
from cacp.models.modes import training_flags_kept
from cacp.schema import Normalisation, UserError

PRECISIONS = ("auto", "fp32", "bf16")


class Evaluation(NamedTuple):
    """top1 in [0, 1], mean cross-entropy loss in nats, mean probability of the true class in [0, 1]."""

    top1: float
    loss: float
    probability: float


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype to autocast to: "auto" is bf16 where `device` computes in it, else fp32.

    Raises:
        UserError: for an unknown precision, or "bf16" on a device that would only emulate it.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, but got {precision!r}")
    supported = precision != "fp32" and _computes_bf16(device)
    if precision == "bf16" and not supported:
        raise UserError(f"precision must be auto or fp32 on {device}, which has no bf16 arithmetic, but got 'bf16'")
    return torch.bfloat16 if supported else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As results hold it: "bfloat16", "float32"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which operators compute in this precision; float32 leaves them as they are."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN's own query also says yes where it emulates bf16, slower than fp32; not every torch >= 2.6 has these two.
    queries = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(query() for query in queries if query is not None)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Evaluation:
    """Accuracy and loss on images in memory: inference mode, training flags as before.

    Args:
        model: classifier, (B, C, H, W) -> (B, classes).
        images: (N, C, H, W) float, normalised, on the model's device.
        labels: (N,) int64, on any device.
        batch_size: images a forward pass, at least 1.

    Raises:
        UserError: for a batch size below 1 or no images.
    """
    check_batching("images", len(images), batch_size)
    return _evaluate_batches(model, zip(images.split(batch_size), labels.split(batch_size), strict=True))


def evaluate_data(
    model: nn.Module,
    data: ImageData,
    normalisation: Normalisation,
    batch_size: int = 250,
) -> Evaluation:
    """Accuracy and loss on a data set, batch by batch on the model's device, without augmentation.

    Raises:
        UserError: for a batch size below 1 or no images.
    """
    check_batching("data", len(data), batch_size)
    device = device_of(model)
    batches = (
        (normalise(data.batch(indices), normalisation, device), data.labels[indices])
        for indices in torch.arange(len(data)).split(batch_size)
    )
    return _evaluate_batches(model, batches)


def _evaluate_batches(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    sums, count = torch.zeros(3, dtype=torch.float64, device=device_of(model)), 0
    with training_flags_kept(model), torch.inference_mode():
        model.eval()
        for images, labels in batches:
            logits = model(images)  # (B, classes)
            sums += answer_sums(logits, labels.to(logits.device))
            count += len(labels)
    return Evaluation(*(sums / count).tolist())


def answer_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) float64 of logits (B, classes): correct answers, nats, probabilities of the true class, summed."""
    nats = F.cross_entropy(logits.float(), labels, reduction="none").double()  # (B,)
    correct = logits.argmax(1) == labels
    return torch.stack([correct.double().sum(), nats.sum(), (-nats).exp().sum()])


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Replace the running statistics of every batch norm by their mean over batches of `images`, in order.

    The images are cut into ceil(N / batch_size) batches whose sizes differ by at most 1, so that no batch weighs more
    than its images. Only batch norms are in training mode meanwhile (dropout is off, nothing is random); momentum and
    training flags are restored. A model without batch norm statistics stays as it is.

    Args:
        model: changed in place: running_mean, running_var (unbiased), num_batches_tracked.
        images: (N, C, H, W) float, normalised, on the model's device.
        batch_size: the most images a batch; the statistics depend on it, as layers see batch-normalised inputs.

    Raises:
        UserError: for a batch size below 1 or no images.
    """
    check_batching("images", len(images), batch_size)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with training_flags_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        try:
            for batch in images.tensor_split(math.ceil(len(images) / batch_size)):  # (B, C, H, W)
                model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits for a device that works on its own, before the clock is read."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def check_batching(name: str, images: int, batch_size: int) -> None:
    if images < 1 or batch_size < 1:
        raise UserError(
            f"{name} must hold at least 1 image and batch_size be at least 1, but got {images=}, {batch_size=}"
        )
