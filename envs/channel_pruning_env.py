"""`ChannelPruning-v0`: pruning a CNN as an episode, one channel group a step. The class docstring is the MDP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from cacp.budget import BudgetWalk, KeepInterval, check_reachable, keep_count
from cacp.schema import Budget, ChannelGroups, Score, UserError
from envs.observation import features, observe
from envs.rehearsal import Rehearsal

GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of it, modulo 1, leave the smallest gaps


class EpisodeResult(NamedTuple):
    """A finished episode, in `info["result"]` of its last step."""

    budget: Budget
    counts: tuple[int, ...]  # kept channels of every prunable group, in forward order
    score: Score
    reward: float


class TargetRange(NamedTuple):
    """Targets that cover [low, high] evenly, episode after episode, without a repetition (a golden-ratio sequence)."""

    low: float
    high: float


class ChannelPruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Choose how many channels of every prunable group stay, under a target for the whole model.

    ## Description
    CACP (Liu, Guo et al., IEEE SPL 2020) and AMC (He et al., ECCV 2018): a step a prunable group, in forward order.
    Every finished episode meets its target and uses it up: cost <= target and >= target - 0.005 of the dense cost,
    wherever the channel grain allows.

    ## Action Space
    `Box(-1, 1, (1,))`. 0 keeps the ratio at which all remaining groups share the rest of the budget evenly, so that
    all zeros is the uniform policy at every target; -1 and 1 are the ends of the interval of keep counts from which
    the budget stays reachable on both sides; linear between. The executed action is the chosen one.

    ## Observation Space
    `Box(0, 1, (16,))`, float32; entry 0 is the target; three entries more for each cost of a budget of several. See
    `envs.observation`.

    ## Rewards
    0 until the last group; there `reward_fn(score, target)` of `score_fn(counts)`.

    ## Starting State
    No group chosen. The target is the next of `targets` in turn (round robin), or of a `TargetRange`.

    ## Episode End
    Terminated at the last group; never truncated. `info["result"]` of that step is an `EpisodeResult`.

    ## Arguments
    `reset(options={"target": 0.42})` asks for a MACs target, and so does `{"target": {"macs": 0.42}}`; of a budget of
    several costs, `targets=Budget({"macs": 0.5, "params": 0.6})`, each may be asked for anew, `{"target": {"macs": 0.4,
    "params": 0.6}}`. `rehearsal` plays episodes without a score (see `envs.rehearsal`). `episodes_started` counts the
    targets and may be set, to go on with an earlier run; a seed sets it as well (seed + n goes on after n episodes
    of a run that began with seed), so that one seed is one trajectory.

    ## Differences from the paper
    - action: prune ratio in [0.05, 1], clamped afterwards -> position in the feasible interval: the stored action is
      the executed one, and no tail of layers pays for the others.
    - previous action, reduced and remaining MACs -> the same in kept fractions, with the feasible interval.
    - reward copied to every step -> once, at the last step; the agent's discount is 1.

    Args:
        groups: of the model.
        score_fn: keep counts of the prunable groups -> Score.
        reward_fn: (Score, target) -> reward.
        targets: MACs targets in (0, 1], or one budget, of any costs, for all episodes.

    Raises:
        UserError: for a target outside (0, 1] or one that no policy can meet.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (the type that gymnasium declares)

    def __init__(
        self,
        groups: ChannelGroups,
        score_fn: Callable[[tuple[int, ...]], Score],
        reward_fn: Callable[[Score, float], float],
        targets: Sequence[float] | TargetRange | Budget = (0.3, 0.5, 0.7),
    ) -> None:
        budget = targets if isinstance(targets, Budget) else None
        self.rehearsal = Rehearsal(groups, budget)
        self._costs = set(budget.targets if budget else ("macs",))
        self.observation_space = spaces.Box(0.0, 1.0, (features(len(self._costs)),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.episodes_started = 0
        self._cost_model = self.rehearsal.cost_model
        self._score_fn = score_fn
        self._reward_fn = reward_fn
        if isinstance(targets, Budget):
            targets = (targets.mean_target,)
        self._targets = targets if isinstance(targets, TargetRange) else tuple(targets)
        if not self._targets:
            raise UserError("targets must name at least one macs target in (0, 1], but got none")
        for target in self._targets:
            check_reachable(self._cost_model, self.rehearsal.budget_of(target))
        self._walk = BudgetWalk(self._cost_model, self.rehearsal.budget_of(self._targets[0]))
        self._interval: KeepInterval | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; `options={"target": ...}` asks for a target or a budget."""
        super().reset(seed=seed)
        if seed is not None:
            self.episodes_started = seed  # one seed, one trajectory: its targets too
        asked = (options or {}).get("target")
        budget = self._asked(asked) if asked is not None else self._next_budget()
        self._walk = BudgetWalk(self._cost_model, budget)
        self._interval = self._walk.interval()
        return self._observation(), {}

    def _asked(self, target: float | Mapping[str, float]) -> Budget:
        budget = Budget(dict(target)) if isinstance(target, Mapping) else self.rehearsal.budget_of(target)
        if set(budget.targets) != self._costs:
            raise UserError(
                f"budgets of this environment are of {' and '.join(sorted(self._costs))}, "
                f"but got {dict(budget.targets)}; make one with targets=Budget(...) of the same costs"
            )
        check_reachable(self._cost_model, budget)
        return budget

    def _next_budget(self) -> Budget:
        if isinstance(self._targets, TargetRange):
            low, high = self._targets
            target = low + (high - low) * ((self.episodes_started + 0.5) * GOLDEN_RATIO % 1.0)
        else:
            target = self._targets[self.episodes_started % len(self._targets)]
        self.episodes_started += 1
        return self.rehearsal.budget_of(target)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Keep the chosen number of channels of the next group.

        Raises:
            UserError: for an action outside [-1, 1], NaN included, or a step after the end.
        """
        if self._interval is None:
            raise UserError("the episode has ended (or not begun); call reset() before step()")
        value = float(np.asarray(action).reshape(-1)[0])
        if not -1 <= value <= 1:
            raise UserError(f"an action must lie in [-1, 1], but got {value}; clip it before step()")
        self._walk.choose(keep_count(self._interval, value))
        if not self._walk.finished:
            self._interval = self._walk.interval()
            return self._observation(), 0.0, False, False, {}
        self._interval = None
        counts, budget = tuple(self._walk.chosen), self._walk.budget
        score = self._score_fn(counts)
        reward = float(self._reward_fn(score, budget.mean_target))
        result = EpisodeResult(budget, counts, score, reward)
        return self._observation(), reward, True, False, {"result": result}

    def _observation(self) -> np.ndarray:
        return observe(self.rehearsal.static, self._walk, self._interval)
