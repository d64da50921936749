"""How well scores from fewer images rank policies, and what becomes of the policies that a search finds with them.

    python -m benchmarks.fewer_images RUN --searches MANY FEW [MANY FEW ...] --result results/fewer_images.json

RUN is a finished search. All of its policies are scored as it did, and some, spread over all its episodes, with each
number of calibration images; their answers on every validation image are kept. From these come, for each target:

- Spearman's and Kendall's correlation of top-1 with that of all calibration images, Spearman's with its 95 % interval
  (Fisher's transformation, standard error 1.03 / sqrt(P - 3)); also among the best third of the policies;
- the same for fewer validation images;
- races: a policy is dropped after a round of images if the upper bound of its top-1 minus that of the K-th best so far,
  on the images seen, lies below 0 (mean difference + z standard errors); its score is the other's plus that difference.

--searches are pairs of runs of equal seeds, with all calibration images and with few: top-1 of their policies on the
images that did not choose them.

Letters: E episodes, P policies, V validation images.
"""

import argparse
import csv
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.speed_summary import by_target, rank_correlations
from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.command import run_command
from cacp.data import ImageData, normalise
from cacp.environment import environment
from cacp.evaluation import device_of, resolve_precision
from cacp.experiment import Experiment
from cacp.fusion import FusedNetwork
from cacp.history import Episode
from cacp.importance import channel_orders
from cacp.pipeline import Workbench, build_workbench, load_splits
from cacp.policies import load_policies
from cacp.reporting import ProgressLine
from cacp.schema import UserError
from cacp.scoring import CALIBRATION_BATCH, EVALUATION_BATCH, Threads
from cacp.slicing import counts_policy

BATCHES = (8, 4, 2, 1)  # of CALIBRATION_BATCH images; the first are all
VALIDATION = (250, 500, 1000, 1500)  # images
RACES = tuple(itertools.product((1, 3, 10), (1.5, 2.0, 3.0), (250, 500)))  # K, z, images of a round


class Answers(NamedTuple):
    """Right or wrong of policies on every validation image, in the order of their episodes."""

    targets: np.ndarray  # (E,)
    right: np.ndarray  # (E, V) of 0 and 1, calibrated as the search did
    spread: np.ndarray  # (P,) of the episodes
    right_by_batches: dict[int, np.ndarray]  # (P, V) by the number of calibration batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished search")
    parser.add_argument("--policies", type=int, default=300, help="scored with each number of calibration images")
    parser.add_argument("--searches", nargs="*", type=Path, default=[], help="run folders: MANY FEW MANY FEW ...")
    parser.add_argument("--result", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if len(arguments.searches) % 2:
        parser.error("--searches takes pairs of runs: MANY FEW MANY FEW ...")
    searches = [compared(*pair) for pair in zip(arguments.searches[::2], arguments.searches[1::2], strict=True)]
    experiment = experiment_of(arguments.run)
    result = {
        **summed_up(collected(experiment, arguments.policies)),
        "searches": searches,
        "environment": environment(experiment.seed),
    }
    save_json(arguments.result, portable(result))
    for name, value in result.items():
        print(name, value)


def summed_up(answers: Answers) -> dict[str, Any]:
    targets = answers.targets[answers.spread]
    by_images = {count * CALIBRATION_BATCH: right.mean(1) for count, right in answers.right_by_batches.items()}
    full = by_images[max(by_images)]
    best = best_third(targets, full)
    own = answers.right.mean(1)
    return {
        "episodes": len(answers.targets),
        "policies": len(targets),
        "top1": {name: [float(part.mean()), float(part.std())] for name, part in by_target(targets, full).items()},
        "calibration": {str(count): correlations(targets, full, scores) for count, scores in by_images.items()},
        "calibration_best_third": {
            str(count): correlations(targets[best], full[best], scores[best]) for count, scores in by_images.items()
        },
        "validation": {
            str(count): correlations(answers.targets, own, answers.right[:, :count].mean(1)) for count in VALIDATION
        },
        "races": [raced(answers.targets, answers.right, *race) for race in RACES],
    }


def experiment_of(run: Path) -> Experiment:
    return Experiment(**{**yaml.safe_load((run / "config.yaml").read_text()), "output": str(run)})


def collected(experiment: Experiment, policies: int) -> Answers:
    """Score all policies of a run, and some of them, spread evenly over its episodes, with fewer and more images."""
    bench, splits = build_workbench(experiment), load_splits(experiment)
    network = FusedNetwork(
        bench.dense.model, bench.dense.example, resolve_precision(experiment.precision, device_of(bench.dense.model))
    )
    calibration = batches_of(bench, splits.calibration, CALIBRATION_BATCH)
    validation = batches_of(bench, splits.validation, EVALUATION_BATCH)
    own = math.ceil((experiment.search_calibration_images or len(splits.calibration)) / CALIBRATION_BATCH)
    with (experiment.folder / "search" / "episodes.csv").open(newline="") as file:
        episodes = [Episode.from_row(row) for row in csv.DictReader(file)]
    targets = np.array([episode.target for episode in episodes])
    spread = spread_over(targets, policies)
    orders = channel_orders(bench.importance(experiment.criterion))
    rows: dict[int, list[np.ndarray]] = {count: [] for count in (*BATCHES, 0)}  # 0: as the search did
    threads = Threads(device_of(bench.dense.model), len(validation))
    with ProgressLine("policies", len(episodes)) as progress:
        for index, episode in enumerate(episodes):
            policy = counts_policy(bench.groups, episode.counts, orders, experiment.criterion)
            network.load(bench.scorer.repaired(policy))
            counts = BATCHES if index in spread else ()
            moments = threads.map(network.moments, calibration[: max(own, *counts, 0)])
            for count in (0, *counts):
                network.set_statistics(moments[: count or own])
                given = torch.cat(threads.map(network, validation)).argmax(1).cpu()
                rows[count].append((given == splits.validation.labels).numpy().astype(float))
            progress.advance("")
    by_batches = {count: np.stack(rows[count]) for count in BATCHES}
    return Answers(targets, np.stack(rows[0]), spread, by_batches)


def spread_over(targets: np.ndarray, policies: int) -> np.ndarray:
    """Positions (P,), ascending, of as many policies of every target, evenly over its episodes; targets: (E,)."""
    different = sorted(set(targets.tolist()))
    parts = [np.flatnonzero(targets == target) for target in different]
    chosen = [part[np.linspace(0, len(part) - 1, policies // len(parts)).astype(int)] for part in parts]
    return np.sort(np.concatenate(chosen))


def batches_of(bench: Workbench, data: ImageData, size: int) -> list[Tensor]:
    """Batches (B, C, H, W) of a set, normalised, channels last in memory."""
    device = device_of(bench.dense.model)
    return [
        normalise(data.batch(part), bench.dense.normalisation, device).contiguous(memory_format=torch.channels_last)
        for part in torch.arange(len(data)).split(size)
    ]


def best_third(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(P,) bool: the policies among the best third of their target, by scores (P,)."""
    chosen = np.zeros(len(scores), dtype=bool)
    for target in set(targets.tolist()):
        positions = np.flatnonzero(targets == target)
        chosen[positions[np.argsort(-scores[positions], kind="stable")[: max(1, len(positions) // 3)]]] = True
    return chosen


def correlations(targets: np.ndarray, full: np.ndarray, other: np.ndarray) -> dict[str, dict[str, Any]]:
    """Rank correlations of two scores (P,), within each target and over all."""
    parts = by_target(targets, np.stack([full, other], 1)) | {"all": np.stack([full, other], 1)}
    return {name: with_interval(rank_correlations(*part.T), len(part)) for name, part in parts.items()}


def with_interval(found: dict[str, float | None], policies: int) -> dict[str, Any]:
    """Rounded, and Spearman's 95 % interval where there is one."""
    spearman = found["spearman"]
    rounded: dict[str, Any] = {name: None if value is None else round(value, 3) for name, value in found.items()}
    if spearman is None or policies <= 3 or abs(spearman) > 1 - 1e-9:
        return rounded
    half = 1.96 * 1.03 / math.sqrt(policies - 3)
    ends = (math.tanh(math.atanh(spearman) + side * half) for side in (-1, 1))
    return rounded | {"spearman_interval": [round(end, 3) for end in ends]}


def raced(targets: np.ndarray, right: np.ndarray, best: int, errors: float, step: int) -> dict[str, Any]:
    """Rank correlation of a race's top-1 with that of all images, and the part of the images that it needs."""
    scores, used = np.zeros(len(targets)), np.zeros(len(targets))
    for target in set(targets.tolist()):
        leaders: list[np.ndarray] = []  # answers of the best so far, the best first
        for index in np.flatnonzero(targets == target):
            rival = leaders[best - 1] if len(leaders) >= best else None
            seen = images_needed(right[index], rival, errors, step)
            scores[index], used[index] = right[index, :seen].mean(), seen
            if seen == right.shape[1]:
                leaders = sorted([*leaders, right[index]], key=lambda row: -row.mean())[:best]
            elif rival is not None:
                scores[index] += rival.mean() - rival[:seen].mean()  # its images may have been easy ones
    return {
        "best": best,
        "standard_errors": errors,
        "images_a_round": step,
        "part_of_images": float(used.mean() / right.shape[1]),
        "correlations": correlations(targets, right.mean(1), scores),
    }


def images_needed(own: np.ndarray, rival: np.ndarray | None, errors: float, step: int) -> int:
    """Images after which a policy is dropped; all where it is not. own, rival: (V,) of 0 and 1."""
    for seen in range(step, len(own), step) if rival is not None else ():
        difference = own[:seen] - rival[:seen]
        if difference.mean() + errors * difference.std(ddof=1) / seen**0.5 < 0:
            return seen
    return len(own)


def compared(many: Path, few: Path) -> dict[str, Any]:
    """Top-1 on the images that did not choose them, of the policies of two searches that differ in calibration only."""
    runs = {name: experiment_of(run) for name, run in (("many", many), ("few", few))}
    settings = [{**vars(run), "search_calibration_images": None, "output": None} for run in runs.values()]
    if settings[0] != settings[1]:
        raise UserError(f"{many} and {few} must differ in search_calibration_images only")
    found = {
        name: {record.budget.name: record.score.top1 for record in load_policies(experiment.folder)}
        for name, experiment in runs.items()
    }
    return {
        "seed": runs["many"].seed,
        "episodes": runs["many"].episodes,
        "images": {name: experiment.search_calibration_images for name, experiment in runs.items()},
        "top1": found,
        "points_few_minus_many": 100
        * statistics.mean(found["few"][budget] - found["many"][budget] for budget in found["many"]),
    }


if __name__ == "__main__":
    run_command(main)
