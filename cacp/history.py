"""The episodes of a search: one row each in episodes.csv, and the best policies of every target.

The file is the truth: a resumed search reads it back, up to the episode of its checkpoint.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cacp.budget import in_window, meets_targets
from cacp.checkpoint import save_csv
from cacp.parsing import LARGEST_NUMBER, bounded
from cacp.schema import Budget, Cost, Score, UserError


class Candidate(NamedTuple):
    """A policy with its score in the search; episode 0 was planned after it."""

    counts: tuple[int, ...]
    score: Score
    episode: int


class Episode(NamedTuple):
    """A row of episodes.csv; the score on the first half of the validation images."""

    episode: int  # from 1
    target: float  # macs target; the mean of a budget of several costs
    reward: float
    top1: float
    loss: float
    probability: float
    macs: int
    params: int
    source: str  # where the agent had it from
    seconds: float  # since the episode before
    counts: tuple[int, ...]  # kept channels of every prunable group
    latency_ps: float = 0.0  # by the run's table; a column only where there is one

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Episode:
        whole = {key: int(row[key]) for key in ("episode", "macs", "params")}
        real = {key: float(row[key]) for key in ("target", "reward", "top1", "loss", "probability", "seconds")}
        real["latency_ps"] = float(row.get("latency_ps", 0.0))
        if not bounded((*whole.values(), *real.values())):
            raise ValueError(f"numbers must be finite and at most {LARGEST_NUMBER:g}, but got {row!s:.300}")
        counts = tuple(int(count) for count in row["counts"].split("-"))
        return cls(**whole, **real, source=row["source"], counts=counts)  # type: ignore[arg-type]

    def row(self) -> list[str]:
        """Its cells, as many as `columns` says."""
        cells = {**self._asdict(), "counts": "-".join(map(str, self.counts))}
        return [cells[name] if isinstance(cells[name], str) else repr(cells[name]) for name in columns(self.cost)]

    @property
    def cost(self) -> Cost:
        return Cost(self.macs, self.params, self.latency_ps)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.counts, Score(self.top1, self.loss, self.probability, self.cost), self.episode)


def columns(cost: Cost) -> list[str]:
    """The columns of episodes.csv for policies whose cost is known so far."""
    return [name for name in Episode._fields if cost.latency_ps or name != "latency_ps"]


class History:
    """Episodes so far, in memory and in a CSV file that is appended to.

    A policy is credited to every budget whose window it lies in, whatever target the agent was asked for; and to the
    target it was asked for, where a coarse channel grain keeps it out of the window.

    Args:
        path: of episodes.csv.
        dense: cost of the dense model.
        budgets: whose best policies are kept.
        finished: how many rows of an existing file to keep; later ones belong to episodes that will be played again.
        checksum: of these rows, where it is known.

    Raises:
        UserError: if the file holds fewer rows, no such rows, or others than the checksum is of.
    """

    def __init__(
        self, path: Path, dense: Cost, budgets: Sequence[Budget], finished: int = 0, checksum: str = ""
    ) -> None:
        self._path = path
        self._dense = dense
        self._budgets = {budget.name: budget for budget in budgets}
        self._candidates: dict[str, dict[tuple[int, ...], Episode]] = {name: {} for name in self._budgets}
        self.leaders: dict[str, Episode] = {}  # budget name -> its best episode so far
        self.episodes: list[Episode] = []
        self._digest = hashlib.sha256()
        for episode in _read(path, finished) if finished else []:
            self._take(episode)
        if checksum and checksum != self.checksum:
            raise UserError(
                f"{path} was altered: its first {finished} episodes are not those of the checkpoint beside it; restore "
                "it or use another --output"
            )
        save_csv(path, [columns(dense), *(episode.row() for episode in self.episodes)])

    def append(self, episode: Episode) -> None:
        """Take a new episode, and write its row."""
        self._take(episode)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(episode.row())
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not survive a power cut that its episodes do not

    @property
    def checksum(self) -> str:
        """SHA-256 of all rows but the seconds, which differ from run to run."""
        return self._digest.hexdigest()

    def best(self, budget: Budget, most: int) -> list[Episode]:
        """The best different policies of a budget, by the probability of the true class."""
        return sorted(self._candidates[budget.name].values(), key=_quality, reverse=True)[:most]

    @property
    def budgets(self) -> list[str]:
        """Their names."""
        return list(self._budgets)

    def nearest(self, target: float) -> Budget:
        """The budget whose target lies nearest."""
        return min(self._budgets.values(), key=lambda budget: abs(budget.mean_target - target))

    def _take(self, episode: Episode) -> None:
        self.episodes.append(episode)
        self._digest.update(",".join([*episode._replace(seconds=0.0).row(), "\n"]).encode())
        for name, budget in self._budgets.items():
            own = budget.mean_target == episode.target  # used up as far as the channel grain allows
            if not in_window(episode.cost, self._dense, budget) and not (
                own and meets_targets(episode.cost, self._dense, budget)
            ):
                continue
            self._candidates[name].setdefault(episode.counts, episode)
            leader = self.leaders.get(name)
            if leader is None or _quality(episode) > _quality(leader):
                self.leaders[name] = episode


def tradeoff(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The policies that no cheaper one beats, by macs: the best with at most x macs is the last up to x."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.score.cost.macs, -one.score.probability)):
        if not front or one.score.probability > front[-1].score.probability:
            front.append(one)
    return front


def _quality(episode: Episode) -> float:
    return episode.probability


def _read(path: Path, finished: int) -> list[Episode]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            episodes = [Episode.from_row(row) for _, row in zip(range(finished), csv.DictReader(file), strict=False)]
    except (OSError, KeyError, ValueError, AttributeError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {type(error).__name__}: {error}; restore it or use another --output"
        ) from error
    if [episode.episode for episode in episodes] != list(range(1, finished + 1)):
        raise UserError(
            f"{path} must hold the {finished} episodes of the checkpoint beside it, but holds {len(episodes)}; "
            "restore it or use another --output"
        )
    return episodes
