"""Settings from YAML and flags, and in a run folder's config.yaml.

Order of precedence: defaults, then `--config FILE` or else the run folder's own config.yaml, then flags. A key that no
command knows is an error. Every setting says which stage it shapes: a run whose stage is done refuses another value.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from cacp.checkpoint import write_atomically
from cacp.experiment import FINETUNE, IDENTITY, MACHINE, METHOD_OPTIONS, POLICY, PRUNE_SETTINGS, TRAINING, Experiment
from cacp.parsing import LARGEST_YAML, parse_settings, read_text
from cacp.ranges import kept_fraction, macs_target, quantile
from cacp.schema import COSTS, UserError

_LISTS = {
    "targets": "[0.3, 0.5]",
    "quantiles": "[0.41]",
    "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.2, 0.2, 0.2]",
    "ignore": "[layer1.*]",
    "forms": "[onnx, pt2]",
}
_ALIASES = {"quantiles": ["--quantile", "--sweep"]}
LONGEST_NAME = 100  # characters that are compared
_BUDGET = {"targets", "quantiles", *COSTS}
_FOREIGN = {"search": PRUNE_SETTINGS, "prune": ("agent", "warmup_episodes")}  # policy settings of the other command
_NAMES = ("model", "dataset", "device", "precision", "criterion", "scope", "agent", "method", "distance")
_SCHEDULES = ("pretrain_schedule", "finetune_schedule", "method_schedule")
_METAVARS = {
    **dict.fromkeys(_NAMES, "NAME"),
    **dict.fromkeys(_SCHEDULES, "SCHEDULE"),
    "output": "DIR",
    "data_dir": "DIR",
    "weights": "WHICH",
    "ignore": "PATTERN",
    "forms": "FORM",
}  # of numbers N or X
_COMMAND_STAGES = {
    "pretrain": (IDENTITY, TRAINING),
    "search": (POLICY,),
    "prune": (POLICY,),
    "export": (),
    "finetune": (FINETUNE,),
}
_COMMAND_SETTINGS = {"export": ("forms",), "finetune": ("forms",)}  # and these


def parse(
    command: str, description: str | None, argv: Sequence[str], run_argument: bool = False
) -> jsonargparse.Namespace:
    """Read a command line.

    Args:
        command: name of the entry point without .py; its own settings come first in --help.
        description: for --help, as it stands.
        argv: arguments after the program's name.
        run_argument: whether the command takes the run folder as its argument (export, finetune).

    Returns:
        Namespace of every Experiment field, plus what `search.py` adds. Use `experiment_from`.
    """
    files = _config_files(argv)
    settings = _read_files(files)
    namespace = _parsed(_parser(command, description, run_argument, []), argv)
    folder = namespace.get("run") or namespace["output"]
    own_config = Path(folder) / "config.yaml"
    if not namespace.get("config") and folder and own_config.is_file():
        files = [str(own_config)]
        settings = _read_files(files)
        namespace = _parsed(_parser(command, description, run_argument, list(files)), argv)
    return _without_what_flags_replace(namespace, command, argv, settings)


def _parsed(parser: jsonargparse.ArgumentParser, argv: Sequence[str]) -> jsonargparse.Namespace:
    try:
        return parser.parse_args(list(argv))
    except OverflowError as error:
        raise UserError(f"settings must be numbers that a float holds: {error}") from error


def _without_what_flags_replace(
    namespace: jsonargparse.Namespace, command: str, argv: Sequence[str], files: Sequence[Mapping[str, Any]]
) -> jsonargparse.Namespace:
    """A flag of a budget replaces a file's whole budget, and another method its method's options; search takes none of
    prune's settings from a file.
    """
    aliases = {alias.lstrip("-"): name for name, others in _ALIASES.items() for alias in others}
    aliases["epochs"] = _own_epochs(command)
    words = {word.partition("=")[0].lstrip("-") for word in argv if word.startswith("--")}
    flags = {aliases.get(word, word) for word in words}
    replaced: set[str] = set()
    if flags.intersection(_BUDGET):
        replaced |= _BUDGET
    methods = [settings["method"] for settings in files if "method" in settings]
    if "method" in flags and methods and methods[-1] != namespace["method"]:
        replaced |= {*METHOD_OPTIONS, "quantiles"}
    if command == "search":
        replaced |= {*PRUNE_SETTINGS}
    defaults = _plain({item.name: item.default for item in dataclasses.fields(Experiment)})
    for key in replaced - flags:
        namespace[key] = defaults[key]
    return namespace


def _parser(
    command: str, description: str | None, run_argument: bool, default_config_files: list[str | PathLike[str]]
) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"{command}.py",
        usage=f"{command}.py {'[RUN] ' if run_argument else ''}[--config FILE] [--SETTING VALUE ...]",
        description=description,
        default_config_files=default_config_files,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings")
    if run_argument:
        help_text = "run folder, for example runs/digits_resnet56 (or give --output or --config)"
        parser.add_argument("run", metavar="RUN", nargs="?", help=help_text)
    if command == "search":
        help_text = "after the search: the policy that promises most at this macs target, trained or not"
        parser.add_argument("--ask", type=_Type("kept fraction", kept_fraction), metavar="X", help=help_text)
        parser.add_argument("--profile", action="store_true", help="print at the end where the time went")
    stages, more, foreign = _COMMAND_STAGES[command], _COMMAND_SETTINGS.get(command, ()), _FOREIGN.get(command, ())
    own = [
        item
        for item in dataclasses.fields(Experiment)
        if (item.metadata["stage"] in stages and item.name not in foreign) or item.name in more
    ]
    rest = [item for item in dataclasses.fields(Experiment) if item not in own]
    for title, items in ((f"settings of {command}", own), ("settings of the other stages", rest)):
        group = parser.add_argument_group(title)
        for item in items:
            _add_setting(group, item, command)
    return parser


class _Help(jsonargparse.DefaultHelpFormatter):
    """What a setting means, with its default where it has one and the text does not say it; the description as it
    stands."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(".")
        if action.dest == "print_config":
            return "print all settings, as these flags and files make them, and exit"
        none = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        return text if none or "default" in text or not action.option_strings else f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()


class _Type:
    """A function that reads an argument, with the name that --help shows for it."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self._name, self._read = name, read

    def __call__(self, text: Any) -> Any:
        return self._read(text)

    def __repr__(self) -> str:
        return self._name


def _add_setting(group: Any, item: dataclasses.Field[Any], command: str) -> None:
    names = [f"--{item.name}", *_ALIASES.get(item.name, [])] + (
        ["--epochs"] if item.name == _own_epochs(command) else []
    )
    listed = "list" in str(item.type)
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
    kinds |= {
        "int | None": int | None,
        "float | None": float | None,
        "str | None": str | None,
        "bool | None": bool | None,
    }
    kind = kinds.get(str(item.type))
    default = list(item.default) if isinstance(item.default, tuple) else item.default
    elements = {
        "targets": _Type("kept fraction or range", macs_target),
        "quantiles": _Type("quantile or range", quantile),
        "ignore": str,
        "forms": str,
    }
    element = elements.get(item.name, float)
    keywords: dict[str, Any] = {"type": element, "nargs": "+"} if listed else {"type": kind}
    if "bool" not in str(item.type):
        keywords["metavar"] = _METAVARS.get(item.name, "N" if "int" in str(item.type) else "X")
    group.add_argument(*names, default=default, help=item.metadata["help"], **keywords)


def _own_epochs(command: str) -> str:
    """The setting that --epochs means to a command."""
    return "method_epochs" if command == "prune" else f"{command}_epochs"


def _config_files(argv: Sequence[str]) -> list[str]:
    """The files that --config names."""
    paths = [following for word, following in itertools.pairwise([*argv, ""]) if word == "--config"]
    return paths + [word.partition("=")[2] for word in argv if word.startswith("--config=")]


def _read_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What config files hold; one that is no mapping of settings is refused before the parser's less helpful messages.

    Raises:
        UserError: naming the file, and every list that is given as something else.
    """
    found = []
    for path in paths:
        try:
            settings = parse_settings(read_text(Path(path), LARGEST_YAML))
        except (OSError, ValueError) as error:
            raise UserError(f"config {path} cannot be read: {error}; known experiments are in configs/") from error
        known = [item.name for item in dataclasses.fields(Experiment)]
        wrong = [f"there is no setting {key!r}{_near(key, known)}" for key in settings if key not in known]
        wrong += [
            f"{key} must be a list like {example}, but got {settings[key]!r}"
            for key, example in _LISTS.items()
            if settings.get(key) is not None and not isinstance(settings[key], list)
        ]
        if wrong:
            raise UserError(f"config {path}: " + "; ".join(wrong))
        found.append(settings)
    return found


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1)
    return f", near is {near[0]}" if near else ""


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
        there = _own_settings(path)
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
    there = _own_settings(path)
    here = _plain_values(experiment)
    there = _plain({item.name: item.default for item in dataclasses.fields(Experiment)}) | there  # of an older version
    return [f"{key}: {there[key]!r} -> {here[key]!r}" for key in keys if there[key] != here[key]]


def _own_settings(path: Path) -> dict[str, Any]:
    """What a run folder's config.yaml holds."""
    try:
        return parse_settings(read_text(path, LARGEST_YAML))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; restore it, or use another --output") from error


def _plain_values(experiment: Experiment) -> dict[str, Any]:
    """Settings as YAML holds them."""
    return _plain(vars(experiment))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
