"""The one flat `Experiment` that serves all commands, read from YAML and flags.

Order of precedence: defaults, then `--config FILE` or else the run folder's own config.yaml, then flags. A key that no
command knows is an error. Every field says which stage it shapes: a run whose stage is done refuses another value.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from agents import AGENTS, WARMUP_EPISODES
from cacp.checkpoint import write_atomically
from cacp.data import DATASETS
from cacp.evaluation import PRECISIONS
from cacp.graph import MIN_KEEP_RATIO, SCOPES
from cacp.importance import CRITERIA
from cacp.methods import METHODS
from cacp.models import MODEL_HELP, wrong_name
from cacp.schema import UserError
from cacp.training import SCHEDULES

# What a setting shapes: who the dense model is and which images judge it, how networks are trained, the policies, the
# fine-tuning, or nothing but where and on what a command runs.
IDENTITY, TRAINING, POLICY, FINETUNE, MACHINE = "identity", "training", "policy", "finetune", "machine"
LARGEST_SEED = 2**32 - 1
_LISTS = {"targets": "[0.3, 0.5]", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]", "ignore": "[layer1.*]"}
_COMMAND_STAGES = {
    "pretrain": (IDENTITY, TRAINING),
    "search": (POLICY,),
    "prune": (POLICY,),
    "export": (),
    "finetune": (FINETUNE,),
}


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
    image_size: int | None = _setting(None, IDENTITY, "imagefolder: resize and crop to this many pixels a side")
    mean: list[float] | None = _setting(
        None, IDENTITY, "a weights file: mean of the normalisation it expects, in [0, 1]"
    )
    std: list[float] | None = _setting(None, IDENTITY, "a weights file: standard deviation, likewise")
    validation_images: int = _setting(
        2000, IDENTITY, "images that score an episode; as many again score the best once more"
    )
    calibration_images: int = _setting(1024, IDENTITY, "training images that batch norm is recalibrated on")
    seed: int = _setting(0, IDENTITY, "of everything random")
    batch_size: int = _setting(256, TRAINING, "images in a training step, pretrain and finetune")
    weight_decay: float = _setting(1e-4, TRAINING, "of SGD, pretrain and finetune")
    flip: bool = _setting(True, TRAINING, "mirror training images at random; not for digits and letters")
    crop_padding: int = _setting(4, TRAINING, "pixels that a training image is shifted by at most")
    precision: str = _setting(
        "auto", TRAINING, "auto (bf16 where the device has it), fp32 or bf16; training and search"
    )
    device: str = _setting("auto", MACHINE, "auto, cpu, cuda or cuda:N")
    pretrain_epochs: int = _setting(200, TRAINING, "weights train: epochs of the dense model")
    pretrain_lr: float = _setting(0.1, TRAINING, "weights train: highest learning rate")
    pretrain_schedule: str = _setting("cosine", TRAINING, f"weights train: one of {', '.join(SCHEDULES)}")
    targets: list[float | str] = _setting(
        (0.3, 0.5, 0.7), POLICY, "macs targets: kept fractions of the dense MACs, in (0, 1]; or a range, 0.3:0.8"
    )
    criterion: str = _setting("l1", POLICY, f"ranks the channels: one of {', '.join(CRITERIA)}")
    scope: str = _setting("inner", POLICY, "inner (channels inside a block) or all (residual streams too)")
    ignore: list[str] = _setting(
        (), POLICY, "channel groups that stay whole: patterns of their names, or of the layers that produce them"
    )
    min_keep: float = _setting(MIN_KEEP_RATIO, POLICY, "the least keep ratio of every group, in (0, 1]")
    channel_multiple: int = _setting(1, POLICY, "keep counts are multiples of this number, or all channels of a group")
    search_calibration_images: int | None = _setting(
        None, POLICY, "only so many of the calibration images for the scores of episodes (default: all of them)"
    )
    agent: str = _setting("cacp", POLICY, f"search: one of {', '.join(AGENTS)}")
    episodes: int = _setting(
        900, POLICY, "policies to score, all targets together; search, and prune --method sensitivity"
    )
    warmup_episodes: int = _setting(WARMUP_EPISODES, POLICY, "search: episodes drawn at random before the agent plans")
    method: str = _setting("uniform", POLICY, f"prune: one of {', '.join(METHODS)}")
    finetune_epochs: int = _setting(400, FINETUNE, "epochs of every exported model")
    finetune_lr: float = _setting(0.1, FINETUNE, "highest learning rate")
    finetune_schedule: str = _setting(
        "paper", FINETUNE, "paper (x0.1 every 20 epochs), step (x0.1 at half and three quarters) or cosine"
    )

    def __post_init__(self) -> None:
        empty = [
            f"{item.name} must have a value, but got none"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) is None and item.default is not None
        ]
        if empty:
            raise UserError("these settings are empty:\n  " + "\n  ".join(empty))
        for key in ("targets", "ignore"):
            object.__setattr__(self, key, tuple(dict.fromkeys(getattr(self, key))))
        wrong = [*_wrong_choices(self), *_wrong_numbers(self), *_wrong_targets(self)]
        if wrong:
            raise UserError("these settings are out of range:\n  " + "\n  ".join(wrong))

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def target_range(self) -> tuple[float, float] | None:
        """The ends of `targets`, where that is a range."""
        return _ends(self.targets[0]) if len(self.targets) == 1 else None

    @property
    def policy_targets(self) -> tuple[float, ...]:
        """The targets that get a policy: those listed, or the ends of the range and every tenth between."""
        if self.target_range is None:
            return tuple(float(target) for target in self.targets)
        low, high = self.target_range
        tenths = [tenth / 10 for tenth in range(1, 10) if low + 0.01 <= tenth / 10 <= high - 0.01]
        return low, *tenths, high


def _wrong_choices(experiment: Experiment) -> list[str]:
    choices: dict[str, Sequence[str]] = {
        "dataset": DATASETS,
        "criterion": CRITERIA,
        "scope": SCOPES,
        "agent": tuple(AGENTS),
        "method": tuple(METHODS),
        "pretrain_schedule": SCHEDULES,
        "finetune_schedule": SCHEDULES,
        "precision": PRECISIONS,
    }
    wrong = [fault] if (fault := wrong_name(experiment.model, importing=True)) else []
    return wrong + [
        f"{key} must be one of {', '.join(known)}, but got {getattr(experiment, key)!r}"
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
        "channel_multiple",
    )
    for key in (*positive, "pretrain_lr", "finetune_lr", "min_keep"):
        value = getattr(experiment, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            wrong.append(f"{key} must be above 0, but got {value}")
    for key in ("seed", "warmup_episodes", "crop_padding", "weight_decay"):
        value = getattr(experiment, key)
        if not (math.isfinite(value) and value >= 0):
            wrong.append(f"{key} must be at least 0, but got {value}")
    if experiment.seed > LARGEST_SEED:
        wrong.append(f"seed must be at most {LARGEST_SEED}, but got {experiment.seed}")
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


def parse(command: str, description: str, argv: Sequence[str], run_argument: bool = False) -> jsonargparse.Namespace:
    """Read a command line.

    Args:
        command: name of the entry point without .py; its own settings come first in --help.
        description: one paragraph for --help.
        argv: arguments after the program's name.
        run_argument: whether the command takes the run folder as its argument (export, finetune).

    Returns:
        Namespace of every Experiment field, plus what `search.py` adds. Use `experiment_from`.
    """
    _check_files(_config_files(argv))
    first = _parser(command, description, run_argument, []).parse_args(list(argv))
    folder = first.get("run") or first["output"]
    own_config = Path(folder) / "config.yaml"
    if first.get("config") or not folder or not own_config.is_file():
        return first
    _check_files([str(own_config)])
    return _parser(command, description, run_argument, [str(own_config)]).parse_args(list(argv))


def _parser(
    command: str, description: str, run_argument: bool, default_config_files: list[str | PathLike[str]]
) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"{command}.py",
        usage=f"{command}.py {'[RUN] ' if run_argument else ''}[--config FILE] [--SETTING VALUE ...]",
        description=description,
        default_config_files=default_config_files,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    if run_argument:
        help_text = "run folder, for example runs/digits_resnet56 (or give --output or --config)"
        parser.add_argument("run", metavar="RUN", nargs="?", help=help_text)
    if command == "search":
        parser.add_argument("--ask", type=float | None, help="after the search: one greedy policy for this macs target")
        parser.add_argument("--profile", action="store_true", help="print at the end where the time went")
    own = [item for item in dataclasses.fields(Experiment) if item.metadata["stage"] in _COMMAND_STAGES[command]]
    rest = [item for item in dataclasses.fields(Experiment) if item not in own]
    for title, items in ((f"settings of {command}", own), ("settings of the other stages", rest)):
        if not items:
            continue
        group = parser.add_argument_group(title)
        for item in items:
            _add_setting(group, item, command)
    return parser


def macs_target(text: float | str) -> float | str:
    """A macs target, or a range LOW:HIGH of them as it is written.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(text, str) and _ends(text) is not None:
        return text
    return float(text)


def _ends(target: float | str) -> tuple[float, float] | None:
    """LOW and HIGH of a range; None for anything else."""
    if not isinstance(target, str) or ":" not in target:
        return None
    low, _, high = target.partition(":")
    return float(low), float(high)


def _wrong_targets(experiment: Experiment) -> list[str]:
    given = list(experiment.targets)
    if len(given) > 1 and any(isinstance(target, str) for target in given):
        return [f"targets must be kept fractions or one range like 0.3:0.8, not both, but got {given}"]
    targets = sorted(experiment.policy_targets)
    if not targets or not all(0 < target <= 1 for target in targets):
        return [f"targets must be kept fractions in (0, 1], but got {given}; 0.5 keeps half of the MACs"]
    wrong = []
    if experiment.target_range is not None:
        low, high = experiment.target_range
        if not high - low >= 0.05:
            wrong.append(f"a range of targets must be at least 0.05 wide, LOW:HIGH, but got {given[0]!r}")
        if experiment.agent not in ("cacp", "random"):
            wrong.append(f"agent {experiment.agent} takes a list of targets, but got {given[0]!r}; use --agent cacp")
    elif any(high - low < 0.01 - 1e-9 for low, high in itertools.pairwise(targets)):
        wrong.append(f"targets must lie at least 0.01 apart, but got {targets}")
    if experiment.episodes < len(targets):
        wrong.append(f"episodes must be at least one a target ({len(targets)}), but got {experiment.episodes}")
    if experiment.agent == "cacp" and experiment.warmup_episodes >= experiment.episodes:
        wrong.append(
            f"warmup_episodes must be below episodes ({experiment.episodes}), so that the agent acts, "
            f"but got {experiment.warmup_episodes}; lower it, or use --agent random"
        )
    return wrong


def _add_setting(group: Any, item: dataclasses.Field[Any], command: str) -> None:
    names = [f"--{item.name}"] + (["--epochs"] if item.name == f"{command}_epochs" else [])
    listed = "list" in str(item.type)
    kind = {"int": int, "float": float, "str": str, "bool": bool, "int | None": int | None}.get(str(item.type))
    default = list(item.default) if isinstance(item.default, tuple) else item.default
    element = {"targets": macs_target, "ignore": str}.get(item.name, float)
    keywords: dict[str, Any] = {"type": element, "nargs": "+"} if listed else {"type": kind}
    group.add_argument(*names, default=default, help=item.metadata["help"], **keywords)


def _config_files(argv: Sequence[str]) -> list[str]:
    """The files that --config names."""
    paths = [following for word, following in itertools.pairwise([*argv, ""]) if word == "--config"]
    return paths + [word.partition("=")[2] for word in argv if word.startswith("--config=")]


def _check_files(paths: Sequence[str]) -> None:
    """Refuse a config file that is no mapping of settings, before the parser's less helpful messages.

    Raises:
        UserError: naming the file, and every list that is given as something else.
    """
    for path in paths:
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"config {path} cannot be read: {error}; known experiments are in configs/") from error
        if not isinstance(settings, dict):
            raise UserError(f"config {path} must hold lines like `episodes: 900`, but got {settings!r:.60}")
        wrong = [
            f"{key} must be a list like {example}, but got {settings[key]!r}"
            for key, example in _LISTS.items()
            if settings.get(key) is not None and not isinstance(settings[key], list)
        ]
        if wrong:
            raise UserError(f"config {path}: " + "; ".join(wrong))


def experiment_from(namespace: jsonargparse.Namespace) -> Experiment:
    """The validated settings of a parsed command line.

    Raises:
        UserError: for values out of range, a run folder without a run, or no output folder at all.
    """
    values = {item.name: namespace[item.name] for item in dataclasses.fields(Experiment)}
    run = namespace.get("run")
    if run is not None:
        if not (Path(run) / "config.yaml").is_file():
            raise UserError(f"{run} holds no run (no config.yaml); make one with bash scripts/search_export.sh")
        values["output"] = run
    elif not values["output"]:
        files = namespace.get("config") or []
        if not files:
            raise UserError("no run folder: give --output runs/NAME, or --config FILE (the file's name names the run)")
        values["output"] = f"runs/{Path(str(files[-1])).stem}"
    return Experiment(**values)


def save_config(experiment: Experiment, begun: bool) -> None:
    """Write the run folder's config.yaml; a run that has begun keeps its own data folder and device."""
    path, values = experiment.folder / "config.yaml", _plain_values(experiment)
    if begun:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        values.update({key: there[key] for key in stage_keys([MACHINE]) if key in there})
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))


def stage_keys(stages: Sequence[str]) -> list[str]:
    """Names of the settings that shape these stages."""
    return [item.name for item in dataclasses.fields(Experiment) if item.metadata["stage"] in stages]


def differences(experiment: Experiment, keys: Sequence[str], folder: Path) -> list[str]:
    """Settings whose value differs from a run folder's config.yaml, as `key: there -> here`; none without that file.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    try:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; restore it, or use another --output") from error
    if not isinstance(there, dict):
        raise UserError(f"{path} is not a run's settings; use another --output")
    here = _plain_values(experiment)
    there = _plain({item.name: item.default for item in dataclasses.fields(Experiment)}) | there  # of an older version
    return [f"{key}: {there[key]!r} -> {here[key]!r}" for key in keys if there[key] != here[key]]


def _plain_values(experiment: Experiment) -> dict[str, Any]:
    """Settings as YAML holds them."""
    return _plain(vars(experiment))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
