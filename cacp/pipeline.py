"""What the entry points share: exit statuses, the run folder, the device, the data, the workbench of a search.

This is where an `Experiment` becomes the plain arguments that the library takes.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacp import latency_table
from cacp.budget import check_reachable
from cacp.checkpoint import load_json, save_json
from cacp.config import differences, save_config, stage_keys
from cacp.cost import CostModel
from cacp.data import MEMORY_LIMIT_BYTES, ImageData, Splits, load_dataset, make_splits, normalise
from cacp.dense import DenseModel, checked_top1, import_weights, load_dense, published_weights
from cacp.environment import device_name, environment
from cacp.evaluation import device_of, resolve_precision
from cacp.experiment import IDENTITY, POLICY, TRAINING, Experiment
from cacp.exporting import load_architecture, load_pruned
from cacp.graph import trace, traced
from cacp.history import Episode
from cacp.importance import channel_importance, channel_orders
from cacp.locking import is_fresh, only_writer
from cacp.models import build_model
from cacp.own import is_own
from cacp.parallel import launched
from cacp.profiling import Profile
from cacp.recipe import Recipe
from cacp.reporting import console, show_latency_table
from cacp.schema import ChannelGroups, Normalisation, Policy, Score, UserError
from cacp.scoring import CALIBRATION_BATCH, PolicyScorer
from cacp.side_by_side import beside, place
from cacp.slicing import counts_policy
from cacp.timing import measure_table, stored_table

GRADIENT_IMAGES = 10_000  # training images of the criterion taylor


# run folder -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_run(experiment: Experiment) -> Iterator[None]:
    """Hold the run folder, a new one or one to go on with, for writing; writes config.yaml and environment.json.

    Raises:
        UserError: if the folder holds something else, or stages made with other settings, or is in use.
    """
    folder = experiment.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; choose another --output")
    if folder.is_dir() and not is_fresh(folder) and not (folder / "config.yaml").is_file():
        raise UserError(f"output {folder} is not empty and holds no run (no config.yaml); choose another --output")
    with only_writer(folder):
        _begin(experiment)
        yield


def _begin(experiment: Experiment) -> None:
    """Refuse other settings than those of stages that are done or begun, and write the present ones down."""
    folder = experiment.folder
    made = {
        IDENTITY: ("dense/result.json", "dense/checkpoint"),
        TRAINING: ("dense/result.json", "dense/checkpoint"),
        POLICY: ("search/checkpoint", "policies", "method", "unstructured"),
    }
    done = [stage for stage, parts in made.items() if any((folder / part).exists() for part in parts)]
    _refuse_differences(experiment, done)
    save_config(experiment, begun=bool(done))
    _record_environment(folder / "environment.json", environment(experiment.seed))


def _record_environment(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the list of environments and commands that made a run, unless it is there."""
    entries = load_json(path, [{}]) if path.is_file() else []
    if entry not in entries:
        save_json(path, [*entries, entry])


def check_run(experiment: Experiment) -> None:
    """Refuse settings, for a stage that only reads the run folder, that its policies were not made with.

    Raises:
        UserError: listing them.
    """
    _refuse_differences(experiment, [IDENTITY, POLICY])


def _refuse_differences(experiment: Experiment, stages: list[str]) -> None:
    folder = experiment.folder
    different = differences(experiment, stage_keys(stages), folder)
    if different:
        raise UserError(
            f"output {folder} holds a run with other settings:\n  "
            + "\n  ".join(different)
            + f"\nuse the same settings, another --output, or delete {folder} to begin anew"
        )


# device and data ------------------------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """The device of `--device`: auto takes the GPU where there is one. Processes side by side share the GPUs out.

    Raises:
        UserError: for an unknown name, a GPU that is not there, or one for all processes of torchrun.
    """
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: scores are compared to half a point
    if name == "auto":
        return select_device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, but got {name!r}")
    if index and launched() > 1:
        raise UserError(f"under torchrun each process has a GPU of its own; use --device cuda, but got {name}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device {name} is not there: torch sees {count} CUDA devices; use --device cpu or auto")
    return torch.device("cuda", place() % count) if name == "cuda" and beside() > 1 else torch.device(name)


def load_splits(experiment: Experiment) -> Splits:
    """Training, validation, holdout and calibration images; the test set stays closed."""
    train, val = load_images(experiment, "train"), load_images(experiment, "val")
    assert train is not None
    return make_splits(train, val, experiment.validation_images, experiment.calibration_images, experiment.seed)


def load_images(experiment: Experiment, split: str) -> ImageData | None:
    """A split of the experiment's data set; training images stay in their files where crops of any size are cut out."""
    limit = 0 if experiment.crops and split == "train" else MEMORY_LIMIT_BYTES
    folder = Path(experiment.data_dir)
    return load_dataset(experiment.dataset, split, folder, experiment.image_size, limit, experiment.workers)


def load_inputs(experiment: Experiment) -> Splits:
    """The splits; and the published weights are on disk where the experiment asks for them.

    Raises:
        UserError: listing all that is missing, data and weights.
    """
    missing: list[str] = []
    splits: Splits | None = None
    try:
        splits = load_splits(experiment)
    except UserError as error:
        missing.append(str(error))
    if experiment.weights == "published":
        try:
            published_weights(experiment)
        except UserError as error:
            missing.append(str(error))
    if missing or splits is None:
        raise UserError("\n".join(missing))
    return splits


def check_targets(experiment: Experiment, splits: Splits) -> None:
    """Refuse targets that no policy can meet, before the dense model is trained; weights do not change a latency.

    Raises:
        UserError: with the reachable range.
    """
    model = build_model(experiment.model, len(splits.train.classes), seed=experiment.seed, importing=True)
    model = model.to(select_device(experiment.device)).to(memory_format=torch.channels_last).eval()
    groups, _ = timed_groups(experiment, model, splits.train.image_shape)
    cost_model = CostModel(groups)
    for budget in experiment.budgets:
        check_reachable(cost_model, budget)


def channel_groups(experiment: Experiment, model: nn.Module, example: Tensor) -> ChannelGroups:
    """The groups of a model, as the experiment wants them pruned."""
    multiple = experiment.channel_multiple
    return trace(model, example, experiment.pruned_scope, experiment.ignore, experiment.min_keep, multiple)


def timed_groups(
    experiment: Experiment, model: nn.Module, image_shape: tuple[int, int, int], any_device: bool = False
) -> tuple[ChannelGroups, latency_table.LatencyTable | None]:
    """The groups of a model; where latency is a target with the run's table of it, which is measured if there is none.

    Args:
        experiment: of the run, whose folder is held.
        model: dense, on its device, channels last.
        image_shape: (C, H, W).
        any_device: take a table that was measured elsewhere.

    Raises:
        UserError: for a table that does not fit, or that is missing beside what was made with it.
    """
    example = torch.zeros(1, *image_shape, device=device_of(model))
    groups = channel_groups(experiment, model, example)
    if experiment.latency is None:
        return groups, None
    path, device = experiment.folder / latency_table.FILE, device_name(device_of(model))
    table = stored_table(path, experiment.latency_batch, image_shape, None if any_device else device)
    if table is None:
        begun = [part for part in ("policies", "method", "search/checkpoint") if (experiment.folder / part).exists()]
        if begun:
            raise UserError(
                f"{path} is missing, and what {experiment.folder} holds was made with it ({', '.join(begun)}); restore "
                "it, or delete these to begin anew"
            )
        console.print(f"timing the layers of {experiment.model}, once, for {path}")
        table = measure_table(model, groups, image_shape, experiment.latency_batch, device)
        save_json(path, table.to_json())
        show_latency_table(table)
    return table.applied(groups, traced(model, example).graph, str(path)), table


def load_exported(experiment: Experiment, folder: Path) -> nn.Module:
    """`load_pruned` for a folder of the run; a network of the user's own is built by the name in the run's settings,
    never by the one in the file."""
    if not is_own(experiment.model):
        return load_pruned(folder)
    classes = len(load_architecture(folder).classes)
    return load_pruned(folder, lambda: build_model(experiment.model, classes, seed=0, importing=True))


def training_recipe(experiment: Experiment, epochs: int, lr: float | None, schedule: str) -> Recipe:
    """How pretrain and finetune train: they share everything but these three."""
    return Recipe(
        epochs=epochs,
        lr=lr,
        weight_decay=experiment.weight_decay,
        batch_size=experiment.batch_size,
        schedule=schedule,
        padding=experiment.crop_padding,
        flip=experiment.flip,
        resized_crop=experiment.crops,
        precision=experiment.precision,
    )


def finetuning_recipe(experiment: Experiment) -> Recipe:
    """How finetune trains: taught by the dense model, unless the settings say otherwise."""
    epochs, lr, schedule = experiment.finetune_epochs, experiment.finetune_lr, experiment.finetune_schedule
    return replace(training_recipe(experiment, epochs, lr, schedule), distillation=experiment.finetune_distillation)


# search subject -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workbench:
    """Everything that turns keep counts into a score, for one experiment."""

    dense: DenseModel
    groups: ChannelGroups
    cost_model: CostModel
    scorer: PolicyScorer  # on the validation images, in the precision of the search
    rescorer: PolicyScorer  # on the holdout images, fp32, batch norm recalibrated on all calibration images
    splits: Splits
    seed: int
    table: latency_table.LatencyTable | None  # where latency is a target
    _importance: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def retrained(self, weights: Mapping[str, Tensor]) -> Workbench:
        """The same for the full-size weights that a method has trained for a policy.

        Raises:
            UserError: if they are not those of the network.
        """
        model = copy.deepcopy(self.dense.model)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"a method's weights must be a state dict of the dense network: {error}") from error
        return replace(self, scorer=self.scorer.retrained(model), rescorer=self.rescorer.retrained(model))

    def importance(self, criterion: str) -> dict[str, Tensor]:
        """Channel scores, by each criterion computed once."""
        if criterion not in self._importance:
            model = self.dense.model
            batches = criterion_batches(criterion, self.splits, self.dense.normalisation, device_of(model))
            self._importance[criterion] = channel_importance(model, self.groups, criterion, batches, self.seed)
        return self._importance[criterion]


def criterion_batches(
    criterion: str, splits: Splits, normalisation: Normalisation, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training images (B, C, H, W), normalised, and labels (B,), for a criterion that needs them: as many as
    calibrate batch norm; for gradients, which differ much from batch to batch, GRADIENT_IMAGES; for gfi all of them,
    class after class.
    """
    data = splits.calibration
    parts = [torch.arange(len(data))]
    if criterion == "taylor":
        data, parts = splits.train, [torch.arange(min(GRADIENT_IMAGES, len(splits.train)))]
    if criterion == "gfi":
        data = splits.train
        parts = [(data.labels == label).nonzero().flatten() for label in data.labels.unique()]
    for indices in itertools.chain.from_iterable(part.split(CALIBRATION_BATCH) for part in parts):
        yield normalise(data.batch(indices), normalisation, device), data.labels[indices].to(device)


def build_workbench(experiment: Experiment, profile: Profile | None = None, any_device: bool = False) -> Workbench:
    """Load data and dense model, trace, and prepare both scorers; `profile` watches the one of the search, `any_device`
    takes a latency table that was measured elsewhere.
    """
    device = select_device(experiment.device)
    splits = load_inputs(experiment)
    if experiment.weights != "train" and not (experiment.folder / "dense" / "result.json").is_file():
        import_weights(experiment, splits, device)
    dense = load_dense(experiment, splits, device)
    checked_top1(dense.model, splits, dense.normalisation)
    groups, table = timed_groups(experiment, dense.model, dense.image_shape, any_device)
    precision = resolve_precision(experiment.precision, device)
    calibration, normalisation = splits.calibration, dense.normalisation
    few = min(experiment.search_calibration_images or len(calibration), len(calibration))
    searching = calibration.subset(torch.arange(few))
    model = dense.model
    return Workbench(
        dense=dense,
        groups=groups,
        cost_model=CostModel(groups),
        scorer=PolicyScorer(model, groups, splits.validation, searching, normalisation, precision, profile),
        rescorer=PolicyScorer(model, groups, splits.holdout, calibration, normalisation),
        splits=splits,
        seed=experiment.seed,
        table=table,
    )


class Ranked:
    """A workbench with the channels of every group ranked by a criterion: keep counts -> policy -> score."""

    def __init__(self, bench: Workbench, criterion: str) -> None:
        self.bench = bench
        self._criterion = criterion
        self._orders = channel_orders(bench.importance(criterion))

    def policy(self, counts: tuple[int, ...]) -> Policy:
        return counts_policy(self.bench.groups, counts, self._orders, self._criterion)

    def score(self, counts: tuple[int, ...]) -> Score:
        return self.bench.scorer(self.policy(counts))

    def recall(self, episodes: Iterable[Episode], path: Path) -> None:
        """Take over the scores of episodes that were read from `path`: no policy is scored twice over a resume.

        Raises:
            UserError: if they are not of this network.
        """
        for episode in episodes:
            counts, score, number = episode.candidate
            if not self.bench.cost_model.fits(counts, score.cost):
                of = "network" if self.bench.table is None else "network, or was played with another latency table"
                raise UserError(f"{path}: episode {number} is not of this {of}; restore it or use another --output")
            self.bench.scorer.remember(self.policy(counts), score)

    def rescore(self, counts: tuple[int, ...]) -> Score:
        return self.bench.rescorer(self.policy(counts))
