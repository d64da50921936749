"""The one flat, frozen `Experiment` that serves all commands: every setting of a run, with its default, what it shapes
and what it means. Values out of range are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents import AGENTS, WARMUP_EPISODES
from cacp.data import DATASETS
from cacp.evaluation import PRECISIONS
from cacp.graph import MIN_KEEP_RATIO, SCOPES
from cacp.importance import CRITERIA, DISTANCES
from cacp.methods import METHOD_HELP, METHODS, known_method, method_entry
from cacp.models import MODEL_HELP, wrong_name
from cacp.ranges import quantile_list, range_ends
from cacp.schedules import SCHEDULE_HELP, is_schedule
from cacp.schema import COSTS, Budget, UserError
from cacp.shipping import FORMS

# What a setting shapes: who the dense model is and which images judge it, how networks are trained, the policies, the
# fine-tuning, or nothing but where and on what a command runs, and what it writes besides.
IDENTITY, TRAINING, POLICY, FINETUNE, MACHINE = "identity", "training", "policy", "finetune", "machine"
LARGEST_NUMBER, MOST_WORKERS = 2**32 - 1, 1024
TARGETS = (0.3, 0.5, 0.7)  # the paper's
_COSTS = "macs, params or latency"


def _setting(default: Any, stage: str, help: str) -> Any:
    return field(default=default, metadata={"stage": stage, "help": help})


@dataclass(frozen=True)
class Experiment:
    """Every setting of a run; `--help` explains each.

    Raises:
        UserError: listing every value outside its range.
    """

    output: str = _setting("", MACHINE, "run folder (default: runs/ and the name of the config file)")
    model: str = _setting("resnet56", IDENTITY, MODEL_HELP)
    weights: str = _setting(
        "train", IDENTITY, "train, published, a weights file (.safetensors, .pt, .pth, .th), or another run's folder"
    )
    dataset: str = _setting("digits", IDENTITY, f"one of {', '.join(DATASETS)}")
    data_dir: str = _setting("data", MACHINE, "folder of the data set; cifar10 and cifar100 are downloaded there")
    image_size: int | None = _setting(
        None, IDENTITY, "imagefolder, imagenet: resize and crop to this many pixels a side; imagenet: 224 by default"
    )
    workers: int | None = _setting(
        None, MACHINE, "imagefolder, imagenet: processes that decode images (default: one for each core, at most 16)"
    )
    mean: list[float] | None = _setting(
        None, IDENTITY, "a weights file: mean of the normalisation it expects, in [0, 1]"
    )
    std: list[float] | None = _setting(None, IDENTITY, "a weights file: standard deviation, likewise")
    validation_images: int = _setting(
        2000, IDENTITY, "images that score an episode; as many again score the best once more"
    )
    calibration_images: int = _setting(1024, IDENTITY, "training images for repair and batch norm")
    seed: int = _setting(0, IDENTITY, "of everything random")
    batch_size: int = _setting(256, TRAINING, "images in a training step, pretrain and finetune")
    weight_decay: float = _setting(1e-4, TRAINING, "of SGD, pretrain and finetune")
    flip: bool = _setting(True, TRAINING, "mirror training images at random; not for digits and letters")
    crop_padding: int = _setting(4, TRAINING, "pixels that a training image is shifted by at most")
    resized_crop: bool | None = _setting(
        None, TRAINING, "training images are random crops of any size, not shifted; default: for imagenet"
    )
    precision: str = _setting(
        "auto", TRAINING, "auto (bf16 where the device has it), fp32 or bf16; training and search"
    )
    device: str = _setting("auto", MACHINE, "auto, cpu, cuda or cuda:N")
    pretrain_epochs: int = _setting(200, TRAINING, "weights train: epochs of the dense model")
    pretrain_lr: float = _setting(0.1, TRAINING, "weights train: highest learning rate")
    pretrain_schedule: str = _setting("cosine", TRAINING, f"weights train: {SCHEDULE_HELP}")
    targets: list[float | str] = _setting(
        (),
        POLICY,
        "macs targets: kept fractions of the dense MACs, in (0, 1]; or a range, 0.3:0.8 (default: 0.3 0.5 0.7 where "
        "no other budget is given)",
    )
    macs: float | None = _setting(None, POLICY, "instead of targets, one budget: kept fraction of the dense MACs")
    params: float | None = _setting(None, POLICY, "kept fraction of the dense parameters; alone, or together with macs")
    latency: float | None = _setting(
        None, POLICY, "kept fraction of the dense latency on this device, by a table measured once; alone, or together"
    )
    latency_batch: int = _setting(64, POLICY, "latency: images in the batch that is timed")
    criterion: str = _setting("reconstruction", POLICY, f"ranks the channels: one of {', '.join(CRITERIA)}")
    scope: str | None = _setting(
        None, POLICY, "inner (channels inside a block) or all (residual streams too); default: the method's, else inner"
    )
    ignore: list[str] = _setting(
        (), POLICY, "channel groups that stay whole: patterns of their names, or of the layers that produce them"
    )
    min_keep: float = _setting(MIN_KEEP_RATIO, POLICY, "the least keep ratio of every group, in (0, 1]")
    channel_multiple: int = _setting(1, POLICY, "keep counts are multiples of this number, or all channels of a group")
    search_calibration_images: int | None = _setting(
        None, POLICY, "only so many of the calibration images for the scores of episodes (default: all of them)"
    )
    agent: str = _setting("cacp", POLICY, f"search: one of {', '.join(AGENTS)}; the others are prune.py --method")
    episodes: int = _setting(
        900, POLICY, "policies to score, all targets together; search, and prune --method sensitivity"
    )
    warmup_episodes: int = _setting(WARMUP_EPISODES, POLICY, "search: episodes drawn at random before the agent plans")
    method: str = _setting("uniform", POLICY, f"prune: {METHOD_HELP}")
    method_epochs: int | None = _setting(
        None, POLICY, "sfp, fpgm: epochs, 200 by default; gfi_ap: of retraining after every group, none by default"
    )
    method_lr: float | None = _setting(
        None, POLICY, "sfp, fpgm, caie, gfi_ap: learning rate; 0.1, 0.1, 0.001, 0.008 by default"
    )
    method_schedule: str | None = _setting(None, POLICY, "sfp, fpgm: x0.2@60,120,160/200 by default")
    distance: str | None = _setting(None, POLICY, f"fpgm: between filters, one of {', '.join(DISTANCES)}; default: l2")
    norm_share: float | None = _setting(
        None, POLICY, "fpgm: part of the pruned filters that go by their norm; default: 0; the published mix is 0.25"
    )
    constraint_aware: bool | None = _setting(
        None, POLICY, "caie: false ranks channels by their importance alone; default: true"
    )
    channels_per_step: int | None = _setting(None, POLICY, "caie: channels that go in a step; default: 25")
    batches_per_step: int | None = _setting(None, POLICY, "caie: mini-batches that train between; default: 30")
    quantiles: list[float | str] = _setting(
        (), POLICY, "gfi_ap, instead of targets: parts of all filters that go, or LOW:HIGH:STEP; --quantile, --sweep"
    )
    forms: list[str] = _setting(
        FORMS,
        MACHINE,
        f"export, finetune: what models are written as, beside safetensors, of {', '.join(FORMS)}; default: all",
    )
    finetune_epochs: int = _setting(400, FINETUNE, "epochs of every exported model")
    finetune_lr: float | None = _setting(
        None, FINETUNE, "highest learning rate (default: 0.1, less the shorter the training is below 2,000 steps)"
    )
    finetune_schedule: str = _setting("cosine", FINETUNE, SCHEDULE_HELP)
    finetune_distillation: float = _setting(
        0.9, FINETUNE, "part of the loss that compares with the dense model's outputs, from 0 (none) to 1"
    )
    finetune_at_once: int = _setting(
        1, FINETUNE, "models that train side by side, in processes that share the CPU's cores and the GPUs"
    )

    def __post_init__(self) -> None:
        empty = [
            f"{item.name} must have a value, but got none"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) is None and item.default is not None
        ]
        if empty:
            raise UserError("these settings are empty:\n  " + "\n  ".join(empty))
        for key in ("targets", "ignore", "quantiles", "forms"):
            object.__setattr__(self, key, tuple(dict.fromkeys(getattr(self, key))))
        if not (self.targets or self.quantiles or any(getattr(self, cost) for cost in COSTS)):
            object.__setattr__(self, "targets", TARGETS)
        wrong = [*_wrong_choices(self), *_wrong_numbers(self), *_wrong_budgets(self), *_wrong_options(self)]
        if wrong:
            raise UserError("these settings are out of range:\n  " + "\n  ".join(wrong))

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def crops(self) -> bool:
        """Whether training images are random crops of any size: as given, or for ImageNet."""
        return self.dataset == "imagenet" if self.resized_crop is None else self.resized_crop

    @property
    def pruned_scope(self) -> str:
        """The scope: as given, or the one of the method's source."""
        return self.scope or method_entry(self.method).scope

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method, None where its default serves."""
        return {key: getattr(self, key) for key in method_entry(self.method).options if key in METHOD_OPTIONS}

    @property
    def search_settings(self) -> dict[str, Any]:
        """What shapes a search, those apart that keep their default of None."""
        shaping = [item.name for item in dataclasses.fields(self) if item.metadata["stage"] in (IDENTITY, POLICY)]
        values = {name: getattr(self, name) for name in shaping if name not in PRUNE_SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def quantile_list(self) -> list[float]:
        """The quantiles one by one, ascending."""
        return quantile_list(self.quantiles)

    @property
    def target_range(self) -> tuple[float, float] | None:
        """The ends of `targets`, where that is a range."""
        return range_ends(self.targets[0]) if len(self.targets) == 1 else None

    @property
    def budgets(self) -> list[Budget]:
        """What gets a policy: the one budget of macs, params and latency, or every listed target, or the ends of the
        range and every tenth between; nothing where quantiles are asked for.
        """
        if self.quantiles:
            return []
        if not self.targets:
            return [Budget({cost: getattr(self, cost) for cost in COSTS if getattr(self, cost) is not None})]
        return [Budget({"macs": target}) for target in _policy_targets(self)]


METHOD_OPTIONS = tuple(  # settings that some of the methods take
    item.name for item in dataclasses.fields(Experiment) if any(item.name in one.options for one in METHODS.values())
)
PRUNE_SETTINGS = ("method", *METHOD_OPTIONS, "quantiles")  # that search has nothing to do with


def _wrong_choices(experiment: Experiment) -> list[str]:
    choices: dict[str, Sequence[str | None]] = {
        "dataset": DATASETS,
        "criterion": CRITERIA,
        "scope": (None, *SCOPES),
        "distance": (None, *DISTANCES),
        "agent": tuple(AGENTS),
        "precision": PRECISIONS,
    }
    wrong = [fault] if (fault := wrong_name(experiment.model, importing=True)) else []
    if not known_method(experiment.method):
        wrong.append(f"method must be {METHOD_HELP}, but got {experiment.method!r}")
    for key in ("pretrain_schedule", "finetune_schedule", "method_schedule"):
        if (value := getattr(experiment, key)) is not None and not is_schedule(value):
            wrong.append(f"{key} must be {SCHEDULE_HELP}, but got {value!r}")
    if unknown := [form for form in experiment.forms if form not in FORMS]:
        wrong.append(f"forms must be of {', '.join(FORMS)}, but got {', '.join(map(repr, unknown))}")
    return wrong + [
        f"{key} must be one of {', '.join(filter(None, known))}, but got {getattr(experiment, key)!r}"
        for key, known in choices.items()
        if getattr(experiment, key) not in known
    ]


def _wrong_numbers(experiment: Experiment) -> list[str]:
    wrong = []
    positive = (
        "validation_images",
        "calibration_images",
        "search_calibration_images",
        "batch_size",
        "pretrain_epochs",
        "episodes",
        "finetune_epochs",
        "finetune_at_once",
        "channel_multiple",
        "latency_batch",
        "method_epochs",
        "channels_per_step",
        "batches_per_step",
    )
    for key in (*positive, "pretrain_lr", "finetune_lr", "method_lr", "min_keep"):
        value = getattr(experiment, key)
        if value is not None and not 0 < value < math.inf:
            wrong.append(f"{key} must be above 0, but got {value}")
    for key in ("seed", "warmup_episodes", "crop_padding", "weight_decay", "workers"):
        value = getattr(experiment, key)
        if value is not None and not 0 <= value < math.inf:
            wrong.append(f"{key} must be at least 0, but got {value}")
    if not 0 <= experiment.finetune_distillation <= 1:
        wrong.append(f"finetune_distillation must be in [0, 1], but got {experiment.finetune_distillation}")
    wrong += _too_large(experiment)
    if experiment.image_size is not None and experiment.image_size < 8:
        wrong.append(f"image_size must be at least 8 pixels, but got {experiment.image_size}")
    if (experiment.mean is None) != (experiment.std is None):
        wrong.append("mean and std go together: give both or none")
    for key, least in (("mean", 0.0), ("std", 1e-6)):
        values = getattr(experiment, key)
        if values is not None and not (len(values) == 3 and all(least <= value <= 1 for value in values)):
            wrong.append(
                f"{key} must be three numbers in [{least:g}, 1] (of images in [0, 1], not 0 to 255), got {values}"
            )
    return wrong


def _too_large(experiment: Experiment) -> list[str]:
    """Whole numbers that nothing here can count to."""
    most = {item.name: LARGEST_NUMBER for item in dataclasses.fields(experiment)} | {"workers": MOST_WORKERS}
    return [
        f"{name} must be at most {largest}, but got {value}"
        for name, largest in most.items()
        if isinstance(value := getattr(experiment, name), int) and value > largest
    ]


def _wrong_options(experiment: Experiment) -> list[str]:
    """Options that another method than the chosen one takes, or out of range."""
    if not known_method(experiment.method):
        return []
    wrong, entry = [], method_entry(experiment.method)
    for option in METHOD_OPTIONS:
        takers = [name for name, entry in METHODS.items() if option in entry.options]
        if getattr(experiment, option) is not None and option not in entry.options:
            typed = f"{option} (--epochs)" if option == "method_epochs" else option
            wrong.append(
                f"{typed} is an option of --method {', '.join(takers)}, but method is {experiment.method}; leave it out"
            )
    if experiment.method == "gfi_ap" and experiment.method_lr is not None and not experiment.method_epochs:
        wrong.append("method_lr of gfi_ap is that of its retraining; give method_epochs (--epochs), or leave it out")
    if experiment.pruned_scope not in entry.scopes:
        wrong.append(f"scope of {experiment.method} must be {' or '.join(entry.scopes)}, but got {experiment.scope!r}")
    if experiment.method == "magnitude":
        idle = [
            name for name in ("scope", "ignore", "min_keep", "channel_multiple", "latency") if _given(experiment, name)
        ]
        wrong += [f"{name} is for channels, and magnitude prunes single weights; leave it out" for name in idle]
    if experiment.norm_share is not None and not 0 <= experiment.norm_share <= 1:
        wrong.append(f"norm_share must lie in [0, 1], but got {experiment.norm_share}")
    if experiment.quantiles and experiment.method != "gfi_ap":
        wrong.append(f"quantiles are an option of --method gfi_ap, but method is {experiment.method}; give targets")
    outside = [one for one in quantile_list(experiment.quantiles) if not 0 < one < 1]
    if outside:
        wrong.append(
            f"quantiles must lie in (0, 1), but got {outside}: 0 prunes nothing, 1 empties every layer; 0.41 is the "
            "published one"
        )
    return wrong


def _given(experiment: Experiment, name: str) -> bool:
    """Whether a setting is another one than by default."""
    defaults = {item.name: item.default for item in dataclasses.fields(Experiment)}
    return bool(getattr(experiment, name) != defaults[name])


def _policy_targets(experiment: Experiment) -> list[float]:
    if experiment.target_range is None:
        return [float(target) for target in experiment.targets]
    low, high = experiment.target_range
    tenths = [tenth / 10 for tenth in range(1, 10) if low + 0.01 <= tenth / 10 <= high - 0.01]
    return [low, *tenths, high]


def _wrong_budgets(experiment: Experiment) -> list[str]:
    given = {cost: getattr(experiment, cost) for cost in COSTS if getattr(experiment, cost) is not None}
    if experiment.quantiles:
        both = [name for name, values in (("targets", experiment.targets), (_COSTS, given)) if values]
        return [f"quantiles and {name} exclude each other; give one" for name in both]
    if given and experiment.targets:
        return [f"targets, and {_COSTS}, exclude each other, but got targets {list(experiment.targets)} and {given}"]
    if not given:
        return _wrong_targets(experiment)
    wrong = [
        f"{cost} must be a kept fraction in (0, 1], but got {target}; 0.5 keeps half"
        for cost, target in given.items()
        if not 0 < target <= 1
    ]
    if not wrong and min(given.values()) == 1:
        wrong.append(f"a budget that keeps all prunes nothing, but got {given}; lower one of them")
    return wrong + _wrong_episodes(experiment, 1)


def _wrong_targets(experiment: Experiment) -> list[str]:
    given = list(experiment.targets)
    if len(given) > 1 and any(isinstance(target, str) for target in given):
        return [f"targets must be kept fractions or one range like 0.3:0.8, not both, but got {given}"]
    targets = sorted(_policy_targets(experiment))
    if not targets or not all(0 < target <= 1 for target in targets):
        return [f"targets must be kept fractions in (0, 1], but got {given}; 0.5 keeps half of the MACs"]
    wrong = []
    if experiment.target_range is not None:
        low, high = experiment.target_range
        if not high - low >= 0.05:
            wrong.append(f"a range of targets must be at least 0.05 wide, LOW:HIGH, but got {given[0]!r}")
        if experiment.agent in AGENTS and experiment.agent != "cacp":
            wrong.append(f"agent {experiment.agent} takes a list of targets, but got {given[0]!r}; use --agent cacp")
    elif any(high - low < 0.01 - 1e-9 for low, high in itertools.pairwise(targets)):
        wrong.append(f"targets must lie at least 0.01 apart, but got {targets}")
    return wrong + _wrong_episodes(experiment, len(targets))


def _wrong_episodes(experiment: Experiment, targets: int) -> list[str]:
    wrong = []
    if experiment.episodes < targets:
        wrong.append(f"episodes must be at least one a target ({targets}), but got {experiment.episodes}")
    return wrong
