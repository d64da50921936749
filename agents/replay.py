"""Replay of whole episodes, and the reward statistics of every target.

The reward comes at an episode's last step and gamma is 1, so the return of every step is that one reward. It is
written to all transitions of the episode when it ends, which makes the first and the last step as likely to be sampled,
and as informative, as any other. Rewards of different targets differ by far more than those of good and bad policies
of one target; so a batch holds (return - mean) / standard deviation of the transition's own target, with the statistics
of the moment of sampling. Observations carry their target in entry 0. Nothing here knows what a target means.

Shapes: B transitions of a batch, C capacity, O observation entries, A action entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.buffers import ReplayBuffer

PRIOR_EPISODES = 3


class TargetStatistics(NamedTuple):
    """Moving mean and variance of the episode rewards of one target, and how many there were."""

    mean: float
    variance: float
    episodes: int


class TargetBaseline:
    """Exponential moving mean and variance of the returns of episodes, real and imagined, by target rounded to 0.01.

    The first 1 / rate rewards of a target have equal weights, so the start value of the average does not linger. A
    target never seen lies between its neighbours, linearly; outside of them it takes the nearest one's value.

    >>> baseline = TargetBaseline(rate=0.5)
    >>> for reward in (1.0, 3.0, 5.0): baseline.update(0.3, reward)
    >>> float(baseline.mean(0.3)), float(baseline.mean(0.9)), float(TargetBaseline().mean(0.3))
    (3.5, 3.5, 0.0)
    """

    def __init__(self, rate: float = 0.05) -> None:
        """Args: rate: weight of the newest reward, in (0, 1]."""
        self.rate = rate
        self.statistics: dict[float, TargetStatistics] = {}

    def update(self, target: float, reward: float) -> None:
        """Take the reward of a finished episode into the averages of its target (West's update of the variance)."""
        key = round(float(target), 2)
        mean, variance, episodes = self.statistics.get(key, TargetStatistics(0.0, 0.0, 0))
        weight = max(self.rate, 1 / (episodes + 1))
        difference = reward - mean
        self.statistics[key] = TargetStatistics(
            mean + weight * difference, (1 - weight) * (variance + weight * difference**2), episodes + 1
        )

    def mean(self, targets: ArrayLike) -> NDArray[np.float64]:
        """Moving mean of the rewards at `targets`, any shape; 0 while there were none."""
        return self._interpolated(targets, {key: value.mean for key, value in self.statistics.items()}, empty=0.0)

    def deviation(self, targets: ArrayLike) -> NDArray[np.float64]:
        """Moving standard deviation of the rewards at `targets`, any shape, > 0; 1 while there is none to measure.

        A target's variance is shrunk to the mean of all by the weight of PRIOR_EPISODES episodes: one that has been
        seen once has no variance of its own.
        """
        seen = self.statistics.values()
        total = sum(value.episodes for value in seen)
        pooled = sum(value.episodes * value.variance for value in seen) / max(total, 1)
        if pooled <= 0:
            return np.ones(np.shape(targets))
        shrunk = {
            key: ((value.episodes * value.variance + PRIOR_EPISODES * pooled) / (value.episodes + PRIOR_EPISODES))
            ** 0.5
            for key, value in self.statistics.items()
        }
        return self._interpolated(targets, shrunk, empty=1.0)

    @staticmethod
    def _interpolated(targets: ArrayLike, values: dict[float, float], empty: float) -> NDArray[np.float64]:
        if not values:
            return np.full(np.shape(targets), empty)
        keys = sorted(values)
        # float32 0.3 is 0.30000001: rounded, so that a target of its own key gets exactly the value of this key.
        return np.interp(np.round(np.asarray(targets, np.float64), 4), keys, [values[key] for key in keys])

    def state(self) -> list[list[float]]:
        """Rows of target, mean, variance, episodes; JSON keeps them exactly."""
        return [[target, *value] for target, value in self.statistics.items()]

    def load_state(self, rows: list[list[float]]) -> None:
        """Take over what `state` returned."""
        self.statistics = {row[0]: TargetStatistics(row[1], row[2], int(row[3])) for row in rows}


class ReturnBatch(NamedTuple):
    """Sampled transitions: observations (B, O), actions (B, A), advantages (B, 1) = (return - mean) / deviation."""

    observations: torch.Tensor
    actions: torch.Tensor
    advantages: torch.Tensor


class EpisodeReplay(ReplayBuffer):
    """SB3's ring buffer, that samples with its own generator and hands out normalised returns of whole episodes."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        generator: np.random.Generator,
        baseline: TargetBaseline,
    ) -> None:
        """As SB3's, and: generator for sampling, baseline that `add` keeps up to date at every end of an episode."""
        assert n_envs == 1 and not optimize_memory_usage, "episodes of one environment follow each other"
        super().__init__(buffer_size, observation_space, action_space, device, n_envs)
        self.generator = generator
        self.baseline = baseline
        self.returns = np.zeros(self.buffer_size)  # (C,)
        self._episode: list[int] = []  # positions of the running episode

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store a transition; the last one of an episode writes the return of all and updates the baseline."""
        self._episode.append(self.pos)
        super().add(obs, next_obs, action, reward, done, infos)
        if done[0]:
            episode_return = float(self.rewards[self._episode, 0].sum())
            self.returns[self._episode] = episode_return
            self.baseline.update(float(obs[0, 0]), episode_return)
            self._episode = []

    def add_episode(self, observations: np.ndarray, actions: np.ndarray, episode_return: float) -> None:
        """Store a whole episode of observations (G + 1, O) and actions (G,) in [-1, 1]."""
        last = len(actions) - 1
        for step, action in enumerate(actions):
            done = step == last
            self.add(
                observations[step][None],
                observations[step + 1][None],
                np.array([[action]]),
                np.array([episode_return if done else 0.0]),
                np.array([done]),
                [{}],
            )

    def sample(self, batch_size: int, env: Any = None) -> ReturnBatch:  # type: ignore[override]
        """Draw transitions uniformly with replacement; call it between episodes, when every return is known."""
        chosen = self.generator.integers(0, self.size(), size=batch_size)
        observations = self.observations[chosen, 0]  # (B, O)
        targets = observations[:, 0]
        advantages = (self.returns[chosen] - self.baseline.mean(targets)) / self.baseline.deviation(targets)  # (B,)
        return ReturnBatch(
            self.to_torch(observations),
            self.to_torch(self.actions[chosen, 0]),
            self.to_torch(advantages.astype(np.float32)[:, None]),
        )

    def state(self) -> dict[str, Any]:
        """The filled part as tensors, and position, baseline and generator as JSON values; only between episodes."""
        assert not self._episode, "an episode is running"
        filled = self.size()
        arrays = {name: torch.from_numpy(getattr(self, name)[:filled].copy()) for name in self._ARRAYS}
        return {
            **arrays,
            "position": self.pos,
            "full": self.full,
            "baseline": self.baseline.state(),
            "generator": self.generator.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned; capacities must be equal once the buffer is full."""
        for name in self._ARRAYS:
            array = state[name].numpy()
            getattr(self, name)[: len(array)] = array
        self.pos, self.full = int(state["position"]), bool(state["full"])
        self.baseline.load_state(state["baseline"])
        self.generator.bit_generator.state = state["generator"]

    _ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "returns")
