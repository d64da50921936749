"""The random baseline: every action from one truncated normal around 0, which is the agents' warm-up distribution.

What a learning agent must beat with the same number of episodes. It knows nothing of observations or rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from agents.noise import truncated_normal
from agents.searcher import EpisodeEnd, check_spaces
from cacp.checkpoint import pack, unpack


class RandomSearch:
    """Draws every action from N(0, sigma^2) conditioned on [-1, 1]; the interface of `agents.Searcher`."""

    def __init__(self, env: gymnasium.Env, *, seed: int = 0, sigma: float = 0.4) -> None:
        """Take an environment.

        Args:
            env: action space Box(-1, 1, (1,)), flat observations whose entry 0 is the target.
            seed: of the only generator.
            sigma: standard deviation before truncation, > 0; by default that of the warm-up.

        Raises:
            UserError: for other spaces.
        """
        check_spaces(env)
        self.env = env
        self.sigma = sigma
        self.generator = np.random.default_rng(seed)
        self.episodes = 0
        self.logger = Logger(folder=None, output_formats=[])

    def set_logger(self, logger: Logger) -> None:
        """Record into `logger` from now on; who runs the agent dumps."""
        self.logger = logger

    def run(self, episodes: int, on_episode: Callable[[EpisodeEnd], None]) -> None:
        """Play `episodes` episodes after plain resets, and call `on_episode` after each."""
        for _ in range(episodes):
            _, info = self.env.reset()
            episode_return, done = 0.0, False
            while not done:
                action = truncated_normal(np.zeros(1), self.sigma, -1.0, 1.0, self.generator).astype(np.float32)
                _, reward, terminated, truncated, info = self.env.step(action)
                episode_return += float(reward)
                done = terminated or truncated
            self.episodes += 1
            on_episode(EpisodeEnd(self.episodes, episode_return, "random", None, None, info, 0.0))

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Everything that the next episodes depend on, as tensors and JSON values."""
        return pack({"episodes": self.episodes, "generator": self.generator.bit_generator.state})

    def load_state(self, tensors: dict[str, torch.Tensor], data: Any) -> None:
        """Take over what `state` returned."""
        state = unpack(tensors, data)
        self.episodes = int(state["episodes"])
        self.generator.bit_generator.state = state["generator"]
