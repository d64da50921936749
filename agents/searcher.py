"""What every agent offers to who runs it, and what it reports after an episode.

An agent plays a gymnasium environment with the action space Box(-1, 1, (1,)) and flat observations whose entry 0 is the
target; it knows nothing else of the environment. Episodes are counted from 1, over resumes. To continue a run, build
environment and agent anew, set the environment's number of finished episodes to `EpisodeEnd.episode` of the last one,
and call `load_state`; the agent resets the environment itself, without a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gymnasium
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import Logger

from cacp.schema import UserError


class EpisodeEnd(NamedTuple):
    """A finished episode; losses are the means over the updates that followed it, None where there were none."""

    episode: int  # 1-based, counted over resumes
    reward: float  # the return, as the environment gave it
    source: str  # where its actions come from
    actor_loss: float | None
    critic_loss: float | None
    info: dict[str, Any]  # of the last step
    update_seconds: float  # of learning, in all


class Searcher(Protocol):
    """The interface of `search.py` to an agent; built as `AGENTS[name](env, seed=seed, ...)`."""

    def set_logger(self, logger: Logger) -> None:
        """Record into `logger`, under "agent/"; the caller dumps it in `on_episode`, with the episode as step."""

    def run(self, episodes: int, on_episode: Callable[[EpisodeEnd], None]) -> None:
        """Play and learn from `episodes` more episodes, and call `on_episode` after each, its updates included."""

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Everything that the next episodes depend on, as tensors and JSON values; callable from `on_episode`."""
        ...

    def load_state(self, tensors: dict[str, torch.Tensor], data: Any) -> None:
        """Take over what `state` returned; continuing is then bit-equal on the CPU."""


def check_spaces(env: gymnasium.Env) -> None:
    """Refuse an environment that the agents cannot play.

    Raises:
        UserError: unless actions are Box(-1, 1, (1,)) and observations a flat, non-empty Box.
    """
    action, observation = env.action_space, env.observation_space
    unit = isinstance(action, spaces.Box) and action.shape == (1,) and action.low[0] == -1 and action.high[0] == 1
    flat = isinstance(observation, spaces.Box) and len(observation.shape) == 1 and observation.shape[0] > 0
    if not (unit and flat):
        raise UserError(
            "an agent needs the action space Box(-1, 1, (1,)) and a flat observation Box with the target in entry 0, "
            f"but got {action} and {observation}; wrap the environment"
        )
