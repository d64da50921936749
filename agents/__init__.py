"""Searchers: they play a channel-pruning environment and learn which keep ratios pay off at which target."""

from agents.conditional_ddpg import WARMUP_EPISODES, ConditionalDDPG
from agents.evolution import EvolutionSearch
from agents.noise import NoiseSchedule, truncated_normal
from agents.planner import Rehearsal
from agents.random_search import RandomSearch
from agents.registry import AGENTS, make_agent
from agents.replay import EpisodeReplay, TargetBaseline
from agents.searcher import EpisodeEnd, Searcher

__all__ = [
    "AGENTS",
    "WARMUP_EPISODES",
    "ConditionalDDPG",
    "EpisodeEnd",
    "EpisodeReplay",
    "EvolutionSearch",
    "NoiseSchedule",
    "RandomSearch",
    "Rehearsal",
    "Searcher",
    "TargetBaseline",
    "make_agent",
    "truncated_normal",
]
