"""The searchers of `benchmarks.search_quality`: each spends a cell's purse, and tells what it found.

Ours without one of its parts, for the ablation, are here too: the library has no options for them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from agents import WARMUP_EPISODES, ConditionalDDPG, EpisodeEnd, Searcher, make_agent
from agents.planner import Plan, Ratios
from benchmarks.published_cacp import published_search
from benchmarks.quality_cell import BETWEEN, TARGETS, Cell, Found
from cacp.budget import uniform_counts
from cacp.methods.sensitivity import degradation_curves, threshold_counts
from cacp.methods.threshold import most_important_counts
from cacp.reward import log_odds_reward
from cacp.schema import TARGET_TOLERANCE, Budget, Score
from envs import ChannelPruningEnv, EpisodeResult
from search import planned_policy

AMC_WARMUP = 5  # random episodes of one target; our agent's own default is for all
PLAIN_WARMUP = 100  # random episodes of CACP

Reward = Callable[[Score, float], float]
Build = Callable[[ChannelPruningEnv, Sequence[float], int], Searcher]  # environment, targets, seed


def by_agent(
    build: Build, cell: Cell, targets: Sequence[float] = TARGETS, reward: Reward = log_odds_reward
) -> list[Found]:
    """Episodes of an agent in our environment, and what ours is asked for after them."""
    env = ChannelPruningEnv(cell.groups, cell.score, reward, targets)
    agent = build(env, targets, cell.seed)
    found: list[Found] = []

    def on_episode(end: EpisodeEnd) -> None:
        result: EpisodeResult = end.info["result"]
        found.append(Found(result.budget.targets["macs"], result.counts, result.reward))

    agent.run(cell.spending.policies * len(targets), on_episode)
    if isinstance(agent, ConditionalDDPG) and len(targets) > 1:
        cell.purse += len(BETWEEN)
        answers = {target: planned_policy(env, agent, target) for target in BETWEEN}
        found += [Found(target, answer.counts, reward(answer.score, target)) for target, answer in answers.items()]
    return found


def named(name: str, warmup_episodes: int = WARMUP_EPISODES) -> Build:
    """An agent of the library."""
    return lambda env, targets, seed: make_agent(name, env, targets, seed, warmup_episodes)


def by_amc(cell: Cell) -> list[Found]:
    return [found for target in TARGETS for found in by_agent(named("cacp", AMC_WARMUP), cell, [target])]


def by_published(cell: Cell) -> list[Found]:
    cell.forgiven, cell.criterion = TARGET_TOLERANCE, "l1"
    episodes = published_search(cell.groups, cell.stale_top1, TARGETS, cell.purse, cell.seed)
    return [Found(*episode) for episode in episodes]


def by_uniform(cell: Cell) -> list[Found]:
    return [Found(target, uniform_counts(cell.cost_model, Budget({"macs": target})), 0.0) for target in TARGETS]


def by_sensitivity(cell: Cell) -> list[Found]:
    curves = degradation_curves(
        lambda policies: [cell.score(counts).probability for counts in policies], cell.cost_model, cell.purse
    )
    return [
        Found(target, threshold_counts(curves, cell.cost_model, Budget({"macs": target})), 0.0) for target in TARGETS
    ]


def by_taylor(cell: Cell) -> list[Found]:
    cell.criterion = "taylor"
    importance, cost_model = cell.importance("taylor"), cell.cost_model
    return [
        Found(target, most_important_counts(importance, cost_model, Budget({"macs": target})), 0.0)
        for target in TARGETS
    ]


# ours without a part ------------------------------------------------------------------------------------------------


class WithoutActor(ConditionalDDPG):
    """Plans from the even share in place of the actor's roll-out."""

    def _greedy(self, target: float) -> Ratios:
        return self._rehearsal.roll_out(target, lambda observation: 0.0).ratios


class WithoutImagination(ConditionalDDPG):
    """Its networks learn from the episodes that it plays alone."""

    def _imagine(self) -> None:
        pass


class WithoutNetworks(WithoutActor, WithoutImagination):
    """Plans with the model of returns alone."""


class WithoutPlanner(WithoutImagination):
    """Plays the actor's actions with noise: a DDPG without a model."""

    def _planned(self, target: float) -> Plan:
        if self._episode_num < self.warmup_episodes:
            return super()._planned(target)
        return Plan(self._rehearsal.roll_out(target, lambda observation: self._noisy(self._act(observation))), "actor")


def ablated(agent: type[ConditionalDDPG], warmup_episodes: int = WARMUP_EPISODES) -> Build:
    return lambda env, targets, seed: agent(env, seed=seed, warmup_episodes=warmup_episodes)


def top1_reward(score: Score, target: float) -> float:
    return score.top1


def log_loss_reward(score: Score, target: float) -> float:
    return -math.log(score.loss)


Search = Callable[[Cell], list[Found]]

RIVALS: dict[str, Search] = {
    "cacp": partial(by_agent, named("cacp")),
    "sensitivity": by_sensitivity,
    "uniform": by_uniform,
    "taylor": by_taylor,
    "random": partial(by_agent, named("random")),
    "random-between": partial(by_agent, named("random"), targets=BETWEEN),
    "cma": partial(by_agent, named("cma")),
    "nsga2": partial(by_agent, named("nsga2")),
    "amc": by_amc,
    "published": by_published,
}
VARIANTS: dict[str, Search] = {
    "by-top1": partial(by_agent, named("cacp"), reward=top1_reward),
    "by-loss": partial(by_agent, named("cacp"), reward=log_loss_reward),
    "without-actor": partial(by_agent, ablated(WithoutActor)),
    "without-imagination": partial(by_agent, ablated(WithoutImagination)),
    "without-networks": partial(by_agent, ablated(WithoutNetworks)),
    "without-planner": partial(by_agent, ablated(WithoutPlanner, PLAIN_WARMUP)),
}
SEARCHERS = RIVALS | VARIANTS
