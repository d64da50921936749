"""A search while it runs: episodes are played, and what is written down of each.

Its folder holds episodes.csv, TensorBoard events, and a checkpoint of the agent every few episodes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3.common.logger import Logger

from agents import EpisodeEnd, Searcher
from cacp.checkpoint import UNFIT, load_state, save_state
from cacp.cost import CostModel
from cacp.figures import save_tradeoff, tradeoff_figure
from cacp.history import Candidate, Episode, History, tradeoff
from cacp.interrupts import Interrupted, finishing_first
from cacp.parsing import check_shape
from cacp.profiling import Profile
from cacp.reporting import (
    ProgressLine,
    console,
    log_best_policy,
    log_episode,
    log_settings,
    log_tradeoff,
    search_logger,
)
from cacp.schema import ChannelGroups, Cost, UserError
from envs import EpisodeResult

CHECKPOINT_EPISODES = 10  # a kill loses at most so many episodes


class Finished(NamedTuple):
    """How many episodes a checkpoint has finished, and the checksum of their rows in episodes.csv."""

    episodes: int = 0
    checksum: str = ""


def resume(folder: Path, agent: Searcher, episodes: int) -> Finished:
    """What the checkpoint of a search has finished, after which the agent goes on; nothing without one.

    Raises:
        UserError: for a checkpoint that is damaged, or not of this search.
    """
    saved = load_state(folder / "checkpoint")
    if saved is None:
        return Finished()
    try:
        check_shape(saved.data, {"episode": int})
        finished = saved.data["episode"]
        if not 0 < finished <= episodes:
            raise ValueError(f"episode {finished!r:.80} of {episodes}")
        checksum = saved.data.get("episodes_sha256", "")  # an older one has none
        agent.load_state(saved.tensors, saved.data["agent"])
    except UNFIT as error:
        raise UserError(
            f"the checkpoint in {folder / 'checkpoint'} is not of this search: {type(error).__name__}: {error!s:.300}; "
            f"delete {folder} to search again"
        ) from error
    console.print(f"going on after episode {finished} of {episodes}")
    return Finished(finished, checksum)


def play(
    folder: Path,
    episodes: int,
    groups: ChannelGroups,
    agent: Searcher,
    history: History,
    profile: Profile,
    settings: Mapping[str, Any],
) -> None:
    """Play what is left of `episodes`, and write each down in `folder`; `settings` of the run go to TensorBoard.

    Raises:
        Interrupted: after the episode, saved, in which the user asked to stop.
    """
    finished = len(history.episodes)
    logger = search_logger(folder, finished + 1)
    agent.set_logger(logger)
    if not finished:
        log_settings(logger, settings, groups, history.budgets)
    with ProgressLine("search", episodes, finished) as progress, finishing_first("episode") as request:
        records = Records(folder, episodes, groups, agent, history, logger, progress, profile)

        def add(end: EpisodeEnd) -> None:
            number = request.number
            records.add(end, save=number > 0)
            if number:
                raise Interrupted(f"stopped after episode {end.episode} of {episodes}, all saved", number)

        try:
            agent.run(episodes - finished, add)
        finally:
            logger.close()


class Records:
    """What is written down of every episode: episodes.csv, TensorBoard, the progress line; a checkpoint every few."""

    def __init__(
        self,
        folder: Path,
        episodes: int,
        groups: ChannelGroups,
        agent: Searcher,
        history: History,
        logger: Logger,
        progress: ProgressLine,
        profile: Profile,
    ) -> None:
        self._folder = folder
        self._episodes = episodes
        self._groups = groups
        self._cost_model = CostModel(groups)
        self._agent = agent
        self._history = history
        self._logger = logger
        self._progress = progress
        self._profile = profile
        self._clock = time.monotonic()
        self._shown: dict[str, tuple[int, ...]] = {}  # best policies whose figure is in TensorBoard
        self._front: list[Candidate] = []  # the trade-off curve that is there

    def add(self, end: EpisodeEnd, save: bool = False) -> None:
        """Take a finished episode, its updates included; `save` it now, whatever its number."""
        self._profile.move("agent's updates", end.update_seconds)
        with self._profile.phase("records"):
            now = time.monotonic()
            episode = finished_episode(end, now - self._clock)
            self._clock = now
            self._history.append(episode)
            checkpoint = save or end.episode == self._episodes or end.episode % CHECKPOINT_EPISODES == 0
            self._log(episode, figures=checkpoint)  # before the checkpoint: a resumed search drops what comes after it
            if checkpoint:
                tensors, data = self._agent.state()
                state = {"episode": end.episode, "episodes_sha256": self._history.checksum, "agent": data}
                save_state(self._folder / "checkpoint", tensors, state)
            bests = ", ".join(f"{name} {100 * row.top1:.1f} %" for name, row in sorted(self._history.leaders.items()))
            self._progress.advance(f"best top-1: {bests}" if bests else "")

    def _log(self, episode: Episode, figures: bool) -> None:
        leaders, names, channels = self._history.leaders, self._cost_model.names, self._cost_model.channels.tolist()
        budget = self._history.nearest(episode.target).name
        log_episode(self._logger, episode, budget, names, channels, leaders.get(budget, episode).top1)
        for name, best in leaders.items() if figures else ():
            if self._shown.get(name) != best.counts:
                self._shown[name] = best.counts
                log_best_policy(self._logger, self._groups, name, best)
        front = tradeoff(one.candidate for one in self._history.episodes) if figures else self._front
        if front != self._front:
            self._front = front
            log_tradeoff(self._logger, tradeoff_figure(front, self._cost_model.dense))
        self._logger.dump(episode.episode)


def finished_episode(end: EpisodeEnd, seconds: float) -> Episode:
    result: EpisodeResult = end.info["result"]
    return Episode(
        episode=end.episode,
        target=result.budget.mean_target,
        reward=result.reward,
        top1=result.score.top1,
        loss=result.score.loss,
        probability=result.score.probability,
        macs=result.score.cost.macs,
        params=result.score.cost.params,
        source=end.source,
        seconds=seconds,
        counts=result.counts,
        latency_ps=result.score.cost.latency_ps,
    )


def write_tradeoff(folder: Path, history: History, planned: Iterable[Candidate], dense: Cost) -> list[Candidate]:
    """Write, and return, the trade-off curve of a run's episodes and of policies that were planned after them."""
    front = tradeoff([*(episode.candidate for episode in history.episodes), *planned])
    save_tradeoff(folder / "search", front, dense)
    return front
