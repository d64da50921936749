"""A cell of `benchmarks.search_quality`: a network, its images, and a purse that every score is paid from."""

from __future__ import annotations

import argparse
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cacp.cost import CostModel
from cacp.data import ImageData, load_dataset, make_splits, stratified_order
from cacp.evaluation import device_of, resolve_precision
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.models import build_model
from cacp.models.weights import load_weights
from cacp.pipeline import criterion_batches
from cacp.schema import ChannelGroups, Normalisation, Policy, Score, UserError
from cacp.scoring import PolicyScorer
from cacp.slicing import counts_policy

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
BETWEEN = (0.35, 0.45, 0.55, 0.65)  # never searched by ours: one planned policy each, against 100 random ones
CALIBRATION, DEVELOPMENT = 512, 5000  # images
PURSE = 100 * (1000 + CALIBRATION)  # images a target that the policies of a cell may be run on
DEVELOPMENT_SEED = 12345
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of the weights

Counts = tuple[int, ...]


class Found(NamedTuple):
    """A policy that was scored for a target: keep counts of the prunable groups, and what it is picked by."""

    target: float
    counts: Counts
    value: float


class Spending(NamedTuple):
    """What a purse goes to: policies a target, each scored on so many validation images.

    Raises:
        UserError: by `check`, where the purse has less.
    """

    policies: int = 100
    validation: int = 1000

    def check(self) -> Spending:
        images = self.policies * (self.validation + CALIBRATION)
        if min(self) < 1 or images > PURSE:
            raise UserError(
                f"{self.policies} policies on {self.validation} + {CALIBRATION} images are {images} a target, "
                f"and a purse has {PURSE}; use fewer policies or --validation images"
            )
        return self


class Cell:
    """A network, its images and the purse of one cell."""

    def __init__(
        self, model: str, weights: Path, train: ImageData, seed: int, spending: Spending | None = None
    ) -> None:
        self.spending = spending or Spending()
        self.development, rest = development_split(train)
        splits = make_splits(rest, None, self.spending.validation, CALIBRATION, seed)
        self.splits = splits  # the development split is in none of them
        device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
        self.model = build_model(model, len(train.classes), seed=0)
        load_weights(self.model, weights)
        self.model.eval().to(device, memory_format=torch.channels_last)
        self.groups: ChannelGroups = trace(self.model, torch.zeros(1, *train.image_shape, device=device), "inner")
        self.cost_model = CostModel(self.groups)
        self._orders: dict[str, dict[str, torch.Tensor]] = {}
        self.seed = seed
        self.scored = 0
        self.purse = self.spending.policies * len(TARGETS)
        self.criterion = "reconstruction"
        self.forgiven = 0.0  # of the dense MACs, above a target

    @cached_property
    def scorer_of_policies(self) -> PolicyScorer:
        """On the validation images, as a search scores."""
        return self.scorer(self.splits.validation, resolve_precision("auto", device_of(self.model)))

    def scorer(self, images: ImageData, precision: torch.dtype = torch.float32) -> PolicyScorer:
        return PolicyScorer(self.model, self.groups, images, self.splits.calibration, NORMALISATION, precision)

    def policy(self, counts: Counts) -> Policy:
        if self.criterion not in self._orders:
            self._orders[self.criterion] = channel_orders(self.importance(self.criterion))
        return counts_policy(self.groups, counts, self._orders[self.criterion], self.criterion)

    def score(self, counts: Counts) -> Score:
        """Of one policy, paid from the purse."""
        self._pay()
        return self.scorer_of_policies(self.policy(counts))

    def stale_top1(self, counts: Counts) -> float:
        """Top-1 of repaired weights without recalibration, paid likewise."""
        self._pay()
        return self.scorer_of_policies.evaluate(self.scorer_of_policies.repaired(self.policy(counts))).top1

    def _pay(self) -> None:
        self.scored += 1
        assert self.scored <= self.purse, "the purse is empty"

    def importance(self, criterion: str) -> dict[str, torch.Tensor]:
        """Channel scores."""
        batches = criterion_batches(criterion, self.splits, NORMALISATION, device_of(self.model))
        return channel_importance(self.model, self.groups, criterion, batches, self.seed)


def policy_hash(policy: Policy) -> str:
    """Eight digits that tell policies apart."""
    return hashlib.sha256(repr(sorted(policy.keep.items())).encode()).hexdigest()[:8]


def development_split(train: ImageData) -> tuple[ImageData, ImageData]:
    """5,000 training images, the same for all cells, and the rest."""
    order = stratified_order(train.labels, torch.Generator().manual_seed(DEVELOPMENT_SEED))
    return train.subset(order[:DEVELOPMENT]), train.subset(order[DEVELOPMENT:])


class Inputs(NamedTuple):
    """What the command line names: weights by model, and images; test images only where these judge."""

    weights: dict[str, Path]
    train: ImageData
    test: ImageData | None


def load_inputs(arguments: argparse.Namespace) -> Inputs:
    """The inputs of `cell_arguments`."""
    weights = {model: Path(file) for model, file in (pair.split("=", 1) for pair in arguments.weights)}
    train = load_dataset(arguments.dataset, "train", arguments.data_dir)
    judging = arguments.judge == "test"
    return Inputs(weights, train, load_dataset(arguments.dataset, "test", arguments.data_dir) if judging else None)


def cell_of(found: dict[str, Any], inputs: Inputs) -> Cell:
    """The cell that something was found in."""
    spending = Spending(found["made_with"]["policies_a_target"], found["made_with"]["validation"])
    return Cell(found["model"], inputs.weights[found["model"]], inputs.train, found["seed"], spending)


def cell_arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every command on cells takes; see `benchmarks.search_quality`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--weights", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", required=True, type=Path, help="folder of a file a cell")
    parser.add_argument("--judge", choices=("development", "test"), help="images that judge what was found")
    parser.add_argument("--result", type=Path, help="JSON file for what is measured")
    return parser
