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
- random: random policies, the best by fresh batch norm (EagleEye); random-between: at targets that cacp is asked for
  after its search, 100 each against its one. cma, nsga2: see `agents.evolution`.
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
from typing import Any

from agents import WARMUP_EPISODES, ConditionalDDPG, EpisodeEnd, make_agent
from benchmarks.published_cacp import published_search
from benchmarks.quality_cell import CALIBRATION, POLICIES, TARGETS, VALIDATION, Cell, Found
from benchmarks.quality_table import show, summed_up
from benchmarks.summarise import portable
from cacp.budget import meets_targets, uniform_counts
from cacp.checkpoint import load_json, save_json
from cacp.data import ImageData, load_dataset
from cacp.methods import Subject, taylor
from cacp.methods.sensitivity import degradation_curves, threshold_counts
from cacp.pipeline import environment, run_command
from cacp.reward import log_loss_reward
from cacp.schema import TARGET_TOLERANCE, Budget
from envs import ChannelPruningEnv, EpisodeResult
from search import planned

BETWEEN = (0.35, 0.45, 0.55, 0.65)  # never trained: one planned policy each, against 100 random ones
AMC_WARMUP = 5  # random episodes of one target; our agent's own default is for all


# searchers ------------------------------------------------------------------------------------------------------------


def by_agent(
    name: str, cell: Cell, targets: Sequence[float] = TARGETS, warmup_episodes: int = WARMUP_EPISODES
) -> list[Found]:
    env = ChannelPruningEnv(cell.groups, cell.score, log_loss_reward, targets)
    found: list[Found] = []
    agent = make_agent(name, env, targets, cell.seed, warmup_episodes)

    def on_episode(end: EpisodeEnd) -> None:
        result: EpisodeResult = end.info["result"]
        found.append(Found(result.budget.targets["macs"], result.counts, -result.score.loss))

    agent.run(POLICIES * len(targets), on_episode)
    if isinstance(agent, ConditionalDDPG) and len(targets) > 1:
        cell.purse += len(BETWEEN)
        answers = {target: planned(env, agent, target) for target in BETWEEN}
        found += [Found(target, answer.counts, -answer.score.loss) for target, answer in answers.items()]
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
    "random-between": partial(by_agent, "random", targets=BETWEEN),
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
        path = arguments.work / f"{model}_{searcher}_{seed}.json"
        if not path.is_file():
            save_json(path, portable(searched(searcher, model, Cell(model, Path(file), train, seed))))
            print(path.stem, f"{load_json(path)['seconds']:.0f} s", flush=True)
    if arguments.judge:
        test = load_dataset(arguments.dataset, "test", arguments.data_dir) if arguments.judge == "test" else None
        rows = [measured(path, weights, train, test) for path in sorted(arguments.work.glob("*_*_?.json"))]
        result = {
            "judged_on": arguments.judge,
            "targets": TARGETS,
            "purse": {"policies_a_target": POLICIES, "validation": VALIDATION, "calibration": CALIBRATION},
            "models": {model: summed_up([row for row in rows if row["model"] == model], TARGETS) for model in weights},
            "cells": rows,
            "environment": environment(0),
        }
        save_json(arguments.result, portable(result))
        show(result["models"])


def searched(searcher: str, model: str, cell: Cell) -> dict[str, Any]:
    """Search, and pick the policy of every target."""
    start = time.monotonic()
    found = SEARCHERS[searcher](cell)
    picked = {f"{target:.2f}": best_of(found, target, cell) for target in dict.fromkeys(one.target for one in found)}
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


def measured(path: Path, weights: dict[str, str], train: ImageData, test: ImageData | None) -> dict[str, Any]:
    """A cell, with the scores in fp32 of what it picked: on the test images, or else on the development split."""
    found = load_json(path)
    file = path.parent / ("development" if test is None else "test") / path.name
    if not file.is_file():
        cell = Cell(found["model"], Path(weights[found["model"]]), train, found["seed"])
        cell.criterion = found["criterion"]
        scorer = cell.scorer(cell.development if test is None else test)
        policies = {target: picked["counts"] for target, picked in found["picked"].items() if picked}
        scores = {target: scorer(cell.policy(tuple(counts))) for target, counts in policies.items()}
        dense = cell.cost_model.dense.macs
        save_json(file, {name: {**score.to_json(), "macs": score.cost.macs / dense} for name, score in scores.items()})
    return {**{key: value for key, value in found.items() if key != "found"}, "measured": load_json(file)}


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
