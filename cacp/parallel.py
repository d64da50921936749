"""Training on several processes that `torchrun` has started: the first runs the command, the others only train.

The first one sends out each stretch of training, model and optimiser included; all take their share of every
mini-batch, with gradients averaged by DistributedDataParallel and batch norm over the whole batch, so that a run's
result is that of one process, to rounding; only dropout draws other masks. Files, scores and messages are the first
one's alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cacp.batchnorm import update_running_statistics, wide_batch_norms
from cacp.schema import UserError

_training = False  # within `as_one`, where the others are too
_PATIENCE = timedelta(days=7)  # the others wait while the first one scores and writes


def processes() -> int:
    """How many there are; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def following_processes() -> Iterator[bool]:
    """Connects the processes that torchrun has started. True in the first; the others do in here what they are sent,
    until the first one leaves, and then get False.

    Raises:
        UserError: for more processes than GPUs, or where one of the others was killed.
    """
    if launched() == 1:
        yield True
        return
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > count:  # seen by all, of which the first one tells
            raise UserError(f"torchrun has started more processes than there are GPUs; use --nproc_per_node {count}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cudnn.allow_tf32 = False  # as in the first one, whose command does so
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        if process() == 0:
            try:
                yield True
            finally:
                if not _training:  # else the others wait for something else, and end with this process
                    _send(None)
        else:
            held: Any = None
            while (work := _received()) is not None:
                function, payload, data = work
                held = held if data is None else data
                function(payload, held)
            yield False
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        raise UserError(
            "a process that trained with this one was killed, perhaps for want of memory; what is done is kept, and "
            "the same command goes on"
        ) from error
    finally:
        dist.destroy_process_group()


_held: Any = None  # what all processes have


def send_to_others(function: Callable[[Any, Any], None], payload: Any, data: Any) -> None:
    """Let the other processes call a module's function of the payload and the data; tensors arrive on their own device
    of the same kind. Data travels only where it is another object than before.
    """
    global _held
    if processes() > 1:
        _send((function, payload, None if data is _held else data))
        _held = data


def _send(work: Any) -> None:
    buffer = io.BytesIO()
    torch.save(work, buffer)
    dist.broadcast_object_list([buffer.getvalue()], 0, device=torch.device("cpu"))


def _received() -> Any:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return torch.load(io.BytesIO(box[0]), map_location=_own_device, weights_only=False)  # from our own first process


def _own_device(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage


def own_share(batch: Tensor) -> Tensor:
    """This process's part (B / processes, ...) of a batch (B, ...)."""
    if processes() == 1:
        return batch
    return batch.tensor_split(processes())[process()]


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes; a new tensor where there are several."""
    if processes() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


@contextmanager
def as_one(model: nn.Module) -> Iterator[nn.Module]:
    """A model to train with: its gradients are means over the processes, its batch norms see the whole batch.

    A UserError in here must be one that all processes raise alike.
    """
    global _training
    if processes() == 1:
        with wide_batch_norms(model):
            yield model
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_norm_of_all, norm)  # type: ignore[method-assign]
    try:
        device = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        _training = True
        yield DistributedDataParallel(model, device_ids=device)
        _training = False
    except UserError:  # the others have left as well, and wait to be told that this is the end
        _training = False
        raise
    finally:
        for norm in norms:
            del norm.forward


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, with its gradient."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return summed(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)


def _norm_of_all(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """Batch norm of this process's part (B, C, ...) with the mean and variance of all parts; SyncBatchNorm works on
    GPUs only.
    """
    if not norm.training:
        return F.batch_norm(inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    others = [0, *range(2, inputs.dim())]
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    count = summed(torch.tensor(float(inputs.numel() // inputs.shape[1]), device=inputs.device))
    mean = _Sum.apply(values.sum(others)) / count  # (C,)
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(others)) / count
    update_running_statistics(norm, mean.detach(), variance.detach(), count)
    scaled = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(inputs.dtype)
