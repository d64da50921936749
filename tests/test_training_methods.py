"""CAIE, GFI-AP, SFP, FPGM and magnitude: figures by hand, exact resumption, the channels of residual streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Net, assert_equal_weights, bars, lively, random_policy, resnet20
from torch import Tensor, nn

from cacp.budget import in_window, meets_targets
from cacp.cost import CostModel
from cacp.data import normalise
from cacp.gfi import filter_importance
from cacp.graph import trace
from cacp.importance import channel_importance, distances
from cacp.methods import Pruned, Subject, Training
from cacp.methods.caie import CAIE, final_policy, useful_parts
from cacp.methods.fpgm import FPGM
from cacp.methods.gates import Gates
from cacp.methods.gfi_ap import GFIAP, GlobalQuantile
from cacp.methods.magnitude import magnitude
from cacp.methods.sfp import SFP
from cacp.methods.soft import zero_filters
from cacp.models import build_model
from cacp.recipe import Recipe
from cacp.schema import Budget, ChannelGroups, Normalisation, Policy, Score
from cacp.scoring import PolicyScorer
from cacp.slicing import slice_model
from cacp.training import EpochRecord

NORMALISATION = Normalisation((0.5,), (0.25,))
IMAGES = bars(90)


def residual_net() -> nn.Module:
    """A stem, two residual blocks on its 12 channels, with 16 and 10 channels inside, and a linear layer."""
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem_norm(m.stem(x)).relu()
        for block in (m.first, m.second):
            x = (x + block(x)).relu()
        return m.head(x.mean((2, 3)))

    def block(inside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(12, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside), nn.ReLU(),
            nn.Conv2d(inside, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
        )  # fmt: skip

    layers = {"stem": nn.Conv2d(1, 12, 3, padding=1, bias=False), "stem_norm": nn.BatchNorm2d(12)}
    return lively(Net(run, **layers, first=block(16), second=block(10), head=nn.Linear(12, 3)))


class Stopped(Exception):
    """What a killed process looks like from inside."""


class Track:
    """Drives a training, to its end or until it has shown `stop` records."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.records: list[EpochRecord] = []

    def __call__(self, records: Iterator[EpochRecord], epochs: int) -> list[EpochRecord]:
        for record in records:
            self.records.append(record)
            if len(self.records) == self.stop:
                raise Stopped
        return self.records


def subject(folder: Path, track: Track | None = None, scope: str = "all") -> Subject:
    model = residual_net()
    groups = trace(model, torch.zeros(1, 1, 8, 8), scope)

    def importance(criterion: str) -> dict[str, Tensor]:
        return channel_importance(model, groups, criterion, batches())

    def unused(policies: Sequence[Policy]) -> list[Score]:
        raise AssertionError("no method here measures scores")

    recipe = Recipe(epochs=1, batch_size=30, padding=0, flip=False, precision="fp32")
    training = Training(IMAGES, recipe, seed=3, folder=folder, track=track or Track())
    cost_model = CostModel(groups)
    return Subject(model, groups, cost_model, importance, "l1", unused, 0, NORMALISATION, training)


def batches(size: int = 7) -> Iterator[tuple[Tensor, Tensor]]:
    """All images, class after class."""
    for label in range(3):
        for indices in (IMAGES.labels == label).nonzero().flatten().split(size):
            yield normalise(IMAGES.batch(indices), NORMALISATION), IMAGES.labels[indices]


def policy_of(pruned: Pruned) -> Policy:
    assert pruned.policy is not None
    return pruned.policy


def kept(asked: Subject, pruned: Pruned) -> np.ndarray:
    return np.array([len(policy_of(pruned).keep[name]) for name in asked.cost_model.names])


METHODS = {
    "caie": CAIE(channels_per_step=4, batches_per_step=2, method_lr=0.01),
    "gfi_ap": GFIAP(method_epochs=2, method_lr=0.01),
    "sfp": SFP(method_epochs=4, method_lr=0.05),
    "fpgm": FPGM(method_epochs=4, method_lr=0.05, distance="l1", norm_share=0.25),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_trains_meets_its_budget_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    method, budget = METHODS[name], Budget({"macs": 0.6})
    whole = subject(tmp_path / "whole")
    dense = {key: tensor.clone() for key, tensor in whole.model.state_dict().items()}
    pruned = method(whole, budget)
    policy_of(pruned).validate(whole.groups)
    part = whole.cost_model.cost(kept(whole, pruned)).macs / whole.cost_model.dense.macs
    assert 0.55 < part <= 0.6  # a channel of so small a network is up to 5 %
    assert_equal_weights(whole.model.state_dict(), dense)  # the dense model stays as it is
    assert pruned.weights is not None
    changed = [key for key in dense if not torch.equal(dense[key], pruned.weights[key])]
    assert set(changed) >= {"stem.weight", "head.weight", "first.3.weight"}

    with pytest.raises(Stopped):
        method(subject(tmp_path / "broken", Track(stop=2)), budget)
    track = Track()
    resumed = method(subject(tmp_path / "broken", track), budget)
    assert policy_of(resumed) == policy_of(pruned)
    assert resumed.weights is not None
    assert_equal_weights(dict(resumed.weights), dict(pruned.weights))
    assert [record.epoch for record in track.records] == list(range(1, len(track.records) + 1))


@pytest.mark.parametrize("name", ["caie", "gfi_ap"])
def test_channels_of_residual_streams_fall(name: str, tmp_path: Path) -> None:
    asked = subject(tmp_path)
    pruned = METHODS[name](asked, Budget({"macs": 0.3}))
    stream = asked.groups["stem"]
    assert set(stream.producers) == {"stem", "first.3", "second.3"}
    assert len(policy_of(pruned).keep["stem"]) < stream.channels == 12


NETWORKS = {
    "one block": (residual_net, 1, 8),
    "resnet20": (resnet20, 3, 16),  # shortcuts of option A
    "resnet18": (lambda: lively(build_model("resnet18", 4, seed=0)), 3, 32),
    "mobilenet_v3_small": (lambda: lively(build_model("mobilenet_v3_small", 4, seed=0)), 3, 32),  # depthwise, gates
    "densenet121": (lambda: lively(build_model("densenet121", 4, seed=0)), 3, 32),  # concatenation
    "cifar_vgg11_bn": (lambda: lively(build_model("cifar_vgg11_bn", 4, seed=0)), 3, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_closed_gate_is_a_channel_cut_out(name: str) -> None:
    build, channels, size = NETWORKS[name]
    model = build()
    images = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    groups = trace(model, images[:1], "all")
    policy = random_policy(groups, seed=2)
    before, sliced = model(images), slice_model(model, groups, policy)(images)
    gates = Gates(model, groups)
    for group in groups.prunable:
        gates.close(group.name, set(range(group.channels)) - set(policy.keep[group.name]))
    assert gates.kept() == dict(policy.keep)
    scale = sliced.abs().max().clamp_min(1.0)
    torch.testing.assert_close(model(images) / scale, sliced / scale, atol=1e-5, rtol=0)
    assert not torch.allclose(before / scale, sliced / scale, atol=1e-3)
    gates.remove()
    assert torch.equal(model(images), before)


def test_no_gradient_reaches_a_closed_channel() -> None:
    model = residual_net()
    gates = Gates(model, groups := trace(model, torch.zeros(1, 1, 8, 8), "all"))
    gates.close("first.0", [0, 1, 2, 3])
    model(torch.randn(5, 1, 8, 8)).square().sum().backward()
    gradient = model.get_submodule("first.0").weight.grad
    assert not gradient[:4].any() and gradient[4:].any()
    assert not model.get_submodule("first.3").weight.grad[:, :4].any()
    assert groups["first.0"].channels == 16


@pytest.mark.parametrize("name", METHODS)
def test_what_is_cut_out_is_what_was_trained(name: str, tmp_path: Path) -> None:
    """A scorer of trained weights repairs nothing, and recalibrates batch norm."""
    asked = subject(tmp_path)
    pruned = METHODS[name](asked, Budget({"macs": 0.5}))
    model = residual_net()
    scorer = PolicyScorer(model, asked.groups, IMAGES, IMAGES, NORMALISATION)
    dense_score = scorer(policy_of(pruned))
    assert pruned.weights is not None
    model.load_state_dict(pruned.weights)
    trained = scorer.retrained(model)
    cut = slice_model(model, asked.groups, policy_of(pruned))
    assert_equal_weights(trained.repaired(policy_of(pruned)).state_dict(), cut.state_dict())
    score = trained(policy_of(pruned))
    assert score.cost == dense_score.cost and score.loss != dense_score.loss
    expected = trained.evaluate(trained.recalibrated(cut))
    assert score.top1 == pytest.approx(expected.top1, abs=0.012) and score.loss == pytest.approx(
        expected.loss, rel=1e-3
    )


# CAIE -----------------------------------------------------------------------------------------------------------------


def caie_case(tmp_path: Path) -> tuple[Subject, Gates, np.ndarray]:
    asked = subject(tmp_path)
    return asked, Gates(asked.model, asked.groups), asked.cost_model.channels.copy()


def test_what_a_channel_saves_is_weighed_by_what_is_still_too_much(tmp_path: Path) -> None:
    asked, _, counts = caie_case(tmp_path)
    assert asked.cost_model.names == ("stem", "first.0", "second.0")
    # 64 pixels; macs and params of one channel fewer: the stem's also leaves the inputs and outputs of both blocks
    macs = np.array([9 * 64 + 2 * 9 * 26 * 64 + 3, 2 * 9 * 12 * 64, 2 * 9 * 12 * 64])
    params = np.array([9 + 2 * 9 * 26 + 3 + 2 * 3, 2 * 9 * 12 + 2, 2 * 9 * 12 + 2])
    dense = asked.cost_model.dense
    parts = np.stack([macs / dense.macs, params / dense.params], axis=1)
    found = useful_parts(asked.cost_model, counts, Budget({"macs": 0.5, "params": 0.8}))
    assert found == pytest.approx(parts @ [0.5, 0.2] / np.hypot(0.5, 0.2), rel=1e-9)
    alone = useful_parts(asked.cost_model, counts, Budget({"macs": 0.5, "params": 1.0}))  # a met target drops out
    assert alone == pytest.approx(parts[:, 0], rel=1e-9)


def test_a_step_takes_the_least_important_for_what_they_cost(tmp_path: Path) -> None:
    asked, gates, counts = caie_case(tmp_path)
    generator = np.random.default_rng(0)
    importance = {
        name: torch.tensor(generator.random(count)) for name, count in zip(asked.cost_model.names, counts, strict=True)
    }
    budget = Budget({"macs": 0.2})
    for aware in (True, False):
        rho = useful_parts(asked.cost_model, counts, budget) if aware else np.ones(3)
        scored = sorted(
            (importance[name][channel].item() / rho[group], group, channel)
            for group, name in enumerate(asked.cost_model.names)
            for channel in range(counts[group])
        )
        taken = CAIE(constraint_aware=aware, channels_per_step=6).removals(importance, gates, asked.cost_model, budget)
        assert [(one.group, one.channels) for one in taken] == [(group, (channel,)) for _, group, channel in scored[:6]]


def test_a_step_ends_when_the_budget_is_met_and_what_fits_comes_back(tmp_path: Path) -> None:
    asked, gates, counts = caie_case(tmp_path)
    cost_model, budget = asked.cost_model, Budget({"macs": 0.8})
    importance = {name: torch.arange(float(count)) for name, count in zip(cost_model.names, counts, strict=True)}
    taken = CAIE(channels_per_step=25).removals(importance, gates, cost_model, budget)
    assert len(taken) < 25
    gone = {name: torch.zeros(count) for name, count in zip(cost_model.names, counts.tolist(), strict=True)}
    for place, removal in enumerate(taken):
        gone[cost_model.names[removal.group]][list(removal.channels)] = 1 + place
    left = np.array([int((gone[name] == 0).sum()) for name in cost_model.names])
    assert meets_targets(cost_model.cost(left), cost_model.dense, budget)
    left[taken[-1].group] += 1
    assert not meets_targets(cost_model.cost(left), cost_model.dense, budget)  # the last one was needed

    keep = final_policy(gone, asked.groups, cost_model, budget).keep
    counts = np.array([len(keep[name]) for name in cost_model.names])
    assert meets_targets(cost_model.cost(counts), cost_model.dense, budget)
    if not in_window(cost_model.cost(counts), cost_model.dense, budget):
        for group in np.flatnonzero(counts < cost_model.channels):
            more = counts.copy()
            more[group] += 1
            assert not meets_targets(cost_model.cost(more), cost_model.dense, budget)


def test_what_went_last_comes_back_first(tmp_path: Path) -> None:
    asked = caie_case(tmp_path)[0]
    cost_model = asked.cost_model
    gone = {"stem": torch.zeros(12), "first.0": torch.zeros(16), "second.0": torch.zeros(10)}
    gone["first.0"][:6] = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    kept = [12, 12, 10]  # room for two of the six
    budget = Budget({"macs": cost_model.cost(kept).macs / cost_model.dense.macs})
    assert final_policy(gone, asked.groups, cost_model, budget).keep["first.0"] == (3, 5, *range(6, 16))


def test_caie_keeps_a_tenth_of_every_group_and_meets_two_targets(tmp_path: Path) -> None:
    asked, budget = subject(tmp_path), Budget({"macs": 0.3, "params": 0.25})
    counts = kept(asked, METHODS["caie"](asked, budget))
    assert (counts >= asked.cost_model.min_keep).all()
    assert meets_targets(asked.cost_model.cost(counts), asked.cost_model.dense, budget)


# GFI-AP ---------------------------------------------------------------------------------------------------------------


def test_importance_is_the_largest_mean_response_to_a_class() -> None:
    model = residual_net()
    groups = trace(model, torch.zeros(1, 1, 8, 8), "all")
    outputs: dict[str, Tensor] = {}
    for name in ("stem", "first.0", "first.3", "second.3"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    largest: dict[str, Tensor] = {}
    for label in range(3):
        indices = (IMAGES.labels == label).nonzero().flatten()
        model(normalise(IMAGES.batch(indices), NORMALISATION))
        for name, output in outputs.items():
            response = output.mean(0).abs().mean((1, 2))
            largest[name] = torch.maximum(largest.get(name, response), response)
    found = filter_importance(model, groups, batches())
    torch.testing.assert_close(found["first.0"], largest["first.0"])
    stream = torch.stack([largest[name] for name in ("stem", "first.3", "second.3")]).mean(0)
    torch.testing.assert_close(found["stem"], stream)


def quantile_case() -> tuple[GlobalQuantile, ChannelGroups, CostModel]:
    groups = trace(residual_net(), torch.zeros(1, 1, 8, 8), "all")
    importance = {
        "stem": torch.arange(12.0) + 100,  # 100 .. 111: the highest
        "first.0": torch.arange(16.0) * 10,  # 0 .. 150
        "second.0": torch.arange(10.0),  # 0 .. 9: the lowest
    }
    return GlobalQuantile(importance, cost_model := CostModel(groups)), groups, cost_model


def test_a_quantile_of_all_filters_and_a_part_of_groups_below_it() -> None:
    ranks, _, cost_model = quantile_case()
    # 38 filters: the 16th from below is 60 (10 of second.0, and 0 .. 60 of first.0, of which 0 is met twice)
    assert ranks.threshold(16 / 38) == 60
    assert ranks.counts(16 / 38) == (12, 9, 10 - int(10 * (16 / 38 + 11 / 38)))
    assert ranks.counts(0.02) == (12, 15, 9)
    least = tuple(cost_model.min_keep.tolist())
    assert ranks.counts(0.999) == least


def test_a_linear_layer_over_the_last_axis_has_its_outputs_there() -> None:
    """As in ConvNeXt: (B, H, W, C)."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(m.second(m.first(m.stem(x).permute(0, 2, 3, 1)).relu()).mean((1, 2))),
        stem=nn.Conv2d(1, 6, 1), first=nn.Linear(6, 20), second=nn.Linear(20, 5), head=nn.Linear(5, 3),
    )  # fmt: skip
    groups = trace(model, torch.zeros(1, 1, 8, 8), "all")
    found = filter_importance(model, groups, batches())
    assert {name: len(scores) for name, scores in found.items()} == {
        group.name: group.channels for group in groups.prunable
    }
    images = normalise(IMAGES.batch(torch.arange(90)), NORMALISATION)
    outputs = model.first(model.stem(images).permute(0, 2, 3, 1))  # type: ignore[operator]
    means = torch.stack([outputs[IMAGES.labels == label].mean(0).abs().mean((0, 1)) for label in range(3)])
    torch.testing.assert_close(found["first"], means.amax(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_the_least_quantile_that_meets_a_target(target: float) -> None:
    ranks, _, cost_model = quantile_case()
    budget = Budget({"macs": target})
    quantile = ranks.least(budget)
    meeting = [meets_targets(cost_model.cost(ranks.counts(rank / 38)), cost_model.dense, budget) for rank in range(38)]
    assert quantile == meeting.index(True) / 38


def test_a_quantile_prunes_whatever_the_budget(tmp_path: Path) -> None:
    asked = subject(tmp_path)
    pruned = GFIAP(quantile=0.41)(asked, Budget({"macs": 1.0}))
    ranks = GlobalQuantile(asked.importance("gfi"), asked.cost_model)
    assert tuple(kept(asked, pruned)) == ranks.counts(0.41)
    at_minimum = int((kept(asked, pruned) == asked.cost_model.min_keep).sum())
    threshold = ranks.threshold(0.41)
    assert pruned.details == {"quantile": 0.41, "threshold": threshold, "groups_at_minimum": at_minimum}
    assert pruned.weights is None


# soft pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sfp", "fpgm"])
def test_soft_pruning_ends_with_the_dropped_filters_zero(name: str, tmp_path: Path) -> None:
    asked = subject(tmp_path, scope="inner")
    pruned = METHODS[name](asked, Budget({"macs": 0.5}))
    assert pruned.weights is not None
    for group in ("first.0", "second.0"):
        nonzero = pruned.weights[f"{group}.weight"].flatten(1).any(1).nonzero().flatten().tolist()
        assert tuple(nonzero) == policy_of(pruned).keep[group]


def test_a_zeroed_filter_may_come_back() -> None:
    model = residual_net()
    groups = trace(model, torch.zeros(1, 1, 8, 8), "inner")
    keep = {"first.0": tuple(range(8)), "second.0": tuple(range(10))}
    zero_filters(model, groups, Policy(keep, "none"))
    weight = model.get_submodule("first.0").weight
    assert not weight[8:].any() and weight[:8].flatten(1).any(1).all()
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert weight.grad[8:].any()


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_distances_between_filters(distance: str) -> None:
    filters = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [-4.0, 3.0]]).view(4, 2, 1, 1)
    expected = {
        "l2": [0.0, 5.0, 5.0, 50**0.5],
        "l1": [0.0, 7.0, 7.0, 8.0],
        "cosine": [0.0, 1.0, 0.0, 1.0],
    }
    torch.testing.assert_close(distances(filters, distance)[0], torch.tensor(expected[distance]))


def test_the_mix_drops_the_smallest_first_then_those_near_the_others(tmp_path: Path) -> None:
    asked = subject(tmp_path, scope="inner")
    conv = asked.model.get_submodule("second.0")
    with torch.no_grad():
        conv.weight.zero_()
        values = torch.tensor([9.0, 10.0, 11.0, 0.1, 0.2, 30.0, 12.0, 40.0, 8.0, 50.0])
        conv.weight[:, 0, 0, 0] = values
    group = asked.groups["second.0"]
    order = FPGM(norm_share=0.5).order(asked.model, group, count=6)  # 4 go: two by norm, two by distance
    assert set(order[8:].tolist()) == {3, 4}
    left = values[[0, 1, 2, 5, 6, 7, 8, 9]]
    sums = {int(i): (left - values[i]).abs().sum().item() for i in (0, 1, 2, 5, 6, 7, 8, 9)}
    assert set(order[6:8].tolist()) == set(sorted(sums, key=sums.__getitem__)[:2])
    pure = FPGM().order(asked.model, group, count=6).tolist()
    everything = {i: (values - values[i]).abs().sum().item() for i in range(10)}
    assert set(pure[6:]) == set(sorted(everything, key=everything.__getitem__)[:4])


# magnitude ------------------------------------------------------------------------------------------------------------


def test_magnitude_zeroes_the_smallest_weights_of_every_layer(tmp_path: Path) -> None:
    asked = subject(tmp_path)
    dense = asked.model.state_dict()
    pruned = magnitude(asked, Budget({"macs": 0.3, "params": 0.4}))
    assert pruned.policy is None and pruned.weights is not None
    assert pruned.weights.keys() == dense.keys()
    for name in ("stem.weight", "first.3.weight", "head.weight"):
        before, after = dense[name].flatten().abs(), pruned.weights[name].flatten()
        zero = after == 0
        assert int(zero.sum()) == round(0.7 * len(zero))
        assert before[zero].max() <= before[~zero].min()
        assert torch.equal(after[~zero], dense[name].flatten()[~zero])
    assert pruned.details["sparsity"] == pytest.approx(0.7, abs=0.01)
