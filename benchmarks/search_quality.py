"""Every searcher with the same purse: what it finds, policy for policy, on the same network and images.

    python -m benchmarks.search_quality --dataset imagefolder --data_dir DIR --work FOLDER \
        --weights resnet20=FILE resnet56=FILE [--searchers NAME ...] [--seeds 0 1 2] \
        [--judge development|test --result results/search_quality.json]

A cell is a searcher, a model and a seed: 100 policies a target, each scored on 1,000 validation images after batch norm
was recalibrated on 512 training images. What it found is a JSON file in FOLDER; a cell whose file is there is skipped.
--judge then measures all policies found so far in fp32: on 5,000 training images that nothing else uses (for
decisions), or on the test images (for the final table, once).

Searchers:

- cacp: our agent, one run for all targets. amc: the same agent, a run a target (AMC: an agent a target).
- published: CACP as published, see `benchmarks.published_cacp`; stale batch norm while it searches. Its policies end
  up to 0.4 % of the dense MACs above their target: up to 0.5 % is forgiven.
- random: random policies, the best by fresh batch norm (EagleEye). cma, nsga2: see `agents.evolution`.
- sensitivity: FastNAS-like, see `cacp.methods.sensitivity`. uniform, taylor: without episodes.

All but `published` minimise the loss on the validation images, and it picks the policy of a target among those that
meet it.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents import EpisodeEnd, make_agent
from benchmarks.published_cacp import published_search
from benchmarks.quality_table import show, summed_up
from benchmarks.summarise import portable
from cacp.budget import meets_targets, uniform_counts
from cacp.checkpoint import load_json, save_json
from cacp.cost import CostModel
from cacp.data import ImageData, load_dataset, make_splits, normalise, stratified_order
from cacp.evaluation import resolve_precision
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.methods import Subject, taylor
from cacp.methods.sensitivity import degradation_curves, threshold_counts
from cacp.models import build_model
from cacp.models.weights import load_weights
from cacp.pipeline import environment, run_command
from cacp.reward import log_loss_reward
from cacp.schema import TARGET_TOLERANCE, Budget, ChannelGroups, Normalisation, Policy, Score
from cacp.scoring import CALIBRATION_BATCH, PolicyScorer
from cacp.slicing import counts_policy, slice_model
from envs import ChannelPruningEnv, EpisodeResult

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
POLICIES = 100  # a target
VALIDATION, CALIBRATION, DEVELOPMENT = 1000, 512, 5000  # images
DEVELOPMENT_SEED = 12345
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of the weights
AMC_WARMUP = 5  # random episodes of one target; our agent's own default is for all

Counts = tuple[int, ...]


class Found(NamedTuple):
    """A policy that was scored for a target: keep counts of the prunable groups, and what it is picked by."""

    target: float
    counts: Counts
    value: float


class Cell:
    """A network, its images and the purse of one cell."""

    def __init__(self, model: str, weights: Path, train: ImageData, seed: int) -> None:
        self.development, rest = development_split(train)
        splits = make_splits(rest, None, VALIDATION, CALIBRATION, seed)
        self.calibration, device = splits.calibration, torch.device("cpu" if not torch.cuda.is_available() else "cuda")
        self.model = build_model(model, len(train.classes), seed=0)
        load_weights(self.model, weights)
        self.model.eval().to(device, memory_format=torch.channels_last)
        self.groups: ChannelGroups = trace(self.model, torch.zeros(1, *train.image_shape, device=device), "inner")
        self.cost_model = CostModel(self.groups)
        precision = resolve_precision("auto", device)
        self.scorer_of_policies = self.scorer(splits.validation, precision)
        self._orders: dict[str, dict[str, torch.Tensor]] = {}
        self.seed = seed
        self.scored = 0
        self.criterion = "l1"
        self.forgiven = 0.0  # of the dense MACs, above a target

    def scorer(self, images: ImageData, precision: torch.dtype = torch.float32) -> PolicyScorer:
        return PolicyScorer(self.model, self.groups, images, self.calibration, NORMALISATION, precision)

    def policy(self, counts: Counts) -> Policy:
        if self.criterion not in self._orders:
            self._orders[self.criterion] = channel_orders(self.importance(self.criterion))
        return counts_policy(self.groups, counts, self._orders[self.criterion], self.criterion)

    def score(self, counts: Counts) -> Score:
        """Of one policy, paid from the purse."""
        self._pay()
        return self.scorer_of_policies(self.policy(counts))

    def stale_top1(self, counts: Counts) -> float:
        """Top-1 without recalibration, paid likewise."""
        self._pay()
        sliced = slice_model(self.model, self.groups, self.policy(counts)).to(memory_format=torch.channels_last)
        return self.scorer_of_policies.evaluate(sliced).top1

    def _pay(self) -> None:
        self.scored += 1
        assert self.scored <= POLICIES * len(TARGETS), "the purse is empty"

    def importance(self, criterion: str) -> dict[str, torch.Tensor]:
        """Channel scores, on the calibration images where the criterion needs some."""
        images, labels = self.calibration, self.calibration.labels
        batches = (
            (normalise(images.batch(part), NORMALISATION), labels[part])
            for part in torch.arange(len(images)).split(CALIBRATION_BATCH)
        )
        return channel_importance(self.model, self.groups, criterion, batches, self.seed)


def development_split(train: ImageData) -> tuple[ImageData, ImageData]:
    """5,000 training images, the same for all cells, and the rest."""
    order = stratified_order(train.labels, torch.Generator().manual_seed(DEVELOPMENT_SEED))
    return train.subset(order[:DEVELOPMENT]), train.subset(order[DEVELOPMENT:])


# searchers ------------------------------------------------------------------------------------------------------------


def by_agent(name: str, cell: Cell, targets: Sequence[float] = TARGETS, warmup_episodes: int = 15) -> list[Found]:
    found: list[Found] = []

    def on_episode(end: EpisodeEnd) -> None:
        result: EpisodeResult = end.info["result"]
        found.append(Found(result.budget.targets["macs"], result.counts, -result.score.loss))

    env = ChannelPruningEnv(cell.groups, cell.score, log_loss_reward, targets)
    make_agent(name, env, targets, cell.seed, warmup_episodes).run(POLICIES * len(targets), on_episode)
    return found


def by_amc(cell: Cell) -> list[Found]:
    return [found for target in TARGETS for found in by_agent("cacp", cell, [target], AMC_WARMUP)]


def by_published(cell: Cell) -> list[Found]:
    cell.forgiven = TARGET_TOLERANCE
    episodes = published_search(cell.groups, cell.stale_top1, TARGETS, POLICIES * len(TARGETS), cell.seed)
    return [Found(*episode) for episode in episodes]


def by_uniform(cell: Cell) -> list[Found]:
    return [Found(target, uniform_counts(cell.cost_model, Budget({"macs": target})), 0.0) for target in TARGETS]


def by_sensitivity(cell: Cell) -> list[Found]:
    purse = POLICIES * len(TARGETS)
    curves = degradation_curves(lambda counts: -cell.score(counts).loss, cell.cost_model, purse)
    return [
        Found(target, threshold_counts(curves, cell.cost_model, Budget({"macs": target})), 0.0) for target in TARGETS
    ]


def by_taylor(cell: Cell) -> list[Found]:
    cell.criterion = "taylor"
    subject = Subject(cell.groups, cell.cost_model, cell.importance, "taylor", cell.scorer_of_policies, 0)
    budgets = [Budget({"macs": target}) for target in TARGETS]
    return [Found(budget.targets["macs"], tuple(taylor(subject, budget).counts.values()), 0.0) for budget in budgets]


SEARCHERS: dict[str, Callable[[Cell], list[Found]]] = {
    "cacp": partial(by_agent, "cacp"),
    "sensitivity": by_sensitivity,
    "uniform": by_uniform,
    "taylor": by_taylor,
    "random": partial(by_agent, "random"),
    "cma": partial(by_agent, "cma"),
    "nsga2": partial(by_agent, "nsga2"),
    "amc": by_amc,
    "published": by_published,
}


# cells ----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--weights", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=SEARCHERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", required=True, type=Path, help="folder of a file a cell")
    parser.add_argument("--judge", choices=("development", "test"), help="measure what was found")
    parser.add_argument("--result", type=Path, help="JSON file for what is measured")
    arguments = parser.parse_args()
    if (arguments.judge is None) != (arguments.result is None):
        parser.error("--judge and --result go together")
    weights = dict(pair.split("=", 1) for pair in arguments.weights)
    train = load_dataset(arguments.dataset, "train", arguments.data_dir)
    for seed, (model, file), searcher in itertools.product(arguments.seeds, weights.items(), arguments.searchers):
        path = arguments.work / f"{model}-{searcher}-{seed}.json"
        if path.is_file():
            continue
        save_json(path, portable(searched(searcher, model, Cell(model, Path(file), train, seed))))
        print(path.stem, f"{load_json(path)['seconds']:.0f} s", flush=True)
    if arguments.judge:
        test = load_dataset(arguments.dataset, "test", arguments.data_dir) if arguments.judge == "test" else None
        rows = []
        for path in sorted(arguments.work.glob("*-*-?.json")):
            found = load_json(path)
            measured = path.with_suffix(f".{arguments.judge}.json")
            if not measured.is_file():
                cell = Cell(found["model"], Path(weights[found["model"]]), train, found["seed"])
                save_json(measured, judged(cell, found, cell.development if test is None else test))
            rows.append({**found, "measured": load_json(measured)})
        result = {
            "judged_on": arguments.judge,
            "targets": TARGETS,
            "purse": {"policies_a_target": POLICIES, "validation": VALIDATION, "calibration": CALIBRATION},
            "models": {model: summed_up([row for row in rows if row["model"] == model]) for model in weights},
            "cells": [{key: value for key, value in row.items() if key != "found"} for row in rows],
            "environment": environment(0),
        }
        save_json(arguments.result, portable(result))
        show(result["models"])


def searched(searcher: str, model: str, cell: Cell) -> dict[str, Any]:
    """Search, and pick the policy of every target."""
    start = time.monotonic()
    found = SEARCHERS[searcher](cell)
    picked = {f"{target:.2f}": best_of(found, target, cell) for target in TARGETS}
    return {
        "searcher": searcher,
        "model": model,
        "seed": cell.seed,
        "criterion": cell.criterion,
        "policies_scored": cell.scored,
        "seconds": time.monotonic() - start,
        "picked": {name: None if one is None else {"counts": list(one.counts)} for name, one in picked.items()},
        "found": [[one.target, "-".join(map(str, one.counts)), one.value] for one in found],
        "environment": environment(cell.seed),
    }


def judged(cell: Cell, found: dict[str, Any], images: ImageData) -> dict[str, Any]:
    """Scores of what a cell picked, in fp32, on images that it did not see."""
    scorer, measured = cell.scorer(images), {}
    cell.criterion = found["criterion"]
    for target, picked in found["picked"].items():
        if picked is not None:
            score = scorer(cell.policy(tuple(picked["counts"])))
            measured[target] = {**score.to_json(), "macs": score.cost.macs / cell.cost_model.dense.macs}
    return measured


def best_of(found: Sequence[Found], target: float, cell: Cell) -> Found | None:
    """The best that was found for a target and meets it; None where nothing does."""
    cost_model, budget = cell.cost_model, Budget({"macs": target + cell.forgiven})
    meeting = [
        one
        for one in found
        if one.target == target and meets_targets(cost_model.cost(one.counts), cost_model.dense, budget)
    ]
    return max(meeting, key=lambda one: one.value, default=None)


if __name__ == "__main__":
    run_command(main)
