"""Plans an episode before it is played: many policies are made up from the best so far, and the one of which a model of
the returns promises most is played, with a bonus for what the model does not know (upper confidence bound).

Whoever gives the budget's rules (`Rehearsal`) turns keep ratios into actions and back; nothing here knows of networks.

Shapes: N episodes, M candidates, G steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agents.return_model import Prediction, ReturnModel

Ratios = NDArray[np.float64]

MEMORY = 1000  # latest episodes that the model sees: its time grows with the square of their number, and more
PARENTS = 8  # most promising policies, brought onto the target's budget, that candidates are made from
CANDIDATES = 500
LEAST_STEP, LARGEST_STEP = 0.03, 0.3  # standard deviation of a candidate's changes of keep ratios, drawn between
FEWEST_CHANGED = 1.5  # steps that a candidate changes on average, drawn between this and all
CURIOSITY = 2.0  # predicted standard deviations that are added to the mean while searching
LEARNING_EPISODES = 25  # between two fits of the model's hyperparameters
FIRST_STEPS, LATER_STEPS = 60, 15  # of these fits


class Rehearsed(Protocol):
    """An episode without its score."""

    @property
    def observations(self) -> NDArray[np.float32]:
        """(G + 1, O), the last one after the last action."""
        ...

    @property
    def actions(self) -> NDArray[np.float64]:
        """(G,) in [-1, 1]."""
        ...

    @property
    def ratios(self) -> Ratios:
        """(G,) that the actions lead to."""
        ...


class Rehearsal(Protocol):
    """The rules of an environment, as `env.rehearsal` tells them to an agent that plans."""

    @property
    def steps(self) -> int:
        """Of an episode: G."""
        ...

    def roll_out(self, target: float, act: Callable[[np.ndarray], float]) -> Rehearsed:
        """The episode of a policy: observation (O,) -> action."""
        ...

    def imitate(self, target: float, ratios: Ratios) -> Rehearsed:
        """The episode whose keep ratios come nearest to (G,)."""
        ...

    def scaled(self, target: float, ratios: Ratios) -> Ratios:
        """Keep ratios (M, G) brought onto the target's budget, real-valued."""
        ...


class Plan(NamedTuple):
    """An episode to play, where it comes from, and what the model expects of it."""

    rehearsed: Rehearsed
    source: str  # even, random, best (made from the best so far) or actor (made from the actor's roll-out)
    expected: float | None = None  # return; None without a model
    deviation: float | None = None  # of that expectation


class Planner:
    """Remembers episodes, and proposes the next.

    Args:
        rehearsal: the rules.
        generator: of the candidates.
    """

    def __init__(self, rehearsal: Rehearsal, generator: np.random.Generator) -> None:
        self._rehearsal = rehearsal
        self._generator = generator
        self._model = ReturnModel(rehearsal.steps)
        self._ratios = np.zeros((0, rehearsal.steps))  # (N, G)
        self._returns = np.zeros(0)  # (N,)
        self._unlearned = LEARNING_EPISODES  # episodes since the last fit of hyperparameters
        self._current = False  # whether the model has taken in all episodes

    def remember(self, ratios: Ratios, episode_return: float) -> None:
        """Take a finished episode: its keep ratios (G,) and its return."""
        self._ratios = np.concatenate([self._ratios, ratios[None]])[-MEMORY:]
        self._returns = np.append(self._returns, episode_return)[-MEMORY:]
        self._unlearned += 1
        self._current = False

    def predict(self, ratios: Ratios) -> Prediction:
        """What to expect of keep ratios (M, G), after all that is remembered."""
        if not self._current:
            self._model.condition(self._ratios, self._returns)
            if self._unlearned >= LEARNING_EPISODES:
                self._model.learn(FIRST_STEPS if self._unlearned > len(self._returns) else LATER_STEPS)
                self._model.condition(self._ratios, self._returns)
                self._unlearned = 0
            self._current = True
        return self._model.predict(ratios)

    def propose(self, target: float, start: Ratios, curiosity: float = CURIOSITY) -> Plan:
        """The most promising candidate; while searching, one that was not played yet, where there is one.

        Args:
            target: of the episode.
            start: keep ratios (G,) of one more policy to make candidates from, the actor's.
            curiosity: 0 asks for the best that is known.
        """
        candidates, from_start = self._candidates(target, start)
        mean, deviation = self.predict(candidates)
        order = np.argsort(-(mean + curiosity * deviation))
        chosen, rehearsed = order[0], self._rehearsal.imitate(target, candidates[order[0]])
        played = {ratios.tobytes() for ratios in self._ratios} if curiosity else set()
        if rehearsed.ratios.tobytes() in played:
            others = ((index, self._rehearsal.imitate(target, candidates[index])) for index in order[1:])
            new = (pair for pair in others if pair[1].ratios.tobytes() not in played)
            chosen, rehearsed = next(new, (chosen, rehearsed))
        source = "actor" if from_start[chosen] else "best"
        return Plan(rehearsed, source, float(mean[chosen]), float(deviation[chosen]))

    def _candidates(self, target: float, start: Ratios) -> tuple[Ratios, NDArray[np.bool_]]:
        """(M, G) the parents, and changes of them, on the target's budget; (M,) whether made from the start."""
        generator, steps = self._generator, self._rehearsal.steps
        known = self._rehearsal.scaled(target, np.concatenate([start[None], self._ratios]))
        order = np.argsort(-self.predict(known).mean)[:PARENTS]
        chosen = np.concatenate([order, generator.choice(order, size=CANDIDATES)])  # (M,)
        shape = (CANDIDATES, 1)
        widths = np.exp(generator.uniform(np.log(LEAST_STEP), np.log(LARGEST_STEP), shape))
        parts = np.exp(generator.uniform(np.log(min(FEWEST_CHANGED / steps, 1.0)), 0.0, shape))
        changed = generator.random((CANDIDATES, steps)) < parts
        moved = known[chosen[len(order) :]] + changed * widths * generator.standard_normal(changed.shape)
        candidates = np.concatenate([known[order], self._rehearsal.scaled(target, np.clip(moved, 0.01, 1.0))])
        return candidates, chosen == 0

    def state(self) -> dict[str, Any]:
        """What `knowledge` holds, and all else that the next proposals depend on."""
        generator = self._generator.bit_generator.state
        return {"knowledge": self.knowledge(), "unlearned": self._unlearned, "generator": generator}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.load_knowledge(state["knowledge"])
        self._unlearned = int(state["unlearned"])
        self._generator.bit_generator.state = state["generator"]

    def knowledge(self) -> dict[str, torch.Tensor]:
        """The episodes and the model's hyperparameters: enough to propose."""
        episodes = {"ratios": torch.from_numpy(self._ratios.copy()), "returns": torch.from_numpy(self._returns.copy())}
        return {**episodes, **{f"model_{name}": value for name, value in self._model.parameters.items()}}

    def load_knowledge(self, knowledge: dict[str, torch.Tensor]) -> None:
        """Take over what `knowledge` returned."""
        self._ratios, self._returns = (knowledge[name].numpy().copy() for name in ("ratios", "returns"))
        self._model.parameters = {name: knowledge[f"model_{name}"].clone() for name in self._model.parameters}
        self._unlearned, self._current = 0, False
