"""Searchers: they play a channel-pruning environment and learn which keep ratios pay off at which target."""

from agents.conditional_ddpg import ConditionalDDPG
from agents.noise import NoiseSchedule, truncated_normal
from agents.random_search import RandomSearch
from agents.replay import EpisodeReplay, TargetBaseline
from agents.searcher import EpisodeEnd, Searcher

AGENTS: dict[str, type[ConditionalDDPG] | type[RandomSearch]] = {"cacp": ConditionalDDPG, "random": RandomSearch}

__all__ = [
    "AGENTS",
    "ConditionalDDPG",
    "EpisodeEnd",
    "EpisodeReplay",
    "NoiseSchedule",
    "RandomSearch",
    "Searcher",
    "TargetBaseline",
    "truncated_normal",
]
