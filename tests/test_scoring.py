"""Scores of policies: against the dense model's own top-1, and against a recalibration by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import keep_all, random_policy, resnet20
from torch import Tensor, nn

from cacp import scoring
from cacp.cost import counted_cost
from cacp.data import ImageData
from cacp.graph import trace
from cacp.schema import Normalisation, Policy
from cacp.scoring import PolicyScorer
from cacp.slicing import slice_model

NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def random_images(count: int, seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(10, (count,), generator=generator), tuple("abcdefghij"))


def by_hand(data: ImageData) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION)
    return (data.batch(torch.arange(len(data))).float() / 255 - mean) / std


def recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch-norm statistics are those of one batch."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


VALIDATION, CALIBRATION = random_images(150, 0), random_images(100, 1)


@pytest.fixture
def model() -> nn.Module:
    return resnet20()


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_keep_all_scores_what_the_recalibrated_dense_model_scores(model: nn.Module, scope: str) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8), scope)
    score = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(keep_all(groups))
    with torch.no_grad():
        logits = recalibrated(model, by_hand(CALIBRATION))(by_hand(VALIDATION))
    assert score.top1 == pytest.approx((logits.argmax(1) == VALIDATION.labels).float().mean().item())
    assert score.loss == pytest.approx(F.cross_entropy(logits, VALIDATION.labels).item(), rel=1e-4)
    assert score.cost == counted_cost(model, (3, 8, 8))


def test_a_pruned_policy_scores_what_its_sliced_model_scores(model: nn.Module) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8), "all")
    policy = random_policy(groups, 0)
    score = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(policy)
    sliced = slice_model(model, groups, policy)
    with torch.no_grad():
        logits = recalibrated(sliced, by_hand(CALIBRATION))(by_hand(VALIDATION))
        stale = sliced(by_hand(VALIDATION))
    assert score.loss == pytest.approx(F.cross_entropy(logits, VALIDATION.labels).item(), rel=1e-4)
    assert score.loss != pytest.approx(F.cross_entropy(stale, VALIDATION.labels).item(), rel=1e-2)
    assert score.cost == counted_cost(sliced, (3, 8, 8))


def test_equal_policies_are_scored_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    scorer = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)
    calls = []

    def counted(*arguments: object) -> nn.Module:
        calls.append(arguments)
        return slice_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "slice_model", counted)
    policy = random_policy(groups, 0)
    first = scorer(policy)
    turned = Policy(dict(reversed(list(policy.keep.items()))), "other criterion")
    assert scorer(turned) is first
    assert len(calls) == 1
    scorer(random_policy(groups, 1))
    assert len(calls) == 2


def test_other_channels_of_the_same_counts_are_another_policy(model: nn.Module) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    scorer = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)
    first = Policy({group.name: (0, 1) for group in groups.prunable}, "l1")
    second = Policy({group.name: (2, 3) for group in groups.prunable}, "l1")
    assert scorer(first).cost == scorer(second).cost
    assert scorer(first).loss != scorer(second).loss


def test_the_dense_model_keeps_its_statistics(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(keep_all(groups))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
