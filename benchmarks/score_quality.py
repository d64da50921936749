"""What a score should be: which number, measured before fine-tuning, ranks policies as their fine-tuned accuracy does.

    python -m benchmarks.score_quality RUN --work FOLDER --result results/score_quality.json

RUN is a finished search. Of each of its targets, policies spread evenly over its episodes (random ones first, then ever
better ones) are scored on the validation images in every way below, then fine-tuned for one epoch over some training
images and judged on others, that nothing else uses. A policy's figures are a file in FOLDER; those there are not made
again.

A way is a network and a number. Networks: stale (batch norm as it was), fresh (recalibrated), repaired (weights fitted
by least squares, then recalibrated). Numbers, the higher the better: top1, minus the loss, the mean probability of the
true class, agreement with the dense network's answers, minus the divergence (KL) from its outputs.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from benchmarks.fewer_images import batches_of, experiment_of, spread_over
from benchmarks.summarise import portable
from cacp.checkpoint import load_json, save_json
from cacp.command import run_command
from cacp.data import ImageData, Splits
from cacp.environment import environment
from cacp.evaluation import answer_sums, autocast, device_of, evaluate_data, recalibrate_batchnorm, resolve_precision
from cacp.experiment import Experiment
from cacp.history import Episode
from cacp.importance import channel_orders
from cacp.pipeline import Workbench, build_workbench, load_splits
from cacp.recipe import Recipe
from cacp.repair import Repair
from cacp.reporting import ProgressLine
from cacp.schema import Policy
from cacp.scoring import CALIBRATION_BATCH, EVALUATION_BATCH
from cacp.slicing import counts_policy, slice_model
from cacp.training import fit

IMAGES = (250, 500, 1000, 2000)  # of the validation images
JUDGING = 10_000  # training images that judge the fine-tuned networks
RECIPE = {"epochs": 1, "lr": 0.01, "batch_size": 128, "schedule": "cosine"}
RESAMPLES = 2000  # of the policies, for intervals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished search")
    parser.add_argument("--policies", type=int, default=24, help="of each target")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--images", type=int, default=12800, help="training images of a fine-tuning")
    parser.add_argument("--work", required=True, type=Path, help="folder of a file a policy")
    parser.add_argument("--result", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    experiment = experiment_of(arguments.run)
    episodes = chosen_episodes(arguments.run, arguments.targets, arguments.policies)
    measured = Measurement(experiment, arguments.images)
    rows = []
    with ProgressLine("policies", len(episodes)) as progress:
        for episode in episodes:
            path = arguments.work / f"{episode.episode:04d}.json"
            if not path.is_file():
                save_json(path, measured.row(episode))
            rows.append(load_json(path))
            progress.advance("")
    result = {
        "finetuning": {**RECIPE, "images": arguments.images, "judging_images": JUDGING},
        "targets": {f"{target:.2f}": summed_up(rows, target) for target in arguments.targets},
        "policies": rows,
        "environment": environment(experiment.seed),
    }
    save_json(arguments.result, portable(result))
    for target, summary in result["targets"].items():
        print(target, *(f"\n  {way}: {value}" for way, value in summary["ways"].items()))


def chosen_episodes(run: Path, targets: list[float], policies: int) -> list[Episode]:
    """Episodes with different policies, as many of each target, evenly over the search."""
    with (run / "search" / "episodes.csv").open(newline="") as file:
        episodes = [Episode.from_row(row) for row in csv.DictReader(file)]
    different = {episode.counts: episode for episode in reversed(episodes) if episode.target in targets}
    found = sorted(different.values(), key=lambda episode: episode.episode)
    return [found[index] for index in spread_over(np.array([e.target for e in found]), policies * len(targets))]


class Measurement:
    """Scores a policy in all ways, fine-tunes and judges it."""

    def __init__(self, experiment: Experiment, images: int) -> None:
        self._experiment = experiment
        self._bench: Workbench = build_workbench(experiment)
        self._splits: Splits = load_splits(experiment)
        dense, few = self._bench.dense, experiment.search_calibration_images or experiment.calibration_images
        self._model, self._device = dense.model, device_of(dense.model)
        train = self._splits.train  # the first are the calibration images
        self._training = train.subset(torch.arange(few, few + images))
        self._judging: ImageData = train.subset(torch.arange(len(train) - JUDGING, len(train)))
        assert few + images <= len(train) - JUDGING, "the fine-tuning's images would judge it"
        self._orders = channel_orders(self._bench.importance(experiment.criterion))
        self._calibration = torch.cat(batches_of(self._bench, self._splits.calibration, CALIBRATION_BATCH))[:few]
        self._validation = batches_of(self._bench, self._splits.validation, EVALUATION_BATCH)
        self._precision = resolve_precision(experiment.precision, self._device)
        self._repair = Repair(self._model, self._bench.groups, self._calibration)
        self._dense_logits = self._logits(self._model)

    def row(self, episode: Episode) -> dict[str, Any]:
        policy = counts_policy(self._bench.groups, episode.counts, self._orders, self._experiment.criterion)
        networks = {
            "stale": self._sliced(policy),
            "fresh": self._recalibrated(self._sliced(policy)),
            "repaired": self._recalibrated(self._repaired(policy)),
        }
        labels = self._splits.validation.labels.to(self._device)
        scores = {
            f"{name} {number} {count}": value
            for name, network in networks.items()
            for logits in [self._logits(network)]
            for count in IMAGES
            if count <= len(labels)
            for number, value in numbers(logits[:count], labels[:count], self._dense_logits[:count]).items()
        }
        row = {"episode": episode.episode, "target": episode.target, "counts": list(episode.counts), "scores": scores}
        for name in ("fresh", "repaired"):
            row[f"after_{name}"] = self._finetuned(networks[name])
        return row

    def _sliced(self, policy: Policy) -> nn.Module:
        return slice_model(self._model, self._bench.groups, policy).to(memory_format=torch.channels_last).eval()

    def _repaired(self, policy: Policy) -> nn.Module:
        model = self._sliced(policy)
        self._repair(model, policy)
        return model

    def _recalibrated(self, model: nn.Module) -> nn.Module:
        with autocast(self._device, self._precision):
            recalibrate_batchnorm(model, self._calibration, CALIBRATION_BATCH)
        return model.eval()

    @torch.inference_mode()
    def _logits(self, model: nn.Module) -> Tensor:
        """(V, classes) on the validation images."""
        with autocast(self._device, self._precision):
            return torch.cat([model(batch) for batch in self._validation]).float()

    def _finetuned(self, model: nn.Module) -> dict[str, float]:
        recipe = Recipe(**RECIPE, precision=self._experiment.precision)
        normalisation = self._bench.dense.normalisation
        for _ in fit(model, self._training, None, normalisation, recipe, self._experiment.seed):
            pass
        return evaluate_data(model.eval(), self._judging, normalisation)._asdict()


def numbers(logits: Tensor, labels: Tensor, dense: Tensor) -> dict[str, float]:
    """Candidate scores of outputs (V, classes), the higher the better; `dense` are the dense network's."""
    top1, nats, probability = (answer_sums(logits, labels) / len(labels)).tolist()
    divergence = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "top1": top1,
        "loss": -nats,
        "probability": probability,
        "agreement": float((logits.argmax(1) == dense.argmax(1)).float().mean()),
        "divergence": -float(divergence),
    }


def summed_up(rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Rank correlations of every way with the accuracy after fine-tuning, of the policies of one target."""
    own = [row for row in rows if row["target"] == target]
    after = {name: np.array([row[f"after_{name}"]["top1"] for row in own]) for name in ("fresh", "repaired")}
    ways = own[0]["scores"].keys()
    return {
        "policies": len(own),
        "top1_after": {name: [float(values.mean()), float(values.std(ddof=1))] for name, values in after.items()},
        "repaired_minus_fresh_after": float((after["repaired"] - after["fresh"]).mean()),
        "ways": {
            way: correlated(
                np.array([row["scores"][way] for row in own]), after["repaired" if "repaired" in way else "fresh"]
            )
            for way in ways
        },
    }


def correlated(scores: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Kendall's and Spearman's correlation of (P,) and (P,), with 95 % intervals from resampled policies."""
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, function in (("kendall", stats.kendalltau), ("spearman", stats.spearmanr)):
        draws = [generator.integers(len(scores), size=len(scores)) for _ in range(RESAMPLES)]
        resampled = [function(scores[draw], after[draw])[0] for draw in draws]
        found[name] = round(float(function(scores, after)[0]), 3)
        found[f"{name}_interval"] = [round(float(end), 3) for end in np.nanpercentile(resampled, [2.5, 97.5])]
    return found


if __name__ == "__main__":
    run_command(main)
