"""ChannelPruning-v0: both checkers, targets, exact budgets, and the warm-up distribution."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Net, resnet20
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env as check_stable_baselines3
from torch import nn

import envs
from agents.noise import NoiseSchedule, truncated_normal
from cacp.budget import BudgetWalk, KeepInterval, uniform_counts
from cacp.cost import CostModel
from cacp.graph import trace
from cacp.models import build_model
from cacp.schema import Budget, ChannelGroups, Cost, Score, UserError
from envs import ChannelPruningEnv, EpisodeResult, TargetRange
from envs.observation import features, observe, static_features

TARGETS = (0.3, 0.5, 0.7)


@pytest.fixture(scope="module")
def groups() -> ChannelGroups:
    return trace(resnet20(), torch.zeros(1, 3, 32, 32))


def score(counts: tuple[int, ...]) -> Score:
    return Score(sum(counts) / 1000, 1.0, 0.5, Cost(1, 1))


def make(groups: ChannelGroups, **more: object) -> ChannelPruningEnv:
    return ChannelPruningEnv(groups, score, lambda score, target: score.top1 + target, **more)


def play(env: ChannelPruningEnv, actions: np.ndarray, **reset: object) -> tuple[np.ndarray, EpisodeResult]:
    """(steps + 1, O) observations and the result of an episode."""
    observations = [env.reset(**reset)[0]]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(np.array([action], np.float32))
        observations.append(observation)
        assert not truncated
        assert terminated == (len(observations) == len(actions) + 1)
        assert terminated or (reward == 0 and info == {})
    assert reward == info["result"].reward
    return np.stack(observations), info["result"]


@pytest.mark.parametrize("targets", [TARGETS, TargetRange(0.3, 0.7), Budget({"macs": 0.5, "params": 0.6})], ids=str)
def test_both_checkers_pass_without_a_warning(groups: ChannelGroups, targets: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(
            "ChannelPruning-v0", groups=groups, score_fn=score, reward_fn=lambda score, target: 0.5, targets=targets
        )
        check_gymnasium(env.unwrapped)
        check_stable_baselines3(env.unwrapped)


def test_gymnasium_makes_it_by_name_and_plays_an_episode(groups: ChannelGroups) -> None:
    env = gymnasium.make("ChannelPruning-v0", groups=groups, score_fn=score, reward_fn=lambda score, target: score.top1)
    assert isinstance(env.unwrapped, envs.ChannelPruningEnv)
    observation, info = env.reset(seed=0)
    assert observation.shape == (features(1),) and observation[0] == np.float32(0.3)
    for _ in range(9):
        _, reward, terminated, _, info = env.step(np.zeros(1, np.float32))
    assert terminated
    assert reward == sum(info["result"].counts) / 1000


def test_the_last_step_carries_score_reward_and_budget(groups: ChannelGroups) -> None:
    _, result = play(make(groups), np.zeros(9), options={"target": 0.42})
    assert result.budget == Budget({"macs": 0.42})
    assert result.score == score(result.counts)
    assert result.reward == pytest.approx(result.score.top1 + 0.42, abs=1e-7)


@pytest.mark.parametrize("target", TARGETS)
def test_all_zeros_are_the_uniform_policy(groups: ChannelGroups, target: float) -> None:
    _, result = play(make(groups), np.zeros(9), options={"target": target})
    assert result.counts == uniform_counts(CostModel(groups), Budget({"macs": target}))


@pytest.mark.parametrize("target", TARGETS)
def test_every_episode_meets_its_target_and_uses_it_up(groups: ChannelGroups, target: float) -> None:
    env, cost_model, generator = make(groups, targets=[target]), CostModel(groups), np.random.default_rng(0)
    for _ in range(50):
        _, result = play(env, generator.uniform(-1, 1, 9))
        assert target - 0.005 <= cost_model.cost(result.counts).macs / cost_model.dense.macs <= target


def test_targets_go_round_robin_and_a_request_does_not_count(groups: ChannelGroups) -> None:
    env = make(groups)
    seen = [env.reset()[0][0] for _ in range(2)]
    assert env.reset(options={"target": 0.9})[0][0] == np.float32(0.9)
    seen += [env.reset()[0][0] for _ in range(3)]
    np.testing.assert_allclose(seen, [0.3, 0.5, 0.7, 0.3, 0.5], rtol=1e-6)
    assert env.episodes_started == 5
    env.episodes_started = 7
    assert env.reset()[0][0] == np.float32(0.5)


def test_a_seed_fixes_the_place_in_the_round_robin_too(groups: ChannelGroups) -> None:
    env = make(groups)
    whole = [env.reset(seed=4 if index == 0 else None)[0][0] for index in range(6)]
    np.testing.assert_allclose(whole, [0.5, 0.7, 0.3, 0.5, 0.7, 0.3], rtol=1e-6)
    resumed = [env.reset(seed=4 + 2 if index == 0 else None)[0][0] for index in range(4)]
    assert resumed == whole[2:]


def test_a_budget_of_several_costs_can_be_asked_for(groups: ChannelGroups) -> None:
    cost_model, env = CostModel(groups), make(groups, targets=Budget({"macs": 0.5, "params": 0.7}))
    for asked in ({"macs": 0.5, "params": 0.7}, {"params": 0.4, "macs": 0.6}):
        observations, result = play(env, np.ones(9), options={"target": asked})
        cost = cost_model.cost(result.counts)
        assert cost.macs <= asked["macs"] * cost_model.dense.macs
        assert cost.params <= asked["params"] * cost_model.dense.params
        assert observations[0, 0] == np.float32(sum(asked.values()) / 2)  # the mean


def test_episodes_of_a_budget_of_several_costs_tell_what_is_left_of_each(groups: ChannelGroups) -> None:
    cost_model, budget = CostModel(groups), Budget({"macs": 0.5, "params": 0.6})
    env = make(groups, targets=budget)
    observations, result = play(env, np.linspace(-1, 1, 9))
    assert result.budget == budget and observations.shape == (10, 22)
    least = cost_model.cost(cost_model.min_keep)
    for column, (cost, target) in enumerate(budget.targets.items()):
        own = observations[:, 16 + 3 * column : 19 + 3 * column]
        assert (own[:, 0] == np.float32(target)).all()
        assert own[0].tolist() == pytest.approx([target, 1.0, getattr(least, cost) / getattr(cost_model.dense, cost)])
        final = getattr(cost_model.cost(result.counts), cost) / getattr(cost_model.dense, cost)
        assert own[-1].tolist() == pytest.approx([target, final, final])
        assert final <= target
        assert (np.diff(own[:, 1]) <= 0).all() and (np.diff(own[:, 2]) >= 0).all()


def test_a_budget_of_params_alone_is_seen_where_macs_would_be(groups: ChannelGroups) -> None:
    observations, result = play(make(groups, targets=Budget({"params": 0.4})), np.zeros(9))
    cost_model = CostModel(groups)
    kept = cost_model.cost(result.counts).params / cost_model.dense.params
    assert observations.shape == (10, 16)
    assert observations[-1, 10] == pytest.approx(kept) and 0.395 <= kept <= 0.4


def test_budgets_of_other_costs_than_the_environments_are_refused(groups: ChannelGroups) -> None:
    with pytest.raises(UserError, match=r"of macs, but got \{'macs': 0\.6, 'params': 0\.4\}"):
        make(groups).reset(options={"target": {"macs": 0.6, "params": 0.4}})
    several = make(groups, targets=Budget({"macs": 0.5, "params": 0.6}))
    with pytest.raises(UserError, match=r"of macs and params, but got \{'macs': 0\.5\}"):
        several.reset(options={"target": {"macs": 0.5}})
    with pytest.raises(UserError, match=r"mean target is 0\.55, but got the target 0\.5"):
        several.reset(options={"target": 0.5})


def test_a_range_is_covered_evenly_and_resumes(groups: ChannelGroups) -> None:
    env = make(groups, targets=TargetRange(0.4, 0.6))
    first = [env.reset(seed=0 if index == 0 else None)[0][0] for index in range(200)]
    assert [env.reset(seed=0 if index == 0 else None)[0][0] for index in range(200)] == first
    gaps = np.diff([0.4, *sorted(first), 0.6])
    assert gaps.min() >= 0 and gaps.max() < 0.2 / 200 * 2.7
    env.episodes_started = 150
    assert [env.reset()[0][0] for _ in range(50)] == first[150:]


def test_one_seed_gives_one_trajectory(groups: ChannelGroups) -> None:
    first, second = (make(groups, targets=TargetRange(0.3, 0.7)) for _ in range(2))
    actions = np.random.default_rng(0).uniform(-1, 1, 9)
    (seen, result), (seen_again, result_again) = (play(env, actions, seed=5) for env in (first, second))
    np.testing.assert_array_equal(seen, seen_again)
    assert result == result_again
    assert play(first, actions, seed=6)[1] != result


def test_a_step_after_the_end_or_before_the_start_is_refused(groups: ChannelGroups) -> None:
    env = make(groups)
    with pytest.raises(UserError, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros(1))
    play(env, np.zeros(9))
    with pytest.raises(UserError, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros(1))


@pytest.mark.parametrize("action", [np.nan, 1.01, -1.5, np.inf])
def test_an_action_outside_its_space_is_refused_and_changes_nothing(groups: ChannelGroups, action: float) -> None:
    env = make(groups, targets=[0.5])
    env.reset()
    with pytest.raises(UserError, match=rf"must lie in \[-1, 1\], but got {action}"):
        env.step(np.array([action]))
    for _ in range(9):
        _, _, terminated, _, info = env.step(np.zeros(1))
    assert terminated
    assert info["result"].counts == uniform_counts(CostModel(groups), Budget({"macs": 0.5}))


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ([], "at least one macs target"),
        ([0.5, 0.01], "no policy meets macs 0.01"),
        ([1.5], "but got macs=1.5"),
        (TargetRange(0.01, 0.5), "no policy meets macs 0.01"),
    ],
)
def test_impossible_targets_are_refused_before_any_episode(groups: ChannelGroups, targets: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make(groups, targets=targets)


@pytest.mark.parametrize("target", [0.01, float("nan"), {"flops": 0.5}])
def test_an_impossible_request_is_refused(groups: ChannelGroups, target: object) -> None:
    with pytest.raises(UserError):
        make(groups).reset(options={"target": target})


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_observations_lie_in_their_space_and_say_what_they_should(scope: str) -> None:
    groups = trace(resnet20(), torch.zeros(1, 3, 32, 32), scope)
    env, cost_model, generator = make(groups), CostModel(groups), np.random.default_rng(1)
    number = len(groups.prunable)
    for _ in range(12):
        seen, result = play(env, generator.uniform(-1, 1, number))
        assert all(env.observation_space.contains(row) for row in seen)
        fraction = cost_model.cost(result.counts).macs / cost_model.dense.macs
        ratios = np.array(result.counts) / cost_model.channels
        np.testing.assert_allclose(seen[:, 1], np.arange(number + 1) / number, atol=1e-6)
        np.testing.assert_allclose(seen[:, 15], [1, *ratios], atol=1e-6)
        assert seen[0, 10] == 1 and seen[-1, 10] == pytest.approx(fraction) == seen[-1, 11]
        assert (np.diff(seen[:, 10]) <= 0).all() and (np.diff(seen[:, 11]) >= -1e-7).all()
        assert (seen[:, 13] <= seen[:, 12] + 1e-7).all() and (seen[:, 12] <= seen[:, 14] + 1e-7).all()
        assert (ratios >= seen[:-1, 13] - 1e-6).all() and (ratios <= seen[:-1, 14] + 1e-6).all()


def test_an_episode_can_be_told_again_by_a_pure_function(groups: ChannelGroups) -> None:
    actions = np.random.default_rng(2).uniform(-1, 1, 9)
    seen, result = play(make(groups), actions, options={"target": 0.6})
    static, cost_model = static_features(groups), CostModel(groups)

    def retold(budget: Budget) -> np.ndarray:
        walk, rows = BudgetWalk(cost_model, budget), []
        for count in result.counts:
            rows.append(observe(static, walk, walk.interval()))
            walk.choose(count)
        return np.stack([*rows, observe(static, walk, None)])

    np.testing.assert_array_equal(retold(result.budget), seen)
    other = retold(Budget({"macs": cost_model.cost(result.counts).macs / cost_model.dense.macs}))
    assert (other[:, 0] != seen[:, 0]).all()
    np.testing.assert_array_equal(other[:, [1, *range(2, 12), 15]], seen[:, [1, *range(2, 12), 15]])


def test_static_features_by_hand() -> None:
    model = Net(
        lambda m, x: m.out(torch.flatten(m.b(m.a(x)), 1)),
        a=nn.Conv2d(3, 10, 3, padding=1, bias=False), b=nn.Conv2d(10, 6, 1, stride=2), out=nn.Linear(6 * 16, 5),
    )  # fmt: skip
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    macs_a, macs_b, macs_out = 64 * 9 * 3 * 10, 16 * 10 * 6, 96 * 5
    raw = np.array([[10, 3, 8, 3, 1, 270, macs_a, macs_b], [6, 10, 4, 1, 2, 60, macs_b, macs_out]])
    np.testing.assert_array_equal(static_features(groups), (raw == raw.max(0)).astype(float))
    three = Net(lambda m, x: m.out(torch.flatten(m.c(m.b(m.a(x))), 1)), a=model.a, b=model.b,
                c=nn.Conv2d(6, 8, 1), out=nn.Linear(8 * 16, 5))  # fmt: skip
    features = static_features(trace(three, torch.zeros(1, 3, 8, 8)))
    reads = np.array([macs_b, 16 * 6 * 8, 128 * 5])
    np.testing.assert_allclose(features[:, 7], (reads - reads.min()) / np.ptp(reads))
    np.testing.assert_allclose(features[:, 0], [1, 0, 0.5])


def test_the_last_observation_closes_the_interval() -> None:
    groups = trace(resnet20(), torch.zeros(1, 3, 32, 32))
    cost_model, budget = CostModel(groups), Budget({"macs": 0.5})
    walk = BudgetWalk(cost_model, budget)
    first = observe(static_features(groups), walk, KeepInterval(4, 8.0, 16))
    np.testing.assert_allclose(first[12:16], [0.5, 0.25, 1, 1])
    for count in uniform_counts(cost_model, budget):
        walk.choose(count)
    last = observe(static_features(groups), walk, None)
    np.testing.assert_allclose(last[12:16], count / 64, rtol=1e-6)


class Stratified:
    """Stands in for a generator: uniform numbers of 100 episodes, one in every hundredth for each of 27 groups.

    The mean over a Latin hypercube is close to the expectation; that over 100 independent episodes is not (+- 0.01).
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        strata = generator.permuted(np.tile(np.arange(100.0), (27, 1)), axis=1).T  # (100, 27)
        self.uniform = (strata + generator.random((100, 27))) / 100

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        assert shape == self.uniform.shape
        return self.uniform


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_warm_up_prunes_the_stages_of_resnet56_alike(target: float) -> None:
    groups = trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32))
    env, cost_model = make(groups, targets=[target]), CostModel(groups)
    actions = truncated_normal(np.zeros((100, 27)), NoiseSchedule().sigma, -1, 1, Stratified(0))
    counts = np.array([play(env, row)[1].counts for row in actions])  # (100, 27)
    ratios = counts / cost_model.channels
    stages = ratios.reshape(100, 3, 9).mean((0, 2))
    assert np.ptp(stages) < 0.2
    assert ratios.std(0).min() > 0.02  # every group is explored
