"""Episodes played in mind against the environment's own, and keep ratios scaled onto a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacp.budget import (
    BudgetWalk,
    KeepInterval,
    in_window,
    keep_action,
    keep_count,
    reachable_fractions,
    scaled_ratios,
    uniform_counts,
)
from cacp.cost import CostModel
from cacp.graph import trace
from cacp.models import build_model
from cacp.schema import Budget, ChannelGroups, Cost, Score
from envs import ChannelPruningEnv
from envs.rehearsal import Rehearsal

TARGETS = (0.3, 0.45, 0.7)


@pytest.fixture(scope="module", params=["inner", "all"])
def groups(request: pytest.FixtureRequest) -> ChannelGroups:
    return trace(build_model("resnet20", 10, seed=0), torch.zeros(1, 3, 32, 32), request.param)


@pytest.fixture(scope="module")
def cost_model(groups: ChannelGroups) -> CostModel:
    return CostModel(groups)


@pytest.fixture(scope="module")
def rehearsal(groups: ChannelGroups) -> Rehearsal:
    return Rehearsal(groups)


def played(groups: ChannelGroups, target: float, actions: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """(G + 1, 16) observations and the counts of an episode of the environment."""
    env = ChannelPruningEnv(groups, lambda counts: Score(0.5, 1.0, 0.5, Cost(1, 1)), lambda score, target: 0.0)
    observations = [env.reset(options={"target": target})[0]]
    for action in actions:
        observation, _, terminated, _, info = env.step(np.array([action], np.float32))
        observations.append(observation)
    assert terminated
    return np.stack(observations), info["result"].counts


def following(actions: np.ndarray) -> Callable[[np.ndarray], float]:
    remaining = iter(actions.tolist())
    return lambda observation: next(remaining)


def counts_of(ratios: np.ndarray, cost_model: CostModel) -> tuple[int, ...]:
    counts = ratios * cost_model.channels
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    return tuple(np.round(counts).astype(int).tolist())


def fractions(ratios: np.ndarray, cost_model: CostModel) -> np.ndarray:
    """(..., 2) macs and params of real-valued keep ratios, as parts of the dense ones."""
    return cost_model.costs(ratios * cost_model.channels) / np.array(cost_model.dense[:2])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", TARGETS)
def test_a_roll_out_is_the_episode_that_the_environment_plays(
    groups: ChannelGroups, rehearsal: Rehearsal, cost_model: CostModel, target: float, seed: int
) -> None:
    drawn = np.random.default_rng(seed).uniform(-1, 1, rehearsal.steps)
    rehearsed = rehearsal.roll_out(target, following(drawn))
    observations, counts = played(groups, target, drawn)
    assert rehearsed.observations.dtype == observations.dtype == np.float32
    np.testing.assert_array_equal(rehearsed.observations, observations)
    np.testing.assert_array_equal(rehearsed.actions, drawn.astype(np.float32))
    assert counts_of(rehearsed.ratios, cost_model) == counts


@pytest.mark.parametrize("target", TARGETS)
def test_the_policy_sees_every_observation_once_and_in_order(rehearsal: Rehearsal, target: float) -> None:
    seen: list[np.ndarray] = []

    def act(observation: np.ndarray) -> float:
        seen.append(observation)
        return float(np.sin(50 * observation[14] + len(seen)))  # an answer to what it sees

    rehearsed = rehearsal.roll_out(target, act)
    assert rehearsed.observations.shape == (rehearsal.steps + 1, 16)
    np.testing.assert_array_equal(rehearsed.observations[:-1], seen)
    again = rehearsal.roll_out(target, following(rehearsed.actions))
    np.testing.assert_array_equal(again.observations, rehearsed.observations)


@pytest.mark.parametrize("target", TARGETS)
def test_zeros_are_the_uniform_policy(rehearsal: Rehearsal, cost_model: CostModel, target: float) -> None:
    rehearsed = rehearsal.roll_out(target, lambda observation: 0.0)
    assert counts_of(rehearsed.ratios, cost_model) == uniform_counts(cost_model, Budget({"macs": target}))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", TARGETS)
def test_an_imitated_episode_has_the_same_counts_and_actions_that_lead_there(
    groups: ChannelGroups, rehearsal: Rehearsal, cost_model: CostModel, target: float, seed: int
) -> None:
    drawn = np.random.default_rng(10 + seed).uniform(-1, 1, rehearsal.steps)
    _, counts = played(groups, target, drawn)
    imitated = rehearsal.imitate(target, np.array(counts) / cost_model.channels)
    assert counts_of(imitated.ratios, cost_model) == counts
    assert (np.abs(imitated.actions) <= 1).all()
    assert not np.allclose(imitated.actions, drawn, atol=1e-4)  # others, within the grain of the counts
    observations, counts_again = played(groups, target, imitated.actions)
    assert counts_again == counts
    np.testing.assert_array_equal(imitated.observations, observations)


@pytest.mark.parametrize("target", TARGETS)
def test_ratios_that_miss_the_budget_are_imitated_step_by_step_within_it(
    groups: ChannelGroups, rehearsal: Rehearsal, cost_model: CostModel, target: float
) -> None:
    generator, budget, steps = np.random.default_rng(20), Budget({"macs": target}), rehearsal.steps
    wishes = [*generator.uniform(0, 1, (10, steps)), np.zeros(steps), np.ones(steps), np.full(steps, target)]
    missed = 0
    for wish in wishes:
        imitated = rehearsal.imitate(target, wish)
        counts = counts_of(imitated.ratios, cost_model)
        assert in_window(cost_model.cost(counts), cost_model.dense, budget)
        assert played(groups, target, imitated.actions)[1] == counts
        wanted = np.round(wish * cost_model.channels).astype(int)
        missed += not in_window(cost_model.cost(np.maximum(wanted, cost_model.min_keep)), cost_model.dense, budget)
        walk = BudgetWalk(cost_model, budget)
        for want, count in zip(wanted, counts, strict=True):
            interval = walk.interval()
            assert count == min(max(want, interval.low), interval.high)  # the nearest
            walk.choose(count)
    assert missed >= 10


@pytest.mark.parametrize("target", TARGETS)
def test_scaled_ratios_are_imitated_to_the_grain_in_all_but_a_few_steps(
    rehearsal: Rehearsal, cost_model: CostModel, target: float
) -> None:
    ratios = rehearsal.scaled(target, np.random.default_rng(30).uniform(0.2, 1, (30, rehearsal.steps)))
    imitated = np.stack([rehearsal.imitate(target, row).ratios for row in ratios])
    off = np.abs(imitated - ratios) * cost_model.channels  # (30, G)
    assert (off <= 0.5 + 1e-9).mean() > 0.9  # the last group pays for what rounding left
    assert np.abs(imitated - ratios).mean() < 0.03


@pytest.mark.parametrize("target", TARGETS)
def test_scaled_ratios_cost_the_target_and_keep_their_proportions(
    rehearsal: Rehearsal, cost_model: CostModel, target: float
) -> None:
    ratios = np.exp(np.random.default_rng(40).uniform(np.log(0.005), 0, (50, rehearsal.steps)))
    scaled = rehearsal.scaled(target, ratios)
    least = cost_model.min_keep / cost_model.channels
    macs = fractions(scaled, cost_model)[:, 0]
    assert (macs <= target + 1e-9).all() and (macs >= target - 1e-4).all()
    assert (scaled >= least).all() and (scaled <= 1).all()

    free = (scaled > least) & (scaled < 1)
    factors = np.where(free, scaled / ratios, np.nan)  # (50, G)
    factor = np.nanmedian(factors, axis=1, keepdims=True)
    np.testing.assert_allclose(factors[free], np.broadcast_to(factor, free.shape)[free], rtol=1e-9)
    clipped = ~free
    assert clipped.sum() > 50 and (clipped & (scaled < 1)).any() and (clipped & (scaled == 1)).any()
    np.testing.assert_array_equal(scaled[clipped], np.clip(ratios * factor, least, 1)[clipped])


def test_scaling_forgets_the_size_of_the_ratios_and_is_done_once(rehearsal: Rehearsal) -> None:
    ratios = np.random.default_rng(50).uniform(0.4, 0.6, (20, rehearsal.steps))
    scaled = rehearsal.scaled(0.45, ratios)
    np.testing.assert_allclose(rehearsal.scaled(0.45, 0.3 * ratios), scaled, rtol=1e-5)
    np.testing.assert_allclose(rehearsal.scaled(0.45, scaled), scaled, rtol=1e-5)
    np.testing.assert_array_equal(rehearsal.scaled(0.45, ratios[7:8])[0], scaled[7])  # rows do not touch each other


@pytest.mark.parametrize("budget", [{"macs": 0.3}, {"macs": 0.7}, {"macs": 0.5, "params": 0.45}], ids=str)
def test_uniform_ratios_are_scaled_to_the_even_share(cost_model: CostModel, budget: dict[str, float]) -> None:
    even = BudgetWalk(cost_model, Budget(budget)).even_ratio()
    uniform = np.repeat([[0.05], [0.5], [1.0]], len(cost_model.names), axis=1)
    np.testing.assert_allclose(scaled_ratios(cost_model, Budget(budget), uniform), even, rtol=1e-5)


def test_the_ends_of_what_is_reachable_are_reached(cost_model: CostModel) -> None:
    ratios = np.random.default_rng(60).uniform(0.1, 1, (5, len(cost_model.names)))
    least = Budget({"macs": reachable_fractions(cost_model)["macs"]})
    at_least = scaled_ratios(cost_model, least, ratios)
    np.testing.assert_allclose(at_least, np.tile(cost_model.min_keep / cost_model.channels, (5, 1)), rtol=1e-12)
    np.testing.assert_allclose(scaled_ratios(cost_model, Budget({"macs": 1.0}), ratios), 1, rtol=1e-6)


def test_two_costs_are_met_together_and_one_is_used_up(cost_model: CostModel) -> None:
    budget = Budget({"params": 0.45, "macs": 0.5})
    ratios = np.random.default_rng(70).uniform(0.05, 1, (60, len(cost_model.names)))
    macs, params = fractions(scaled_ratios(cost_model, budget, ratios), cost_model).T
    assert (macs <= 0.5 + 1e-9).all() and (params <= 0.45 + 1e-9).all()
    tight = np.stack([macs >= 0.5 - 1e-4, params >= 0.45 - 1e-4])  # (2, 60)
    assert tight.any(axis=0).all()
    assert tight.sum(axis=1).min() >= 10  # each of them binds sometimes


@given(ends=st.tuples(st.integers(1, 2048), st.integers(0, 60)), share=st.floats(0, 1))
def test_the_action_for_a_count_gives_that_count(ends: tuple[int, int], share: float) -> None:
    low, high = ends[0], sum(ends)
    interval = KeepInterval(low, low + share * (high - low), high)
    for count in range(low, high + 1):
        action = keep_action(interval, count)
        assert -1 <= action <= 1
        assert keep_count(interval, action) == count
        assert keep_count(interval, float(np.float32(action))) == count  # as it is stored and executed


@pytest.mark.parametrize("even", [4.0, 4.5, 8.0, 11.499999, 11.5, 16.0])
def test_counts_outside_the_interval_are_answered_with_its_nearest_end(even: float) -> None:
    interval = KeepInterval(4, even, 16)
    assert [keep_count(interval, keep_action(interval, count)) for count in (-7, 0, 3, 17, 999)] == [4, 4, 4, 16, 16]
    closed = KeepInterval(5, 5.0, 5)
    assert [keep_action(closed, count) for count in (1, 5, 9)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("count", "action"), [(4, -1.0), (5, -0.75), (7, -0.25), (8, 0.0), (10, 0.25), (14, 0.75), (16, 1.0)]
)
def test_keep_action_by_hand(count: int, action: float) -> None:
    assert keep_action(KeepInterval(4, 8.0, 16), count) == action
