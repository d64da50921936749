"""policy -> Score: slice the model, repair its weights and recalibrate batch norm on training images, evaluate on
validation images.

Recalibration before evaluation is what makes the score of an untuned policy mean something (EagleEye, ECCV 2020); the
repair is worth as much again (results/LOG.md).
`PolicyScorer.sliced` and `evaluate` say in plain PyTorch what a score is; scoring itself runs the same on a
`FusedNetwork`, a batch a thread.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from cacp.cost import CostModel
from cacp.data import ImageData, normalise
from cacp.evaluation import (
    Evaluation,
    answer_sums,
    autocast,
    check_batching,
    device_of,
    evaluate,
    recalibrate_batchnorm,
)
from cacp.fusion import FusedNetwork, Unfusable
from cacp.profiling import Profile
from cacp.repair import Repair
from cacp.schema import ChannelGroups, Cost, Normalisation, Policy, Score
from cacp.slicing import slice_model

CALIBRATION_BATCH = 128  # images whose statistics are averaged; large enough for a stable variance
EVALUATION_BATCH = 125  # images of 32 x 32 pixels, fewer of larger ones: the caches of a CPU core
GPU_EVALUATION_BATCH = 2500  # likewise: few launches, and the memory of a small GPU
SMALLEST_BATCH = 8  # images, however large

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class PolicyScorer:
    """Scores policies of one model on fixed images; equal policies are scored once.

    Args:
        model: dense model in fp32 on its device; put in eval mode, else left as it is.
        groups: of this model.
        validation: images that the score is measured on.
        calibration: training images for repair and batch-norm statistics.
        normalisation: that the weights expect.
        precision: of the convolutions while scoring; batch-norm statistics and loss stay in fp32.
        profile: gets the seconds of slicing, repair, recalibration and evaluation.
        repair: False leaves the weights as they were cut out.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        validation: ImageData,
        calibration: ImageData,
        normalisation: Normalisation,
        precision: torch.dtype = torch.float32,
        profile: Profile | None = None,
        repair: bool = True,
    ) -> None:
        check_batching("validation", len(validation), EVALUATION_BATCH)
        check_batching("calibration", len(calibration), CALIBRATION_BATCH)
        self._model = model.eval()
        self._groups = groups
        self._cost_model = CostModel(groups)
        self._precision = precision
        self._profile = profile or Profile()
        self._repairs = repair
        self._device = device_of(model)
        self._labels = validation.labels.to(self._device)  # (V,)
        self._images = _prepared(validation, normalisation, self._device, precision)  # (V, C, H, W)
        self._calibration = _prepared(calibration, normalisation, self._device, precision)
        self._calibration_batches = self._calibration.tensor_split(math.ceil(len(calibration) / CALIBRATION_BATCH))
        self._calibration_threads = Threads(self._device, len(self._calibration_batches))
        batch = evaluation_batch(self._device, validation.image_shape)
        self._evaluation_threads = Threads(self._device, math.ceil(len(validation) / batch))
        threads = self._evaluation_threads.count
        count = threads * math.ceil(len(validation) / (batch * threads))
        images, labels = self._images.tensor_split(count), self._labels.tensor_split(count)
        self._evaluation_batches = list(zip(images, labels, strict=True))
        self._network = self._fused(model)
        self._scores: dict[tuple[tuple[int, ...], ...], Score] = {}

    def retrained(self, model: nn.Module) -> PolicyScorer:
        """A scorer on the same images for other weights of the network, which a method has trained for its policy.

        Nothing is repaired: what is cut out of them is what was trained.
        """
        other = copy.copy(self)
        other._model, other._repairs, other._scores = model.eval(), False, {}
        other._network = self._fused(model)
        return other

    def _fused(self, model: nn.Module) -> FusedNetwork | None:
        try:
            return FusedNetwork(model, self._images[:1].float(), self._precision)
        except Unfusable as reason:
            warnings.warn(f"policies are scored in plain PyTorch, which is slower: {reason}", stacklevel=2)
            return None

    @property
    def fused(self) -> bool:
        """Whether policies are scored on a fused network; if not, in plain PyTorch, as a warning has said."""
        return self._network is not None

    @cached_property
    def _repair(self) -> Repair:
        return Repair(self._model, self._groups, self._calibration.float())

    def knows(self, policy: Policy) -> bool:
        """Whether its score is there already."""
        return self._key(policy) in self._scores

    def remember(self, policy: Policy, score: Score) -> None:
        """Take over the score of a policy from an earlier run of the same search."""
        self._scores[self._key(policy)] = score

    def _key(self, policy: Policy) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(policy.keep[group.name]) for group in self._groups.prunable)

    def __call__(self, policy: Policy) -> Score:
        key = self._key(policy)
        if key not in self._scores:
            self._scores[key] = self._score(policy, self._cost_model.cost([len(indices) for indices in key]))
        return self._scores[key]

    def _score(self, policy: Policy, cost: Cost) -> Score:
        network = self._network
        if network is None:
            sliced = self.sliced(policy)
            with self._profile.phase("evaluation"):
                return Score(*self.evaluate(sliced), cost)
        repaired = self.repaired(policy)
        with self._profile.phase("slicing"):
            network.load(repaired)
        with self._profile.phase("recalibration"):
            network.set_statistics(self._calibration_threads.map(network.moments, self._calibration_batches))
        with self._profile.phase("evaluation"):
            judged = self._evaluation_threads.map(partial(self._judged, network), self._evaluation_batches)
        return Score(*Evaluation(*(torch.stack(judged).sum(0) / len(self._labels)).tolist()), cost)

    @torch.inference_mode()
    def _judged(self, network: FusedNetwork, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return answer_sums(network(images), labels)

    def repaired(self, policy: Policy) -> nn.Module:
        """The pruned model, its weights repaired, batch norm with the dense model's statistics."""
        with self._profile.phase("slicing"):
            model = slice_model(self._model, self._groups, policy).to(memory_format=torch.channels_last)
        if self._repairs:
            with self._profile.phase("repair"):
                self._repair(model, policy)
        return model

    def sliced(self, policy: Policy) -> nn.Module:
        """The pruned model in eval mode, its weights repaired, batch norm recalibrated."""
        return self.recalibrated(self.repaired(policy))

    def recalibrated(self, model: nn.Module) -> nn.Module:
        """Any model in eval mode, its batch norm recalibrated in place."""
        with self._profile.phase("recalibration"), autocast(self._device, self._precision):
            recalibrate_batchnorm(model, self._calibration, CALIBRATION_BATCH)
        return model.eval()

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Any model on the validation images."""
        with autocast(self._device, self._precision):
            return evaluate(model, self._images, self._labels, EVALUATION_BATCH)


def evaluation_batch(device: torch.device, image_shape: tuple[int, int, int]) -> int:
    """Images of a batch for the fastest evaluation on a device."""
    most = GPU_EVALUATION_BATCH if device.type == "cuda" else EVALUATION_BATCH
    _, height, width = image_shape
    return min(most, max(SMALLEST_BATCH, most * 32 * 32 // (height * width)))


def _prepared(data: ImageData, normalisation: Normalisation, device: torch.device, precision: torch.dtype) -> Tensor:
    """All images of a set, normalised: (N, C, H, W), channels last in memory."""
    images = normalise(data.batch(torch.arange(len(data))), normalisation, device)
    return images.to(precision, memory_format=torch.channels_last)


class Threads:
    """Maps a function over batches, a batch a thread, with an equal share of the CPU's cores for each.

    Layers of a pruned CNN are too small to divide: with the cores in one layer after another, all wait for the last
    one after every layer, and for Python in between. On a GPU, whose work is one queue, the caller's thread does it.

    Args:
        device: that the function works on.
        batches: how many there are at least; no more threads than these.
    """

    def __init__(self, device: torch.device, batches: int) -> None:
        cores = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = min(cores, batches)
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "batch", torch.set_num_threads, (cores // self.count,))
            started = threading.Barrier(self.count + 1)
            for _ in range(self.count):
                self._pool.submit(started.wait)
            started.wait()
            torch.set_num_threads(cores)  # a thread's number is also the default of threads to come

    def map(self, function: Callable[[Batch], Result], batches: Iterable[Batch]) -> list[Result]:
        """The results, in the order of the batches."""
        return list(map(function, batches) if self._pool is None else self._pool.map(function, batches))
