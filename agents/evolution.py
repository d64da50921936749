"""Evolutionary search by Optuna: a policy is one vector of actions, observations are not looked at. What a learning
agent must beat with the same number of episodes. A policy that was played already is not played again: Optuna is told
its return, and asked for another.

- cma: CMA-ES (Hansen, 2016; package cmaes), a study of its own for every target, with a diagonal covariance: a full one
  has more entries than a target has episodes. It starts at the even share (all actions 0).
- nsga2: NSGA-II (Deb et al., 2002) over all targets at once. The target is a gene, and both objectives count: a high
  reward and a low target. Its first generation is the even share at every target, then the warm-up's distribution.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import optuna
import torch
from optuna.samplers import CmaEsSampler, NSGAIISampler
from stable_baselines3.common.logger import Logger

from agents.noise import NoiseSchedule, truncated_normal
from agents.planner import Rehearsal
from agents.searcher import EpisodeEnd, check_spaces
from cacp.checkpoint import pack, unpack

ALGORITHMS = ("cma", "nsga2")
CMA_SIGMA, CMA_POPULATION = 0.15, 8
NSGA2_POPULATION = 2  # times the number of targets, at least 10
REPEATS = 20  # of known policies in a row, before one is played again


class Proposal(NamedTuple):
    """A policy to score: the trial that stands for it, its target, its actions (G,)."""

    study: optuna.Study
    trial: optuna.Trial
    target: float
    actions: list[float]
    policy: bytes  # the target and the keep ratios: different actions may lead to equal ones


class EvolutionSearch:
    """Asks Optuna for the actions of an episode, and tells it the return; the interface of `agents.Searcher`.

    Args:
        env: action space Box(-1, 1, (1,)); `reset(options={"target": ...})` starts an episode for a target, and
            `rehearsal.steps` says how many actions it has.
        algorithm: one of ALGORITHMS.
        targets: in turn (cma), or as the algorithm chooses (nsga2).
        seed: of the samplers.

    Raises:
        UserError: for other spaces.
    """

    def __init__(self, env: gymnasium.Env, *, algorithm: str, targets: Sequence[float], seed: int = 0) -> None:
        check_spaces(env)
        self.env = env
        self.targets = tuple(targets)
        self.returns: list[float] = []  # asked again in the same order, the samplers repeat themselves
        self._known: dict[bytes, float] = {}  # policy -> return
        self.logger = Logger(folder=None, output_formats=[])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._algorithm = algorithm
        self._rehearsal: Rehearsal = env.get_wrapper_attr("rehearsal")
        self._genes = [f"action {step}" for step in range(self._rehearsal.steps)]
        self._shared = algorithm == "nsga2"  # one study for all targets
        self._studies = [self._nsga2(seed)] if self._shared else self._cma(seed)

    def _cma(self, seed: int) -> list[optuna.Study]:
        even = dict.fromkeys(self._genes, 0.0)
        studies = []
        for own_seed in np.random.SeedSequence(seed).generate_state(len(self.targets)).tolist():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna's, of arguments that may change
                sampler = CmaEsSampler(
                    x0=even, sigma0=CMA_SIGMA, popsize=CMA_POPULATION, seed=own_seed, use_separable_cma=True
                )
            studies.append(optuna.create_study(sampler=sampler, direction="maximize"))
            studies[-1].enqueue_trial(even)
        return studies

    def _nsga2(self, seed: int) -> optuna.Study:
        population = max(10, NSGA2_POPULATION * len(self.targets))
        sampler = NSGAIISampler(population_size=population, seed=seed)
        study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
        generator, even = np.random.default_rng(seed), np.zeros(len(self._genes))
        for index in range(population):
            drawn = truncated_normal(even, NoiseSchedule.sigma, -1.0, 1.0, generator)
            actions = (even if index < len(self.targets) else drawn).tolist()
            study.enqueue_trial({"target": index % len(self.targets), **dict(zip(self._genes, actions, strict=True))})
        return study

    def set_logger(self, logger: Logger) -> None:
        """Record into `logger` from now on; who runs the agent dumps."""
        self.logger = logger

    def run(self, episodes: int, on_episode: Callable[[EpisodeEnd], None]) -> None:
        """Play `episodes` episodes, and call `on_episode` after each."""
        for _ in range(episodes):
            proposal = self._next()
            self.env.reset(options={"target": proposal.target})
            episode_return, info = 0.0, dict[str, Any]()
            for action in proposal.actions:
                _, reward, _, _, info = self.env.step(np.array([action], np.float32))
                episode_return += float(reward)
            self._finish(proposal, episode_return)
            on_episode(EpisodeEnd(len(self.returns), episode_return, self._algorithm, None, None, info, 0.0))

    def _next(self) -> Proposal:
        """A policy that was not played yet, unless only known ones are proposed."""
        proposal = self._ask()
        for _ in range(REPEATS):
            if proposal.policy not in self._known:
                break
            self._tell(proposal, self._known[proposal.policy])
            proposal = self._ask()
        return proposal

    def _ask(self) -> Proposal:
        turn = len(self.returns) % len(self.targets)
        study = self._studies[0 if self._shared else turn]
        trial = study.ask()
        if self._shared:
            turn = trial.suggest_int("target", 0, len(self.targets) - 1)
        actions = [trial.suggest_float(gene, -1.0, 1.0) for gene in self._genes]
        target, left = self.targets[turn], iter(actions)
        ratios = self._rehearsal.roll_out(target, lambda observation: next(left)).ratios
        return Proposal(study, trial, target, actions, np.append(ratios, target).tobytes())

    def _tell(self, proposal: Proposal, episode_return: float) -> None:
        values = [episode_return, proposal.target] if self._shared else [episode_return]
        proposal.study.tell(proposal.trial, values)

    def _finish(self, proposal: Proposal, episode_return: float) -> None:
        self._tell(proposal, episode_return)
        self.returns.append(episode_return)
        self._known[proposal.policy] = episode_return

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """The returns so far: all else follows from them and the seed."""
        return pack({"returns": list(self.returns)})

    def load_state(self, tensors: dict[str, torch.Tensor], data: Any) -> None:
        """Take over what `state` returned, into a new searcher of the same arguments."""
        assert not self.returns, "a searcher that has played cannot go back"
        for episode_return in unpack(tensors, data)["returns"]:
            self._finish(self._next(), episode_return)
