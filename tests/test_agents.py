"""Agents: noise against closed forms, replay by hand, an agent that must solve a toy problem, and exact resuming."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

from agents import (
    AGENTS,
    ConditionalDDPG,
    EpisodeEnd,
    EpisodeReplay,
    NoiseSchedule,
    RandomSearch,
    TargetBaseline,
    make_agent,
    truncated_normal,
)
from cacp.schema import UserError

TARGETS = (0.3, 0.5, 0.7)


class ToyEnv(gymnasium.Env):
    """One reward at the end: scale * (1 - mean((a_i - optimum_i(target))^2)) + noise, targets round robin.

    Observation: target (0 if hidden), position, previous action, a feature of the step. The optimum moves by 0.8 from
    target 0.3 to 0.7, up or down with the step, so a policy that ignores the target has a mean regret of at least
    mean((2 * (t - 0.5))^2) = 0.107. Its keep ratios are (a_i - movement_i(target)) / 2.8 + 0.5: the return depends on
    them alone, as with real budgets.
    """

    def __init__(self, steps: int = 6, scale: float = 1.0, noise: float = 0.0, hidden: bool = False) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        generator = np.random.default_rng(7)
        self.offsets = generator.uniform(-0.4, 0.4, steps)
        self.slopes = np.where(np.arange(steps) % 2, -2.0, 2.0)
        self.features = generator.uniform(0, 1, steps)
        self.noise_generator = np.random.default_rng(8)
        self.steps, self.scale, self.noise, self.hidden = steps, scale, noise, hidden
        self.episodes_started = 0
        self.rehearsal = ToyRehearsal(self)
        self.seeds: list[int | None] = []

    def regret(self, actions: np.ndarray, target: float) -> float:
        return float(np.mean((actions - self.offsets - self.slopes * (target - 0.5)) ** 2))

    def observation(self, target: float, actions: Sequence[float]) -> np.ndarray:
        step = min(len(actions), self.steps - 1)
        previous = actions[-1] if len(actions) else 0.0
        shown = 0.0 if self.hidden else target
        return np.array([shown, step / (self.steps - 1), previous, self.features[step]], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        asked = (options or {}).get("target")
        self.target = TARGETS[self.episodes_started % 3] if asked is None else asked
        self.episodes_started += asked is None
        self.actions: list[float] = []
        return self.observation(self.target, self.actions), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(float(action[0]))
        if len(self.actions) < self.steps:
            return self.observation(self.target, self.actions), 0.0, False, False, {}
        value = 1 - self.regret(np.array(self.actions), self.target)
        reward = self.scale * (value + self.noise * self.noise_generator.standard_normal())
        result = {"target": self.target, "actions": tuple(self.actions), "regret": 1 - value}
        return self.observation(self.target, self.actions), reward, True, False, {"result": result}


class ToyEpisode(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    ratios: np.ndarray


class ToyRehearsal:
    """The rules of ToyEnv; every ratio that an action reaches is allowed."""

    def __init__(self, env: ToyEnv) -> None:
        self.env, self.steps = env, env.steps

    def roll_out(self, target: float, act: Callable[[np.ndarray], float]) -> ToyEpisode:
        actions: list[float] = []
        observations = [self.env.observation(target, actions)]
        for _ in range(self.steps):
            actions.append(float(np.float32(act(observations[-1]))))
            observations.append(self.env.observation(target, actions))
        return ToyEpisode(np.stack(observations), np.array(actions), self._ratios(target, np.array(actions)))

    def imitate(self, target: float, ratios: np.ndarray) -> ToyEpisode:
        moved = (ratios - 0.5) * 2.8 + self.env.slopes * (target - 0.5)
        actions = iter(np.clip(moved, -1, 1).tolist())
        return self.roll_out(target, lambda observation: next(actions))

    def scaled(self, target: float, ratios: np.ndarray) -> np.ndarray:
        ends = [self._ratios(target, np.full(self.steps, end)) for end in (-1.0, 1.0)]
        return np.clip(ratios, *ends)

    def _ratios(self, target: float, actions: np.ndarray) -> np.ndarray:
        return (actions - self.env.slopes * (target - 0.5)) / 2.8 + 0.5


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def play(agent: ConditionalDDPG | RandomSearch, episodes: int) -> list[EpisodeEnd]:
    ends: list[EpisodeEnd] = []
    agent.run(episodes, ends.append)
    return ends


def greedy_regret(agent: ConditionalDDPG, env: ToyEnv, targets: tuple[float, ...] = TARGETS) -> float:
    """Mean over the targets, of the actor alone."""
    regrets = []
    for target in targets:
        observation, info = env.reset(options={"target": target})
        for _ in range(env.steps):
            observation, _, _, _, info = env.step(agent.predict(observation, deterministic=True)[0])
        regrets.append(info["result"]["regret"])
    return float(np.mean(regrets))


def small_ddpg(env: gymnasium.Env, seed: int = 0, warmup_episodes: int = 4) -> ConditionalDDPG:
    return ConditionalDDPG(env, seed=seed, warmup_episodes=warmup_episodes)


def actions_of(ends: list[EpisodeEnd]) -> list[tuple[float, ...]]:
    return [end.info["result"]["actions"] for end in ends]


# Noise


@pytest.mark.parametrize(
    ("mean", "sigma"), [(0.0, 0.5), (0.4, 0.5), (-1.0, 0.01), (1.0, 0.01), (0.999, 0.02), (0.0, 5.0)]
)
def test_truncated_normal_moments_match_the_closed_form(mean: float, sigma: float) -> None:
    samples = truncated_normal(np.full(200_000, mean), sigma, -1, 1, np.random.default_rng(0))
    lower, upper = (-1 - mean) / sigma, (1 - mean) / sigma

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    mass = (math.erf(upper / math.sqrt(2)) - math.erf(lower / math.sqrt(2))) / 2
    shift = (density(lower) - density(upper)) / mass
    variance = sigma**2 * (1 + (lower * density(lower) - upper * density(upper)) / mass - shift**2)
    assert samples.min() >= -1 and samples.max() <= 1
    assert samples.mean() == pytest.approx(mean + sigma * shift, abs=5 * math.sqrt(variance / 200_000))
    assert samples.var() == pytest.approx(variance, rel=0.02)
    assert np.mean((samples == -1) | (samples == 1)) < 1e-4  # nothing piles up at the bounds


def test_truncated_normal_keeps_shapes_and_refuses_a_mean_outside() -> None:
    generator = np.random.default_rng(0)
    assert truncated_normal(0.5, 0.1, 0, 1, generator).shape == ()
    assert truncated_normal(np.zeros((2, 3)), 0.1, -1, 1, generator).shape == (2, 3)
    with pytest.raises(UserError, match=r"low <= mean <= high, but got .*mean=1.5"):
        truncated_normal(1.5, 0.1, -1, 1, generator)
    with pytest.raises(UserError, match="sigma=0"):
        truncated_normal(0.0, 0, -1, 1, generator)


def test_noise_schedule() -> None:
    schedule = NoiseSchedule(sigma=0.5, decay=0.9, floor=0.2)
    assert [schedule(n) for n in (-5, 0, 1, 2, 100)] == pytest.approx([0.5, 0.5, 0.45, 0.405, 0.2])
    with pytest.raises(UserError, match=r"0 < decay <= 1, but got NoiseSchedule\(sigma=0.5, decay=1.5"):
        NoiseSchedule(0.5, 1.5, 0.1)


# Replay


def test_baseline_by_hand() -> None:
    baseline = TargetBaseline(rate=0.25)
    for reward in (1.0, 2.0, 3.0, 6.0, 7.0):  # means 1, 1.5, 2, 3 (equal weights up to 1 / rate), then 3 + (7 - 3) / 4
        baseline.update(0.3, reward)
    assert baseline.mean(0.3) == pytest.approx(4.0)
    # variance of 1, 2, 3, 6 is 3.5; then 0.75 * (3.5 + 0.25 * 4^2)
    assert baseline.statistics[0.3].variance == pytest.approx(5.625)
    assert baseline.deviation(0.3) == pytest.approx(math.sqrt(5.625))
    baseline.update(0.5, 10.0)
    assert baseline.mean([0.3, 0.4, 0.45, 0.5, 0.9, 0.1]) == pytest.approx([4.0, 7.0, 8.5, 10.0, 10.0, 4.0])
    # 0.5 was seen once: its variance is that of 3 episodes of the pooled one, 5/6 * 5.625
    assert baseline.deviation(0.5) == pytest.approx(math.sqrt(3 * 5.625 * 5 / 6 / 4))
    assert TargetBaseline().mean([0.3, 0.5]).tolist() == [0.0, 0.0]
    assert TargetBaseline().deviation([0.3, 0.5]).tolist() == [1.0, 1.0]


def filled_replay(capacity: int, rewards: list[float], steps: int = 4) -> EpisodeReplay:
    env = ToyEnv(steps)
    replay = EpisodeReplay(
        capacity,
        env.observation_space,
        env.action_space,
        generator=np.random.default_rng(0),
        baseline=TargetBaseline(),
    )
    for episode, reward in enumerate(rewards):
        for step in range(steps):
            observation = np.array([[TARGETS[episode % 2], step / steps, 0, 0]], np.float32)
            last = step == steps - 1
            action = np.array([[(steps * episode + step) / 100]], np.float32)
            replay.add(observation, observation, action, np.array([reward * last]), np.array([last]), [{}])
    return replay


def test_every_transition_can_be_drawn_with_its_normalised_return() -> None:
    replay = filled_replay(100, [1.0, 10.0, 3.0, 30.0])
    batch = replay.sample(2000)
    assert set(np.round(batch.actions[:, 0].numpy() * 100).astype(int)) == set(range(16))  # first and last included
    # Pooled variance of both targets: (1 + 100) / 2; each own variance weighs 2 episodes against 3.
    for episode, (own, difference) in enumerate([(1.0, -1.0), (100.0, -10.0), (1.0, 1.0), (100.0, 10.0)]):
        expected = difference / math.sqrt((2 * own + 3 * 50.5) / 5)
        of_episode = batch.advantages[(batch.actions * 100).round().int() // 4 == episode]
        assert torch.allclose(of_episode, torch.tensor(expected))


def test_replay_forgets_the_oldest_and_returns_exactly() -> None:
    replay = filled_replay(10, [1.0, 2.0, 3.0, 4.0])  # 16 transitions in 10 places: 6 to 15 remain
    assert set(np.round(replay.sample(1000).actions[:, 0].numpy() * 100).astype(int)) == set(range(6, 16))
    assert sorted(replay.returns) == [2.0, 2.0] + [3.0] * 4 + [4.0] * 4
    other = filled_replay(10, [])
    other.load_state(replay.state())
    for ours, theirs in zip(replay.sample(64), other.sample(64), strict=True):
        assert torch.equal(ours, theirs)


# Networks


def test_networks_are_300_300_with_two_learning_rates() -> None:
    agent = small_ddpg(ToyEnv(), warmup_episodes=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in agent.policy.state_dict().items() if "weight" in name}
    assert [shapes[f"actor.mu.{layer}.weight"] for layer in (0, 2, 4)] == [(300, 4), (300, 300), (1, 300)]
    assert [shapes[f"critic.qf0.{layer}.weight"] for layer in (0, 2, 4)] == [(300, 5), (300, 300), (1, 300)]
    assert not any(name.startswith("critic.qf1") for name in shapes)
    before = copy.deepcopy(agent.policy.state_dict())
    agent.gradient_steps = 1
    play(agent, 1)
    after = agent.policy.state_dict()
    # The first step of Adam moves a weight by its learning rate, whatever the gradient.
    for name, rate in (("actor.mu.0.weight", 3e-4), ("critic.qf0.0.weight", 1e-3)):
        assert (after[name] - before[name]).abs().max().item() == pytest.approx(rate, rel=0.02)


def test_an_agent_refuses_other_spaces() -> None:
    env = ToyEnv()
    env.action_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    for name in AGENTS:
        with pytest.raises(UserError, match=r"Box\(-1, 1, \(1,\)\) .* but got Box\(0.0, 1.0"):
            make_agent(name, env, TARGETS)
    with pytest.raises(UserError, match="agent must be one of cacp, random, cma, nsga2, but got 'es'"):
        make_agent("es", ToyEnv(), TARGETS)


# Learning


def trained(seed: int, episodes: int = 60, **settings: Any) -> ConditionalDDPG:
    agent = ConditionalDDPG(ToyEnv(**settings), seed=seed, warmup_episodes=12)
    agent.run(episodes, lambda end: None)
    return agent


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_plans_for_a_problem_whose_optimum_depends_on_the_target(scale: float) -> None:
    agent = trained(0, scale=scale)
    for target in (0.3, 0.4, 0.7):  # 0.4 was never met
        assert ToyEnv().regret(agent.plan(target), target) < 0.005


def test_the_actor_alone_solves_it_too_and_cannot_with_the_target_hidden() -> None:
    assert greedy_regret(trained(0, 300), ToyEnv()) < 0.06
    assert greedy_regret(trained(0, 300, hidden=True), ToyEnv(hidden=True)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_solves_27_steps_with_noise_and_beats_random_search(seed: int) -> None:
    # The standard deviation of the value over random policies is 0.05, and the noise a third of it.
    agent = ConditionalDDPG(ToyEnv(steps=27, noise=0.016, scale=0.05), seed=seed)
    ends, random = play(agent, 300), play(RandomSearch(ToyEnv(steps=27), seed=seed), 900)
    assert greedy_regret(agent, ToyEnv(steps=27)) < 0.107  # the least that is possible without the target
    assert best_regret(ends) < 0.3 * best_regret(random)


def best_regret(ends: list[EpisodeEnd]) -> float:
    """Of the best episode of every target, mean over the targets."""
    results = [end.info["result"] for end in ends]
    return float(np.mean([min(r["regret"] for r in results if r["target"] == target) for target in TARGETS]))


# Episodes, resuming, reproducing


def test_episodes_are_reported_after_their_updates() -> None:
    env = ToyEnv()
    agent = small_ddpg(env)
    ends = play(agent, 6)
    assert [end.episode for end in ends] == [1, 2, 3, 4, 5, 6]
    assert [end.info["result"]["target"] for end in ends] == [0.3, 0.5, 0.7, 0.3, 0.5, 0.7]
    assert [end.reward for end in ends] == pytest.approx([1 - end.info["result"]["regret"] for end in ends])
    assert [end.critic_loss is None for end in ends] == [True, True, True, False, False, False]
    assert all(end.update_seconds > 0 for end in ends)
    assert [end.source for end in ends[:4]] == ["even", "even", "even", "random"]
    assert {end.source for end in ends[4:]} <= {"best", "actor"}
    assert play(agent, 1)[0].episode == 7  # a second run goes on
    assert env.episodes_started == 8  # the next episode is reset already


def test_updates_are_those_of_plain_ddpg() -> None:
    agent = small_ddpg(ToyEnv(), warmup_episodes=6)
    play(agent, 5)
    actor, critic, replay = (copy.deepcopy(part) for part in (agent.actor, agent.critic, agent.replay_buffer))
    actor_adam, critic_adam = torch.optim.Adam(actor.parameters(), 3e-4), torch.optim.Adam(critic.parameters(), 1e-3)
    agent.update_networks(6, batch_size=8)
    for observations, actions, advantages in zip(*(part.split(8) for part in replay.sample(6 * 8)), strict=True):
        critic_adam.zero_grad()
        torch.nn.functional.mse_loss(critic(observations, actions)[0], advantages).backward()
        critic_adam.step()
        actor_adam.zero_grad()
        (-critic.q1_forward(observations, actor(observations)).mean()).backward()
        actor_adam.step()
    for ours, plain in ((agent.actor, actor), (agent.critic, critic)):
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_warmup_is_the_even_share_at_every_new_target_then_random_search() -> None:
    env = ToyEnv()
    ends = play(ConditionalDDPG(env, warmup_episodes=40), 40)
    actions = np.array(actions_of(ends))
    assert not actions[:3].any()
    assert actions[3:].std() == pytest.approx(0.4 * 0.9546, abs=0.03)  # N(0, 0.4^2) in [-1, 1], closed form
    assert abs(actions[3:].mean()) < 0.06


def test_what_is_rehearsed_is_what_is_played() -> None:
    env = ToyEnv()
    agent = small_ddpg(env)
    ends = play(agent, 12)
    ratios = agent.policy_state()["planner.ratios"].numpy()
    for end, own in zip(ends, ratios, strict=True):
        result = end.info["result"]
        assert np.allclose(env.rehearsal.imitate(result["target"], own).actions, result["actions"], atol=1e-6)


def test_imagined_episodes_are_learned_from_at_targets_between_those_met() -> None:
    agent = small_ddpg(ToyEnv())
    play(agent, 10)  # 10 real ones, 4 imagined after each from the fourth on
    assert agent.replay_buffer.size() == 6 * (10 + 4 * 7)
    targets = np.unique(agent.replay_buffer.observations[: agent.replay_buffer.size(), 0, 0])
    assert len(targets) == 3 + 28 and np.float32(0.3) <= targets.min() and targets.max() <= np.float32(0.7)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("stop", [2, 9])  # within warm-up, and after
def test_resuming_is_bit_equal(name: str, stop: int) -> None:
    whole = make_agent(name, ToyEnv(), TARGETS, warmup_episodes=4)
    expected = play(whole, 14)
    first = make_agent(name, ToyEnv(), TARGETS, warmup_episodes=4)
    done = play(first, stop)
    tensors, data = first.state()
    data = json.loads(json.dumps(data, allow_nan=False))
    play(first, 2)  # the saved state must not change with the agent
    env = ToyEnv()
    env.episodes_started = done[-1].episode
    second = make_agent(name, env, TARGETS, seed=0 if name in ("cma", "nsga2") else 123, warmup_episodes=4)
    second.load_state(tensors, data)
    rest = play(second, 14 - stop)
    assert actions_of(done) + actions_of(rest) == actions_of(expected)
    assert [end[:5] for end in rest] == [end[:5] for end in expected[stop:]]
    ours, theirs = (agent.state() for agent in (second, whole))
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(tensor, theirs[0][key]) for key, tensor in ours[0].items())
    if name != "nsga2":  # which chooses them itself
        with_targets = [end.info["result"]["target"] for end in rest]
        assert with_targets == [TARGETS[index % 3] for index in range(stop, 14)]


def test_one_seed_gives_one_run_and_global_generators_stay_untouched() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    first = play(small_ddpg(ToyEnv()), 8)
    assert (torch.rand(1), np.random.rand()) == expected
    assert actions_of(play(small_ddpg(ToyEnv()), 8)) == actions_of(first)
    assert actions_of(play(small_ddpg(ToyEnv(), seed=1), 8)) != actions_of(first)


def test_the_environment_is_seeded_once_and_differently_after_resuming() -> None:
    env = ToyEnv()
    agent = small_ddpg(env, seed=3)
    play(agent, 2)
    assert env.seeds == [3, None, None]
    resumed = ToyEnv()
    second = small_ddpg(resumed, seed=3)
    second.load_state(*agent.state())
    play(second, 1)
    assert resumed.seeds == [5, None]


def test_the_policy_state_is_enough_to_plan() -> None:
    agent = small_ddpg(ToyEnv())
    play(agent, 40)
    plan = agent.plan(0.45)
    others = [small_ddpg(ToyEnv(), seed=9) for _ in range(2)]
    for other in others:
        other.load_policy_state(agent.policy_state())
    assert np.array_equal(others[0].plan(0.45), others[1].plan(0.45))
    assert ToyEnv().regret(others[0].plan(0.45), 0.45) == pytest.approx(ToyEnv().regret(plan, 0.45), abs=0.02)


class Recorder(KVWriter):
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows[step] = dict(key_values)

    def close(self) -> None:
        """Nothing is open."""


def test_values_are_logged_and_only_the_caller_dumps() -> None:
    recorder = Recorder()
    logger = Logger(folder=None, output_formats=[recorder])  # type: ignore[list-item]
    agent = small_ddpg(ToyEnv())
    agent.set_logger(logger)
    agent.run(5, lambda end: logger.dump(step=end.episode))
    assert list(recorder.rows) == [1, 2, 3, 4, 5]
    assert recorder.rows[1] == {}
    names = {"noise", "actor_loss", "critic_loss", "expected_return", "expected_deviation"}
    assert set(recorder.rows[5]) == {f"agent/{name}" for name in names}


def test_random_search_plays_the_even_share_then_keep_ratios_of_its_distribution() -> None:
    env = ToyEnv()
    agent = RandomSearch(env, seed=1)
    ends = play(agent, 600)
    assert [end.episode for end in ends] == list(range(1, 601))
    assert [end.source for end in ends] == ["even"] * 3 + ["random"] * 597
    assert not np.array(actions_of(ends[:3])).any()
    generator = np.random.default_rng(1)
    for end in ends[3:]:
        target = end.info["result"]["target"]
        drawn = env.rehearsal.scaled(target, np.exp(0.3 * generator.standard_normal((1, 6))))
        expected = env.rehearsal.imitate(target, drawn[0]).actions
        assert end.info["result"]["actions"] == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize("algorithm", ["cma", "nsga2"])
def test_evolution_plays_no_policy_twice(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = ToyEnv()
    fine = env.rehearsal._ratios
    monkeypatch.setattr(env.rehearsal, "_ratios", lambda target, actions: np.round(4 * fine(target, actions)))
    agent = make_agent(algorithm, env, TARGETS)
    played = [end.info["result"] for end in play(agent, 90)]
    ratios = [env.rehearsal._ratios(one["target"], np.array(one["actions"])) for one in played]
    assert len({(one["target"], own.tobytes()) for one, own in zip(played, ratios, strict=True)}) == 90
    asked = sum(len(study.trials) for study in agent._studies)  # type: ignore[union-attr]
    assert asked > 100  # those known already are told to Optuna all the same


@pytest.mark.parametrize("algorithm", ["cma", "nsga2"])
def test_evolution_begins_with_the_even_share_and_improves(algorithm: str) -> None:
    agent = make_agent(algorithm, ToyEnv(steps=27), TARGETS)
    ends = play(agent, 450)
    assert [end.source for end in ends] == [algorithm] * 450
    even = {end.info["result"]["target"] for end in ends[:3] if not any(end.info["result"]["actions"])}
    assert even == set(TARGETS)
    assert best_regret(ends) < 0.9 * best_regret(play(RandomSearch(ToyEnv(steps=27)), 450))
