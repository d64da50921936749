"""Episodes played without a score: what an environment lets an agent know of its rules.

Which keep ratios given actions lead to, and which actions lead to given ratios, are pure functions of groups and
target; so an agent may try a policy out before it asks for its score, and tell an episode again for another target.

Shapes: N policies, G steps (prunable groups), O observation entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cacp.budget import BudgetWalk, KeepInterval, keep_action, keep_count, scaled_ratios
from cacp.cost import CostModel
from cacp.schema import Budget, ChannelGroups, UserError
from envs.observation import observe, static_features


class Rehearsed(NamedTuple):
    """An episode without its score: observations (G + 1, O), actions (G,) in [-1, 1], keep ratios (G,) that follow."""

    observations: np.ndarray
    actions: np.ndarray
    ratios: np.ndarray


class Rehearsal:
    """Plays episodes of `ChannelPruning-v0` in mind.

    Args:
        groups: of the model.
        budget: of several costs, the same for all episodes; None where a target is one of MACs.

    Attributes:
        budget: likewise.
        cost_model: of the groups.
        static: (G, 8) features of the groups, see `envs.observation`.
        steps: of an episode, G.
    """

    def __init__(self, groups: ChannelGroups, budget: Budget | None = None) -> None:
        self.budget = budget
        self.cost_model = CostModel(groups)
        self.static = static_features(groups)
        self.steps = len(self.cost_model.names)

    def budget_of(self, target: float) -> Budget:
        """The budget that a target stands for.

        Raises:
            UserError: where all episodes have one budget, and this is not its mean target.
        """
        if self.budget is None:
            return Budget({"macs": target})
        if not math.isclose(target, self.budget.mean_target, abs_tol=1e-5):
            raise UserError(
                f"every episode has the budget {self.budget.name}, whose mean target is {self.budget.mean_target:.6g}, "
                f"but got the target {target}; make an environment of MACs targets for others"
            )
        return self.budget

    def roll_out(self, target: float, act: Callable[[np.ndarray], float]) -> Rehearsed:
        """The episode of a policy that sees observations (O,) and answers with actions in [-1, 1]."""
        return self._played(target, lambda observation, interval, step: act(observation))

    def imitate(self, target: float, ratios: np.ndarray) -> Rehearsed:
        """The episode whose keep ratios come nearest to `ratios` (G,), step by step."""
        counts = np.round(ratios * self.cost_model.channels).astype(int).tolist()
        return self._played(target, lambda observation, interval, step: keep_action(interval, counts[step]))

    def scaled(self, target: float, ratios: np.ndarray) -> np.ndarray:
        """Keep ratios (N, G) times one factor a policy, so that each uses its target up (real-valued counts)."""
        return scaled_ratios(self.cost_model, self.budget_of(target), ratios)

    def _played(self, target: float, act: Callable[[np.ndarray, KeepInterval, int], float]) -> Rehearsed:
        walk = BudgetWalk(self.cost_model, self.budget_of(target))
        observations, actions = list[np.ndarray](), list[float]()
        while not walk.finished:
            interval = walk.interval()
            observations.append(observe(self.static, walk, interval))
            action = act(observations[-1], interval, len(actions))
            actions.append(float(np.float32(action)))  # as the environment gets it
            walk.choose(keep_count(interval, actions[-1]))
        observations.append(observe(self.static, walk, None))
        return Rehearsed(np.stack(observations), np.array(actions), walk.chosen / self.cost_model.channels)
