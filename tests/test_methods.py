"""Methods without episodes: uniform within the window, Taylor's threshold against brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from conftest import keep_all, resnet20
from torch import Tensor

import prune
from cacp.budget import in_window
from cacp.cost import CostModel
from cacp.graph import trace
from cacp.importance import channel_importance
from cacp.methods import Method, Subject, Training, make_method, sensitivity, taylor, uniform
from cacp.methods.sensitivity import degradation_curves
from cacp.methods.threshold import filled_up, threshold_counts
from cacp.schema import Budget, ChannelGroups, Normalisation, Policy, Score
from cacp.scoring import PolicyScorer

UNTRAINED = ["uniform", "taylor", "sensitivity", "gfi_ap"]


def subject(scope: str = "inner", seed: int = 0, spread: float = 1.0, multiple: int = 1) -> Subject:
    """ResNet-20 with random scores, some groups far more important than others where `spread` is large."""
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32), scope, channel_multiple=multiple)
    generator = np.random.default_rng(seed)

    def importance(criterion: str) -> dict[str, Tensor]:
        if criterion in ("taylor", "gfi"):
            return {
                group.name: torch.tensor(generator.random(group.channels) * spread ** generator.normal())
                for group in groups.prunable
            }
        return channel_importance(model, groups, criterion)

    cost_model = CostModel(groups)
    scores, normalisation = additive_scores(cost_model), Normalisation((0.5,) * 3, (0.5,) * 3)
    return Subject(model, groups, cost_model, importance, "l1", scores, 300, normalisation, cast(Training, None))


def found(method: Method, asked: Subject, target: float) -> Policy:
    policy = method(asked, Budget({"macs": target})).policy
    assert policy is not None
    return policy


def additive_scores(cost_model: CostModel) -> Callable[[Sequence[Policy]], list[Score]]:
    """Probability: 1 - sum of weight * (pruned part)^2; the weights grow from group to group."""
    weights = np.linspace(0.01, 0.1, len(cost_model.names))

    def score(policy: Policy) -> Score:
        kept = np.array([len(policy.keep[name]) for name in cost_model.names])
        return Score(0.0, 0.0, 1 - weights @ (1 - kept / cost_model.channels) ** 2, cost_model.cost(kept))

    return lambda policies: [score(policy) for policy in policies]


def counts(groups: ChannelGroups, policy: Policy) -> list[int]:
    return [len(policy.keep[group.name]) for group in groups.prunable]


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_uniform_lies_in_the_window_with_one_ratio_for_all(scope: str, target: float) -> None:
    asked = subject(scope)
    policy = found(uniform, asked, target)
    policy.validate(asked.groups)
    kept = np.array(counts(asked.groups, policy))
    cost_model = asked.cost_model
    assert target - 0.005 <= cost_model.cost(kept).macs / cost_model.dense.macs <= target
    ratios = kept[1:-1] / cost_model.channels[1:-1]  # the last groups make up for rounding
    assert np.ptp(ratios) <= 1 / 16 + 1e-9
    assert policy.criterion == "l1"


def test_uniform_keeps_the_largest_filters() -> None:
    asked = subject()
    policy = found(uniform, asked, 0.5)
    for name, scores in asked.importance("l1").items():
        kept = list(policy.keep[name])
        dropped = sorted(set(range(len(scores))) - set(kept))
        assert scores[kept].min() >= scores[dropped].max()


def brute_force(importance: dict[str, Tensor], cost_model: CostModel, budget: Budget) -> list[int]:
    """Drop the least important channel of the model that may go, one at a time, until every target is met."""
    left = {name: sorted(scores.tolist()) for name, scores in importance.items()}
    least = dict(zip(cost_model.names, cost_model.min_keep, strict=True))
    while True:
        kept = [len(left[name]) for name in cost_model.names]
        cost = cost_model.cost(kept)
        fractions = {"macs": cost.macs / cost_model.dense.macs, "params": cost.params / cost_model.dense.params}
        if all(fractions[name] <= target for name, target in budget.targets.items()):
            return kept
        open_groups = [name for name in cost_model.names if len(left[name]) > least[name]]
        left[min(open_groups, key=lambda name: left[name][0])].pop(0)


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("targets", [{"macs": 0.3}, {"macs": 0.7}, {"macs": 0.6, "params": 0.4}])
@pytest.mark.parametrize("seed", range(3))
def test_taylor_threshold_equals_dropping_one_channel_at_a_time(scope: str, targets: dict, seed: int) -> None:
    asked = subject(scope, seed, spread=8.0)
    importance, budget = asked.importance("taylor"), Budget(targets)
    dropped = threshold_counts(importance, asked.cost_model, budget)
    assert list(dropped) == brute_force(importance, asked.cost_model, budget)


def test_taylor_never_falls_below_the_minimum_of_a_group() -> None:
    asked = subject(spread=1e6)
    for target in (0.15, 0.3):
        kept = threshold_counts(asked.importance("taylor"), asked.cost_model, Budget({"macs": target}))
        assert (np.array(kept) >= asked.cost_model.min_keep).all()
        assert (np.array(kept) == asked.cost_model.min_keep).any()  # the rule was needed


def test_taylor_keeps_everything_at_target_one_and_the_most_important_below() -> None:
    asked = subject()
    scores = asked.importance("taylor")
    fixed = asked._replace(importance=lambda criterion: scores)
    assert counts(asked.groups, found(taylor, fixed, 1.0)) == asked.cost_model.channels.tolist()
    policy = found(taylor, fixed, 0.5)
    policy.validate(asked.groups)
    assert policy.criterion == "taylor"
    kept = torch.cat([scores[name][list(indices)] for name, indices in policy.keep.items()])
    dropped = torch.cat(
        [scores[name][sorted(set(range(len(scores[name]))) - set(indices))] for name, indices in policy.keep.items()]
    )
    assert kept.min() > dropped.max()  # one threshold over all groups; no group is at its minimum here
    assert asked.cost_model.cost(counts(asked.groups, policy)).macs <= 0.5 * asked.cost_model.dense.macs


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_method_meets_a_budget_and_fits_the_model(name: str) -> None:
    asked, budget = subject("all"), Budget({"macs": 0.5})
    policy = found(make_method(name, {}), asked, 0.5)
    policy.validate(asked.groups)
    assert in_window(asked.cost_model.cost(counts(asked.groups, policy)), asked.cost_model.dense, budget)


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_taylor_uses_its_budget_up_whatever_the_scores(scope: str, target: float) -> None:
    budget = Budget({"macs": target})
    for seed in range(15):
        asked = subject(scope, seed, spread=3.0)
        importance = asked.importance("taylor")
        kept = threshold_counts(importance, asked.cost_model, budget)
        kept = filled_up(kept, importance, asked.cost_model, budget)
        assert in_window(asked.cost_model.cost(kept), asked.cost_model.dense, budget), seed


def test_sensitivity_balances_the_degradation_of_all_groups() -> None:
    asked = subject()
    cost_model, weights = asked.cost_model, np.linspace(0.01, 0.1, len(asked.cost_model.names))
    kept = np.array(counts(asked.groups, found(sensitivity, asked, 0.5)))
    pruned = 1 - kept / cost_model.channels
    degradation = weights * pruned**2
    inside = kept > cost_model.min_keep
    assert inside.sum() >= 7
    # the threshold t gives pruned parts sqrt(t / weight), up to a channel
    threshold = degradation[inside].mean()
    assert np.abs(pruned - np.sqrt(threshold / weights))[inside].max() < 0.1
    assert np.all(np.diff(pruned[inside]) <= 1 / 16)  # ever heavier weights, ever less pruned


def test_sensitivity_uses_up_a_budget_of_params() -> None:
    asked, budget = subject(), Budget({"params": 0.5})
    policy = sensitivity(asked, budget).policy
    assert policy is not None
    assert in_window(asked.cost_model.cost(counts(asked.groups, policy)), asked.cost_model.dense, budget)


def test_degradation_curves_are_measured_at_a_purse_of_widths_and_monotone() -> None:
    asked = subject()
    cost_model = asked.cost_model
    scored: list[tuple[int, ...]] = []

    def score(kept: tuple[int, ...]) -> float:
        scored.append(kept)
        return 0.9 - 0.3 * sum(kept != whole for kept, whole in zip(kept, cost_model.channels.tolist(), strict=True))

    curves = degradation_curves(lambda policies: [score(kept) for kept in policies], cost_model, 91)
    assert len(scored) == 91 == len(set(scored))  # dense, and 10 widths of each of 9 groups
    for curve, least in zip(curves, cost_model.min_keep, strict=True):
        assert np.isnan(curve[:least]).all() and curve[-1] == 0
        assert np.all(np.diff(curve[least:]) <= 1e-12) and curve[least] == pytest.approx(0.3)


def test_progress_is_over_policies_that_were_not_scored_before(capsys: pytest.CaptureFixture) -> None:
    asked = subject()
    (score,) = asked.scores([keep_all(asked.groups)])
    known: dict[str, Score] = {}

    class Scorer:
        def knows(self, policy: Policy) -> bool:
            return policy.criterion in known

        def __call__(self, policy: Policy) -> Score:
            return known.setdefault(policy.criterion, score._replace(top1=len(known) / 10))

    policies = [Policy({}, name) for name in "abca"]
    assert [one.top1 for one in prune.scores(cast(PolicyScorer, Scorer()), policies)] == [0.0, 0.1, 0.2, 0.0]
    assert "policies scored 4/4 top-1 0.00 %" in capsys.readouterr().out
    prune.scores(cast(PolicyScorer, Scorer()), policies)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("multiple", [2, 3, 8])
@pytest.mark.parametrize("target", [0.5, 0.7])
@pytest.mark.parametrize("method", UNTRAINED)
def test_every_method_keeps_to_multiples_and_nothing_more_fits(method: str, target: float, multiple: int) -> None:
    asked, budget = subject(spread=4.0, multiple=multiple), Budget({"macs": target})
    cost_model = asked.cost_model
    policy = found(make_method(method, {}), asked, target)
    policy.validate(asked.groups)
    kept = np.array(counts(asked.groups, policy))
    assert all(count in feasible for count, feasible in zip(kept, cost_model.feasible, strict=True))
    assert cost_model.cost(kept).macs <= target * cost_model.dense.macs
    if method != "uniform" and not in_window(cost_model.cost(kept), cost_model.dense, budget):
        for group in np.flatnonzero(kept < cost_model.channels):
            more = kept.copy()
            more[group] = cost_model.next_count(kept, group)
            assert cost_model.cost(more).macs > target * cost_model.dense.macs
