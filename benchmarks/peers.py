"""What the scorer is measured against: two other systems' ways to score a policy, and the machine's own convolutions.

- `ZeroedChannels` (A) is AMC's: the dense network runs in full, the channels that a policy drops are zero. Source:
  mit-han-lab/amc, env/channel_pruning_env.py (He et al., ECCV 2018), whose `reset` restores the weights, `prune_kernel`
  writes zeros into them and `_validate` runs a DataLoader with a batch size of 50 (`--data_bsize`) in fp32. AMC writes
  zeros into the weights that read a channel; here the filter and its batch norm are zeroed as well.
- `TorchPruned` (B) is Torch-Pruning's: a deep copy, its dependency graph, and a removed group for every group of the
  policy (Fang et al., CVPR 2023; github.com/VainF/Torch-Pruning, "low-level pruning" of its README).

Both run plain PyTorch: fp32, the default memory format, `torch.no_grad`, top-1 without the loss. In their favour: the
images lie in memory, decoded and normalised; no worker processes; nothing is read back from a GPU before the end. AMC
never recalibrates batch norm, and neither does Torch-Pruning; `recalibrate` is this project's `recalibrate_batchnorm`.

- `convolution_rates` finds the best rate that a 3x3 convolution of PyTorch reaches on this machine.
- `layer_times` runs the convolutions of one network alone.

Letters: V validation images, K calibration images, B images of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from cacp.data import ImageData, normalise
from cacp.evaluation import recalibrate_batchnorm, resolve_precision, synchroniser
from cacp.schema import Axis, ChannelGroups, Normalisation, Policy
from cacp.scoring import CALIBRATION_BATCH, EVALUATION_BATCH

AMC_BATCH = 50  # images; the default of AMC's --data_bsize
LANES = 16  # outputs that a thin convolution is padded to: fp32 numbers in an AVX-512 register


class Peer(Protocol):
    """What scores a policy in three steps."""

    def prepare(self, policy: Policy) -> nn.Module:
        """The network under the policy, in eval mode with the dense statistics; good until the next call."""

    def recalibrate(self, model: nn.Module) -> None:
        """Give its batch norms the statistics of the calibration images."""

    def evaluate(self, model: nn.Module) -> float:
        """Top-1 in [0, 1] on the validation images."""


class PlainImages:
    """The images that score a policy, for plain PyTorch.

    Args:
        validation: V images, in the CPU's memory; a batch moves to the device when it is read.
        calibration: K images, on the device.
        normalisation: that the weights expect.
        device: of the networks.

    Attributes:
        validation: (V, C, H, W) float32, normalised, on the CPU.
    """

    def __init__(
        self, validation: ImageData, calibration: ImageData, normalisation: Normalisation, device: torch.device
    ) -> None:
        self.validation = _normalised(validation, normalisation)
        self._calibration = _normalised(calibration, normalisation).to(device)  # (K, C, H, W)
        self._labels = validation.labels
        self._device = device

    def recalibrate(self, model: nn.Module) -> None:
        """Statistics are the mean over batches of at most 128 images, as in the project's own score."""
        recalibrate_batchnorm(model, self._calibration, CALIBRATION_BATCH)

    def loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """AMC's: a DataLoader over single images, with AMC's batch size."""
        return DataLoader(TensorDataset(self.validation, self._labels), AMC_BATCH)

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The same images as slices of one tensor, in batches as large as this project's."""
        return zip(self.validation.split(EVALUATION_BATCH), self._labels.split(EVALUATION_BATCH), strict=True)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        for images, labels in batches:
            logits = model(images.to(self._device))  # (B, classes)
            correct += (logits.argmax(1) == labels.to(self._device)).sum()
        return correct.item() / len(self.validation)


def _normalised(data: ImageData, normalisation: Normalisation) -> Tensor:
    return normalise(data.batch(torch.arange(len(data))), normalisation).contiguous()


class ZeroedChannels:
    """A, AMC's way: the weights of a full-size network are restored, then zeroed where the policy drops a channel.

    Args:
        model: dense network in fp32 on its device; copied.
        groups: of this model.
        images: that score a policy.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, images: PlainImages) -> None:
        self._model = plain_copy(model)
        self._groups = groups
        self._images = images
        self._saved = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._device = next(self._model.parameters()).device

    @torch.no_grad()
    def prepare(self, policy: Policy) -> nn.Module:
        self._model.load_state_dict(self._saved)
        for axis in self._groups.axes:
            dropped = dropped_entries(axis, self._groups, policy)
            module = self._model.get_submodule(axis.module)
            if dropped and isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
                _zero(module, axis.role, torch.tensor(dropped, device=self._device))
        return self._model

    def recalibrate(self, model: nn.Module) -> None:
        self._images.recalibrate(model)

    def evaluate(self, model: nn.Module) -> float:
        return self._images.evaluate(model, self._images.loader())


def dropped_entries(axis: Axis, groups: ChannelGroups, policy: Policy) -> list[int]:
    """Entries of an axis whose channel the policy drops, ascending; none of a group that stays whole."""
    dropped, offset = [], 0
    for name in axis.segments:
        channels = groups[name].channels
        kept = set(policy.keep.get(name, range(channels)))
        dropped += [offset + channel for channel in range(channels) if channel not in kept]
        offset += channels
    return [channel * axis.repeat + entry for channel in dropped for entry in range(axis.repeat)]


def _zero(module: nn.Conv2d | nn.Linear | _BatchNorm, role: str, entries: Tensor) -> None:
    """Zero the weights that make these entries of an axis, or, for the role "in", that read them."""
    if role == "in":
        module.weight.index_fill_(1, entries, 0.0)
        return
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            tensor.index_fill_(0, entries, 0.0)


class TorchPruned:
    """B, Torch-Pruning's way: a deep copy of the network, its dependency graph, and the dropped channels cut out.

    Args:
        model: dense network in fp32 on its device; copied.
        groups: of this model.
        images: that score a policy.

    Raises:
        ModuleNotFoundError: where torch_pruning is not installed.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, images: PlainImages) -> None:
        import torch_pruning

        self._library: Any = torch_pruning
        self._model = plain_copy(model)
        self._groups = groups
        self._images = images
        self._example = images.validation[:1].to(next(model.parameters()).device)  # (1, C, H, W)

    def prepare(self, policy: Policy) -> nn.Module:
        model = copy.deepcopy(self._model)
        graph = self._library.DependencyGraph().build_dependency(model, example_inputs=self._example)
        for group in self._groups.prunable:
            kept = set(policy.keep[group.name])
            dropped = [channel for channel in range(group.channels) if channel not in kept]
            if dropped:
                producer = model.get_submodule(group.producers[0])
                graph.get_pruning_group(producer, self._cut_of(producer), dropped).prune()
        return model

    def _cut_of(self, producer: nn.Module) -> Any:
        if isinstance(producer, nn.Linear):
            return self._library.prune_linear_out_channels
        return self._library.prune_conv_out_channels

    def recalibrate(self, model: nn.Module) -> None:
        self._images.recalibrate(model)

    def evaluate(self, model: nn.Module) -> float:
        return self._images.evaluate(model, self._images.batches())


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode and PyTorch's default memory format."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()


# the machine ----------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A 3x3 convolution with as many outputs as inputs: (B, C, H, W) -> (B, C, H, W), W = H."""

    dtype: torch.dtype
    channels: int
    pixels: int  # H
    batch: int

    @property
    def macs(self) -> int:
        return 9 * self.channels**2 * self.pixels**2 * self.batch


def convolution_shapes(device: torch.device) -> list[Shape]:
    """Those whose best rate counts as the machine's: fp32, and bf16 where the device computes in it."""
    dtypes = dict.fromkeys((torch.float32, resolve_precision("auto", device)))
    batches, most_macs = ((125, 500, 2000), 3e12) if device.type == "cuda" else ((8, 32, 125), 5e9)
    shapes = itertools.starmap(Shape, itertools.product(dtypes, (64, 128, 256, 512), (8, 16, 32), batches))
    return [shape for shape in shapes if shape.macs <= most_macs]


@torch.inference_mode()
def convolution_rates(device: torch.device, shapes: Sequence[Shape]) -> dict[Shape, float]:
    """Multiply-accumulates a second of every shape, channels last in memory.

    On a CPU, the better of one convolution with all threads and of one a thread.
    """
    rates = {}
    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        for shape in shapes:
            dtype, channels, pixels, batch = shape
            images = _random((batch, channels, pixels, pixels), dtype, device)
            weight = _random((channels, channels, 3, 3), dtype, device)
            work = partial(F.conv2d, images, weight, padding=1)
            counts = {1, threads}
            rates[shape] = max(count * shape.macs / best_seconds([work] * count, device) for count in counts)
    return rates


def best_of(first: Mapping[Shape, float], second: Mapping[Shape, float]) -> dict[Shape, float]:
    return {shape: max(rate, second[shape]) for shape, rate in first.items()}


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype, memory_format=torch.channels_last)


def best_seconds(work: Sequence[Callable[[], object]], device: torch.device, least: float = 0.03) -> float:
    """Best seconds of a call.

    Args:
        work: a piece of work, which does not wait for the device; several run at the same time, a thread each.
        device: that it runs on.
        least: seconds to go on for, and at least three times.
    """
    calls = 10 if device.type == "cuda" else 5 if len(work) > 1 else 1  # launches and starts of threads cost too
    synchronise = synchroniser(device)
    times: list[float] = []
    with _runner(len(work)) as run:
        run(work, 1)
        begun = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begun < least:
            synchronise()
            start = time.perf_counter()
            run(work, calls)
            synchronise()
            times.append(time.perf_counter() - start)
    return min(times) / calls


@contextmanager
def _runner(count: int) -> Iterator[Callable[[Sequence[Callable[[], object]], int], None]]:
    """What calls `count` pieces of work so often: each in a thread that has one core, a single one in this thread."""

    def run_here(work: Sequence[Callable[[], object]], calls: int) -> None:
        for piece, _ in itertools.product(work, range(calls)):
            piece()

    if count == 1:
        yield run_here
        return
    together, cores = threading.Barrier(count), torch.get_num_threads()

    def run_one(piece: Callable[[], object], calls: int) -> None:
        together.wait()
        run_here([piece], calls)

    def run_all(work: Sequence[Callable[[], object]], calls: int) -> None:
        list(pool.map(run_one, work, [calls] * count))

    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield run_all
    torch.set_num_threads(cores)  # a thread's number is also the default of threads to come


class LayerTime(NamedTuple):
    """A convolution of a pruned network: its multiply-accumulates and seconds for one image."""

    outputs: int  # C
    macs: int
    seconds: float

    @property
    def padded(self) -> int:
        """C up to full registers."""
        return math.ceil(self.outputs / LANES) * LANES


@torch.inference_mode()
def layer_times(model: nn.Module, image: Tensor, precision: torch.dtype, batch: int, threads: int) -> list[LayerTime]:
    """Every convolution of a network alone, on a batch in each of the threads.

    Args:
        model: pruned, in eval mode.
        image: (1, C, H, W), whose shape counts.
        precision: of weights and images.
        batch: B.
        threads: that run at the same time.
    """
    known: dict[object, float] = {}
    times = []
    for conv, inputs, outputs in _convolutions(model, image):
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        key = (inputs, tuple(conv.weight.shape), geometry)
        if key not in known:
            weight = conv.weight.detach().to(precision, memory_format=torch.channels_last)
            bias = torch.zeros(len(weight), dtype=precision, device=weight.device)  # batch norm is folded
            images = [_random((batch, *inputs), precision, image.device) for _ in range(threads)]  # (B, inputs, H, W)
            work = [partial(F.conv2d, some, weight, bias, *geometry) for some in images]
            known[key] = best_seconds(work, image.device, least=0.01) / (batch * threads)
        times.append(LayerTime(len(conv.weight), conv.weight[0].numel() * math.prod(outputs), known[key]))
    return times


def _convolutions(model: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, torch.Size, torch.Size]]:
    """The convolutions that an image (1, C, H, W) passes: each with the shapes of its input and output, without B."""
    passed: list[tuple[nn.Conv2d, torch.Size, torch.Size]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        passed.append((module, inputs[0].shape[1:], output.shape[1:]))

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    model(image)
    for handle in handles:
        handle.remove()
    return passed
