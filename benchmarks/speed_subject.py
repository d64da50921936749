"""What `benchmarks.search_speed` scores: a search's own network and images, and policies as its warm-up draws them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents import EpisodeEnd, RandomSearch
from benchmarks.speed_summary import Drawn
from cacp.cost import CostModel
from cacp.data import ImageData
from cacp.evaluation import device_of, resolve_precision
from cacp.experiment import Experiment
from cacp.importance import channel_orders
from cacp.pipeline import build_workbench, load_splits
from cacp.profiling import Profile
from cacp.reward import log_odds_reward
from cacp.schema import ChannelGroups, Normalisation, Score, UserError
from cacp.scoring import PolicyScorer
from cacp.slicing import counts_policy
from envs import ChannelPruningEnv, EpisodeResult


class Subject(NamedTuple):
    """A network to prune, and the images that score its policies."""

    model: nn.Module  # dense, fp32, in eval mode on its device
    groups: ChannelGroups
    orders: Mapping[str, Tensor]  # channels of every prunable group, the most important first
    criterion: str
    validation: ImageData
    calibration: ImageData
    normalisation: Normalisation
    precision: torch.dtype  # of ours

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def scorer(self, precision: torch.dtype, profile: Profile | None = None) -> PolicyScorer:
        """Without repair, which the other systems do not know."""
        sets = self.validation, self.calibration
        return PolicyScorer(self.model, self.groups, *sets, self.normalisation, precision, profile, repair=False)


def subject_of(experiment: Experiment) -> Subject:
    """The search's own network and images."""
    with tempfile.TemporaryDirectory() as folder:
        if experiment.weights != "train":
            experiment = dataclasses.replace(experiment, output=folder)
        bench = build_workbench(experiment)
    return Subject(
        model=bench.dense.model,
        groups=bench.groups,
        orders=channel_orders(bench.importance(experiment.criterion)),
        criterion=experiment.criterion,
        validation=load_splits(experiment).validation,
        calibration=bench.calibration,
        normalisation=bench.dense.normalisation,
        precision=resolve_precision(experiment.precision, device_of(bench.dense.model)),
    )


def draw_policies(subject: Subject, targets: Sequence[float], count: int, seed: int) -> list[Drawn]:
    """Different policies as the search's warm-up draws them, the targets in turn.

    Raises:
        UserError: where the network has too few.
    """
    cost_model = CostModel(subject.groups)
    env = ChannelPruningEnv(
        subject.groups, lambda counts: Score(0.0, 0.0, 0.0, cost_model.cost(counts)), log_odds_reward, targets
    )
    agent = RandomSearch(env, seed=seed)
    drawn: dict[tuple[int, ...], Drawn] = {}

    def on_episode(end: EpisodeEnd) -> None:
        result: EpisodeResult = end.info["result"]
        if result.counts in drawn:
            env.episodes_started -= 1  # the same target once more
            return
        policy = counts_policy(subject.groups, result.counts, subject.orders, subject.criterion)
        drawn[result.counts] = Drawn(policy, result.budget.targets["macs"], result.score.cost)

    for _ in range(100 * count):
        if len(drawn) == count:
            return list(drawn.values())
        agent.run(1, on_episode)
    raise UserError(
        f"policies must be at most the different ones that {100 * count} random episodes find, "
        f"but got {count} with the warm-up's; found {len(drawn)}; lower --policies"
    )
