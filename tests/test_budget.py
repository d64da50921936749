"""Feasible intervals against brute force, and the window that every finished policy lies in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import Net, resnet20
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cacp.budget import (
    BudgetWalk,
    KeepInterval,
    check_reachable,
    in_window,
    keep_action,
    keep_count,
    meets_targets,
    reachable_fractions,
    uniform_counts,
)
from cacp.cost import CostModel
from cacp.graph import trace
from cacp.schema import Budget, Cost, UserError


def chain(*widths: int) -> CostModel:
    """3x3 convolutions one after the other on 4 x 4 pixels; all but the last are prunable."""
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise((3, *widths))]
    return CostModel(trace(Net(lambda m, x: m.layers(x), layers=nn.Sequential(*layers)), torch.zeros(1, 3, 4, 4)))


@pytest.fixture(scope="module")
def inner() -> CostModel:
    return CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32)))


@pytest.fixture(scope="module")
def streams() -> CostModel:
    return CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32), "all"))


def walked(cost_model: CostModel, budget: Budget, counts: Sequence[int] = ()) -> BudgetWalk:
    walk = BudgetWalk(cost_model, budget)
    for count in counts:
        walk.choose(count)
    return walk


def played(cost_model: CostModel, budget: Budget, actions: np.ndarray) -> list[int]:
    walk = BudgetWalk(cost_model, budget)
    for action in actions:
        assert not walk.finished
        walk.choose(keep_count(walk.interval(), float(action)))
    assert walk.finished
    return walk.chosen


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_every_finished_policy_lies_in_the_window(inner: CostModel, target: float) -> None:
    generator = np.random.default_rng(int(100 * target))
    for index in range(200):
        actions = generator.uniform(-1, 1, len(inner.names))
        if index < 20:
            actions = np.sign(actions)  # only the ends of the intervals
        counts = played(inner, Budget({"macs": target}), actions)
        fraction = inner.cost(counts).macs / inner.dense.macs
        assert target - 0.005 <= fraction <= target
        assert (inner.min_keep <= counts).all() and (counts <= inner.channels).all()


def test_two_targets_are_met_together_and_one_is_used_up(streams: CostModel) -> None:
    generator = np.random.default_rng(0)
    tight = set()
    for _ in range(30):
        counts = played(streams, Budget({"macs": 0.5, "params": 0.45}), generator.uniform(-1, 1, len(streams.names)))
        macs, params = (part / whole for part, whole in zip(streams.cost(counts)[:2], streams.dense[:2], strict=True))
        assert macs <= 0.5 and params <= 0.45
        used = {name for name, slack in (("macs", 0.5 - macs), ("params", 0.45 - params)) if slack <= 0.005}
        assert used
        tight |= used
    assert tight == {"macs", "params"}  # each of them binds sometimes


def test_where_the_grain_is_coarse_the_target_holds_all_the_same() -> None:
    cost_model = chain(4, 4, 4)
    budget = Budget({"macs": 0.5})
    generator = np.random.default_rng(0)
    fractions = set()
    for _ in range(100):
        counts = played(cost_model, budget, generator.uniform(-1, 1, 2))
        fractions.add(cost_model.cost(counts).macs / cost_model.dense.macs)
    assert max(fractions) <= 0.5
    assert min(fractions) < 0.495  # the window cannot be hit from everywhere


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_all_zeros_are_the_uniform_policy(inner: CostModel, target: float) -> None:
    budget = Budget({"macs": target})
    counts = uniform_counts(inner, budget)
    assert tuple(played(inner, budget, np.zeros(len(inner.names)))) == counts
    ratios = np.array(counts) / inner.channels
    assert np.ptp(ratios) < 1 / 16 + 1e-9  # one channel of the narrowest group
    assert abs(ratios.mean() - walked(inner, budget).even_ratio()) < 0.02


def test_even_ratio_by_hand() -> None:
    # 20 -> 20 channels: macs of the ratio r are 3 * 20 r + (20 r)^2 + 20 r * 10, in units of 9 * 16
    cost_model = chain(20, 20, 10)
    assert cost_model.dense.macs == 144 * (60 + 400 + 200)
    ratio = (-260 + (260**2 + 4 * 400 * 0.5 * 660) ** 0.5) / 800
    assert walked(cost_model, Budget({"macs": 0.5})).even_ratio() == pytest.approx(ratio, rel=1e-9)
    # 5 channels chosen: 15 + 100 r + 200 r = 330, more than all
    assert walked(cost_model, Budget({"macs": 0.5}), [5]).even_ratio() == 1
    assert walked(cost_model, Budget({"macs": 0.25}), [5]).even_ratio() == pytest.approx((165 - 15) / 300, rel=1e-9)
    assert walked(cost_model, Budget({"macs": 1.0})).even_ratio() == 1
    # all 20 chosen: 60 + 20 * 2 + 2 * 10 = 120 at least, more than 0.18 * 660
    assert walked(cost_model, Budget({"macs": 0.18}), [20]).even_ratio() == 0


@pytest.mark.parametrize("budget", [{"macs": 0.2}, {"macs": 0.5}, {"params": 0.6, "macs": 0.7}], ids=str)
@pytest.mark.parametrize("network", ["inner", "streams", "odd"])
def test_the_even_ratio_is_where_the_rest_breaks_the_budget(
    request: pytest.FixtureRequest, network: str, budget: dict[str, float]
) -> None:
    cost_model = chain(7, 31, 12, 5, 50, 10) if network == "odd" else request.getfixturevalue(network)
    dense, generator, between = np.array(cost_model.dense[:2]), np.random.default_rng(5), 0
    columns = [("macs", "params").index(cost) for cost in budget]
    for _ in range(20):
        counts = played(cost_model, Budget(budget), generator.uniform(-1, 1, len(cost_model.names)))
        step = int(generator.integers(len(counts)))
        ratio = walked(cost_model, Budget(budget), counts[:step]).even_ratio()

        def meets(ratio: float, counts: list[int] = counts, step: int = step) -> bool:
            rest = np.maximum(ratio * cost_model.channels, cost_model.min_keep)
            costs = cost_model.costs(np.array([*counts[:step], *rest[step:]]))
            return bool((costs / dense <= np.array([budget.get("macs", 1), budget.get("params", 1)]))[columns].all())

        assert meets(ratio - 1e-9)
        if ratio < 1:
            assert not meets(ratio + 1e-9)
            between += 1
    assert between >= 10


@pytest.mark.parametrize("network", ["inner", "streams"])
def test_a_walk_knows_the_costs_of_both_ends(request: pytest.FixtureRequest, network: str) -> None:
    cost_model: CostModel = request.getfixturevalue(network)
    counts = played(cost_model, Budget({"macs": 0.4}), np.linspace(-1, 1, len(cost_model.names)))
    for step in range(len(counts) + 1):
        least, most = walked(cost_model, Budget({"macs": 0.4}), counts[:step]).ends
        assert Cost(*least) == cost_model.cost([*counts[:step], *cost_model.min_keep[step:]])
        assert Cost(*most) == cost_model.cost([*counts[:step], *cost_model.channels[step:]])


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_intervals_end_where_one_channel_more_breaks_the_budget(streams: CostModel, target: float) -> None:
    budget, dense = Budget({"macs": target}), streams.dense.macs
    generator = np.random.default_rng(3)
    ends = {"low": 0, "high": 0}
    for _ in range(10):
        walk = BudgetWalk(streams, budget)
        for group, (least, most) in enumerate(zip(streams.min_keep, streams.channels, strict=True)):
            interval = walk.interval()
            assert least <= interval.low <= interval.even <= interval.high <= most

            def with_rest(count: int, rest: np.ndarray, prefix: list[int] = walk.chosen, group: int = group) -> float:
                return streams.cost([*prefix, count, *rest[group + 1 :]]).macs / dense

            assert with_rest(interval.high, streams.min_keep) <= target
            assert with_rest(interval.low, streams.channels) >= target - 0.005
            if interval.high < most:
                assert with_rest(interval.high + 1, streams.min_keep) > target
                ends["high"] += 1
            if interval.low > least:
                assert with_rest(interval.low - 1, streams.channels) < target - 0.005
                ends["low"] += 1
            walk.choose(int(generator.choice([interval.low, interval.high, round(interval.even)], p=(0.2, 0.6, 0.2))))
    assert min(ends.values()) >= 3  # both ends were bounds of the budget, not only of the group


def test_no_policy_of_the_window_is_out_of_reach() -> None:
    cost_model, budget = chain(7, 9, 8, 5), Budget({"macs": 0.5, "params": 0.6})
    ranges = [range(low, high + 1) for low, high in zip(cost_model.min_keep, cost_model.channels, strict=True)]
    found = 0
    for counts in itertools.product(*ranges):
        if not in_window(cost_model.cost(counts), cost_model.dense, budget):
            continue
        found += 1
        for group, count in enumerate(counts):
            interval = walked(cost_model, budget, counts[:group]).interval()
            assert interval.low <= count <= interval.high
    assert found > 5


@given(
    ends=st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted),
    share=st.floats(0, 1),
    actions=st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted),
)
def test_keep_count_is_monotone_and_piecewise_linear(ends: list[int], share: float, actions: list[float]) -> None:
    low, high = ends
    interval = KeepInterval(low, low + share * (high - low), high)
    assert keep_count(interval, -1) == low
    assert keep_count(interval, 1) == high
    counts = [keep_count(interval, action) for action in actions]
    assert low <= counts[0] <= counts[1] <= high
    for action, count in zip(actions, counts, strict=True):
        end = high if action >= 0 else low
        assert abs(count - (interval.even + abs(action) * (end - interval.even))) <= 0.5 + 1e-9


@pytest.mark.parametrize(("action", "count"), [(-1, 4), (-0.75, 5), (-0.5, 6), (0, 8), (0.25, 10), (0.5, 12), (1, 16)])
def test_keep_count_by_hand(action: float, count: int) -> None:
    assert keep_count(KeepInterval(4, 8.0, 16), action) == count


def test_an_unreachable_target_is_refused_with_the_range(inner: CostModel) -> None:
    least = inner.cost(inner.min_keep).macs / inner.dense.macs
    assert reachable_fractions(inner)["macs"] == least
    with pytest.raises(UserError, match=rf"no policy meets macs 0\.01 \(reachable: {least:.3f} to 1\);.*scope all"):
        check_reachable(inner, Budget({"macs": 0.01}))
    with pytest.raises(UserError, match=r"macs 0\.01 .*params 0\.02 "):
        check_reachable(inner, Budget({"macs": 0.01, "params": 0.02}))
    check_reachable(inner, Budget({"macs": least}))
    assert played(inner, Budget({"macs": least}), np.ones(len(inner.names))) == inner.min_keep.tolist()


def test_a_model_without_prunable_groups_is_refused() -> None:
    with pytest.raises(UserError, match="no prunable group"):
        check_reachable(chain(4), Budget({"macs": 0.5}))


def test_target_one_keeps_the_model_whole(inner: CostModel) -> None:
    assert uniform_counts(inner, Budget({"macs": 1.0})) == tuple(inner.channels)


@pytest.mark.parametrize(
    ("macs", "meets", "window"), [(500, True, True), (501, False, False), (495, True, True), (494, True, False)]
)
def test_window_is_closed_at_both_ends(macs: int, meets: bool, window: bool) -> None:
    cost, dense, budget = Cost(macs, 10), Cost(1000, 10), Budget({"macs": 0.5})
    assert meets_targets(cost, dense, budget) is meets
    assert in_window(cost, dense, budget) is window


def test_window_of_two_targets_needs_all_met_and_one_used_up() -> None:
    dense, budget = Cost(1000, 1000), Budget({"macs": 0.5, "params": 0.6})
    window = [in_window(Cost(*cost), dense, budget) for cost in ((500, 100), (100, 600), (400, 500), (500, 601))]
    assert window == [True, True, False, False]


# multiples ------------------------------------------------------------------------------------------------------------


def in_multiples(multiple: int, scope: str = "inner") -> CostModel:
    """ResNet-20, 16 to 64 channels a group."""
    return CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32), scope, channel_multiple=multiple))


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_counts_are_multiples_within_the_target(scope: str, multiple: int, target: float) -> None:
    cost_model, budget = in_multiples(multiple, scope), Budget({"macs": target})
    generator = np.random.default_rng(int(100 * target))
    fractions = []
    for _ in range(100):
        counts = np.array(played(cost_model, budget, generator.uniform(-1, 1, len(cost_model.names))))
        assert (counts % multiple == 0).all()
        assert (cost_model.min_keep <= counts).all() and (counts <= cost_model.channels).all()
        fractions.append(cost_model.cost(counts).macs / cost_model.dense.macs)
    assert max(fractions) <= target
    grain = max(
        float(cost_model.change(cost_model.channels.copy(), group, channels - multiple)[0]) / -cost_model.dense.macs
        for group, channels in enumerate(cost_model.channels)
    )
    assert min(fractions) >= target - max(grain, 0.005)  # at most one step of the widest group is lost


def test_uniform_counts_in_multiples_lie_in_the_window_where_the_grain_allows() -> None:
    cost_model = in_multiples(2)
    for target in (0.3, 0.5, 0.7):
        counts = np.array(uniform_counts(cost_model, Budget({"macs": target})))
        assert (counts % 2 == 0).all()
        assert in_window(cost_model.cost(counts), cost_model.dense, Budget({"macs": target}))


@pytest.mark.parametrize(
    ("interval", "counts"),
    [
        (KeepInterval(8, 16.0, 24, multiple=8), [8, 8, 16, 24, 24]),
        (KeepInterval(8, 14.0, 20, multiple=8), [8, 8, 16, 16, 20]),  # 20: all channels
        (KeepInterval(20, 20.0, 20, multiple=8), [20, 20, 20, 20, 20]),
        (KeepInterval(4, 9.0, 12, multiple=4), [4, 8, 8, 12, 12]),
    ],
)
def test_keep_count_in_multiples_by_hand(interval: KeepInterval, counts: list[int]) -> None:
    assert [keep_count(interval, action) for action in (-1, -0.6, 0, 0.6, 1)] == counts


@given(
    channels=st.integers(1, 60),
    multiple=st.integers(1, 12),
    share=st.floats(0, 1),
    ends=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    action=st.floats(-1, 1),
)
def test_every_keep_count_is_feasible(
    channels: int, multiple: int, share: float, ends: tuple[int, int], action: float
) -> None:
    feasible = sorted({*range(multiple, channels, multiple), channels})
    low, high = sorted(feasible[end % len(feasible)] for end in ends)
    interval = KeepInterval(low, low + share * (high - low), high, multiple)
    count = keep_count(interval, action)
    assert count in feasible and low <= count <= high
    assert keep_count(interval, keep_action(interval, count)) == count


def test_the_least_reachable_cost_is_that_of_the_least_multiples() -> None:
    coarse, fine = in_multiples(8), in_multiples(1)
    assert coarse.min_keep.tolist() == [8] * 9
    assert reachable_fractions(coarse)["macs"] > reachable_fractions(fine)["macs"]
    least = reachable_fractions(coarse)["macs"]
    assert played(coarse, Budget({"macs": least}), np.ones(9)) == [8] * 9
    with pytest.raises(UserError, match="lower min_keep"):
        check_reachable(coarse, Budget({"macs": 0.9 * least}))
