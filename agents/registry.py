"""The searchers by name."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium

from agents.conditional_ddpg import WARMUP_EPISODES, ConditionalDDPG
from agents.evolution import ALGORITHMS, EvolutionSearch
from agents.random_search import RandomSearch
from agents.searcher import Searcher
from cacp.schema import UserError

AGENTS = ("cacp", "random", *ALGORITHMS)


def make_agent(
    name: str, env: gymnasium.Env, targets: Sequence[float], seed: int = 0, warmup_episodes: int = WARMUP_EPISODES
) -> Searcher:
    """A searcher that plays `env`.

    Args:
        name: one of AGENTS.
        env: see the searcher's class.
        targets: of the environment; only evolutionary search asks for them.
        seed: of everything random in the searcher.
        warmup_episodes: of cacp.

    Raises:
        UserError: for an unknown name, or an environment that the searcher cannot play.
    """
    if name == "cacp":
        return ConditionalDDPG(env, seed=seed, warmup_episodes=warmup_episodes)
    if name == "random":
        return RandomSearch(env, seed=seed)
    if name in ALGORITHMS:
        return EvolutionSearch(env, algorithm=name, targets=targets, seed=seed)
    raise UserError(f"agent must be one of {', '.join(AGENTS)}, but got {name!r}")
