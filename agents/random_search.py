"""The random baseline: what a learning agent must beat with the same number of episodes.

The first episode of a target is the even share; the others draw a keep ratio for every step, log-normal around one
value, and bring them onto the target's budget. Rewards are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from agents.planner import Rehearsal
from agents.searcher import EpisodeEnd, check_spaces
from cacp.checkpoint import pack, unpack

SIGMA = 0.3  # standard deviation of the logarithm of a keep ratio


class RandomSearch:
    """Draws policies; the interface of `agents.Searcher`.

    Args:
        env: action space Box(-1, 1, (1,)), flat observations whose entry 0 is the target, its rules as `rehearsal`.
        seed: of the only generator.

    Raises:
        UserError: for other spaces.
    """

    def __init__(self, env: gymnasium.Env, *, seed: int = 0) -> None:
        check_spaces(env)
        self.env = env
        self.generator = np.random.default_rng(seed)
        self.episodes = 0
        self.logger = Logger(folder=None, output_formats=[])
        self._rehearsal: Rehearsal = env.get_wrapper_attr("rehearsal")
        self._targets: list[float] = []  # that had their even share

    def set_logger(self, logger: Logger) -> None:
        """Record into `logger` from now on; who runs the agent dumps."""
        self.logger = logger

    def run(self, episodes: int, on_episode: Callable[[EpisodeEnd], None]) -> None:
        """Play `episodes` episodes after plain resets, and call `on_episode` after each."""
        for _ in range(episodes):
            observation, info = self.env.reset()
            target = round(float(observation[0]), 6)  # float32 0.3 is 0.30000001
            source = "random" if target in self._targets else "even"
            episode_return = 0.0
            for action in self._drawn(target) if source == "random" else self._even(target):
                _, reward, _, _, info = self.env.step(np.array([action], np.float32))
                episode_return += float(reward)
            self.episodes += 1
            on_episode(EpisodeEnd(self.episodes, episode_return, source, None, None, info, 0.0))

    def _even(self, target: float) -> list[float]:
        self._targets.append(target)
        return [0.0] * self._rehearsal.steps

    def _drawn(self, target: float) -> list[float]:
        ratios = np.exp(SIGMA * self.generator.standard_normal((1, self._rehearsal.steps)))
        return self._rehearsal.imitate(target, self._rehearsal.scaled(target, ratios)[0]).actions.tolist()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Everything that the next episodes depend on, as tensors and JSON values."""
        generator = self.generator.bit_generator.state
        return pack({"episodes": self.episodes, "targets": list(self._targets), "generator": generator})

    def load_state(self, tensors: dict[str, torch.Tensor], data: Any) -> None:
        """Take over what `state` returned."""
        state = unpack(tensors, data)
        self.episodes, self._targets = int(state["episodes"]), list(state["targets"])
        self.generator.bit_generator.state = state["generator"]
