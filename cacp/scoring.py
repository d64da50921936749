"""policy -> Score: slice the model, recalibrate batch norm on training images, evaluate on validation images.

Recalibration before evaluation is what makes the score of an untuned policy mean something (EagleEye, ECCV 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cacp.cost import CostModel
from cacp.data import ImageData, normalise
from cacp.evaluation import Evaluation, device_of, evaluate, recalibrate_batchnorm
from cacp.schema import ChannelGroups, Normalisation, Policy, Score
from cacp.slicing import slice_model

CALIBRATION_BATCH = 128  # images whose statistics are averaged; large enough for a stable variance
EVALUATION_BATCH = 125  # images; fits the caches of a CPU core


class PolicyScorer:
    """Scores policies of one model on fixed images; equal policies are scored once.

    Args:
        model: dense model in fp32 on its device; put in eval mode, else left as it is.
        groups: of this model.
        validation: images that the score is measured on.
        calibration: training images for batch-norm statistics.
        normalisation: that the weights expect.
        precision: of the convolutions while scoring; batch norm and loss stay in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        validation: ImageData,
        calibration: ImageData,
        normalisation: Normalisation,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._model = model.eval()
        self._groups = groups
        self._cost_model = CostModel(groups)
        self._precision = precision
        self._device = device_of(model)
        self._images = _prepared(validation, normalisation, self._device)  # (V, C, H, W)
        self._labels = validation.labels.to(self._device)  # (V,)
        self._calibration = _prepared(calibration, normalisation, self._device)
        self._scores: dict[tuple[tuple[int, ...], ...], Score] = {}

    def __call__(self, policy: Policy) -> Score:
        key = tuple(tuple(policy.keep[group.name]) for group in self._groups.prunable)
        if key not in self._scores:
            cost = self._cost_model.cost([len(indices) for indices in key])
            evaluation = self.evaluate(self.sliced(policy))
            self._scores[key] = Score(evaluation.top1, evaluation.loss, cost)
        return self._scores[key]

    def sliced(self, policy: Policy) -> nn.Module:
        """The pruned model in eval mode, batch norm recalibrated."""
        model = slice_model(self._model, self._groups, policy).to(memory_format=torch.channels_last)
        with self._autocast():
            recalibrate_batchnorm(model, self._calibration, CALIBRATION_BATCH)
        return model.eval()

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Top-1 and loss of any model on the validation images."""
        with self._autocast():
            return evaluate(model, self._images, self._labels, EVALUATION_BATCH)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32)


def _prepared(data: ImageData, normalisation: Normalisation, device: torch.device) -> Tensor:
    """All images of a set, normalised: (N, C, H, W) float32, channels last in memory."""
    images = normalise(data.batch(torch.arange(len(data))), normalisation, device)
    return images.contiguous(memory_format=torch.channels_last)
