"""What a run folder holds, at any stage of a run: read, never judged; what cannot be read is named in `problems`.

Unlike the readers of the stages this one needs nothing to be there, imports nothing that a file names, and takes files
of older and newer versions with fewer or more entries.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from cacp import latency_table
from cacp.experiment import Experiment
from cacp.history import Episode
from cacp.parsing import LARGEST_JSON, LARGEST_NUMBER, LARGEST_YAML, bounded, parse_json, parse_settings, read_text
from cacp.recipe import saved_settings
from cacp.schema import Budget, PolicyRecord, UserError
from cacp.sweep import SweepRow, load_sweep

Rows = list[dict[str, float | None]]  # of a CSV file of numbers; None for an empty cell
Value = TypeVar("Value")
_UNREADABLE = (OSError, UserError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, csv.Error)


@dataclass
class PrunedModel:
    """A policy, and what export.py and finetune.py have made of it; empty where they have not."""

    name: str
    record: PolicyRecord
    exported: dict[str, Any] = field(default_factory=dict)  # report.json, if it is of this policy
    tuned: dict[str, Any] = field(default_factory=dict)  # result.json
    tuning: dict[str, Any] = field(default_factory=dict)  # source.json: the recipe of a fine-tuning that has begun
    epochs: Rows = field(default_factory=list)  # of fine-tuning
    export_bytes: dict[str, int] = field(default_factory=dict)  # file name -> size
    tuned_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class RunFolder:
    """A run folder as it stands."""

    folder: Path
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    experiment: Experiment | None = None
    environments: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)  # result.json
    dense_epochs: Rows = field(default_factory=list)
    dense_bytes: int | None = None
    latency: dict[str, Any] = field(default_factory=dict)  # latency.json: the table of a run with such a target
    channels: dict[str, int] = field(default_factory=dict)  # of the dense weights' layers
    episodes: list[Episode] = field(default_factory=list)
    front: Rows = field(default_factory=list)  # tradeoff.csv
    models: list[PrunedModel] = field(default_factory=list)
    method_epochs: dict[str, Rows] = field(default_factory=dict)
    unstructured: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweep: list[SweepRow] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The agent or method that pruned, as far as the folder says."""
        if self.models:
            return self.models[0].record.method
        if self.unstructured:
            return "magnitude"
        return f"search {self.settings.get('agent', '')}".strip() if self.episodes else ""

    @property
    def dense_cost(self) -> dict[str, float]:
        """macs, params and latency_ps of the dense model, as far as the folder says."""
        latency_ps = number(self.latency, "dense_ps")
        return {**self._counted_cost, **({"latency_ps": latency_ps} if latency_ps else {})}

    @property
    def _counted_cost(self) -> dict[str, int]:
        for model in self.models:
            for cost in (at(model.exported, "dense"), at(model.tuned, "dense_cost")):
                macs, params = number(cost, "macs"), number(cost, "params")
                if macs and params:
                    return {"macs": round(macs), "params": round(params)}
        last = self.front[-1] if self.front else {}
        macs, kept = number(last, "macs"), number(last, "macs_kept")
        return {"macs": round(macs / kept)} if macs and kept and kept > 1e-9 else {}

    @property
    def budgets(self) -> list[Budget]:
        """What the settings ask a policy for."""
        return self.experiment.budgets if self.experiment else []


def at(data: Any, *keys: str) -> Any:
    """The entry of nested mappings; None where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def number(data: Any, *keys: str) -> float | None:
    """The number at an entry of nested mappings; None where there is none."""
    found = at(data, *keys)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: if it holds no run at all.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run (no config.yaml); make one with bash scripts/search_export.sh")
    run = RunFolder(folder, folder.resolve().name)
    read = _Reader(run.problems)
    run.settings = read(folder / "config.yaml", _settings, {})
    run.experiment = read(folder / "config.yaml", lambda path: _experiment(run.settings, folder), None)
    entries: Any = read(folder / "environment.json", _json, [])
    run.environments = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    run.dense = read.mapping(folder / "dense" / "result.json")
    run.dense_epochs = read(folder / "dense" / "epochs.csv", _epochs, [])
    run.latency = read.mapping(folder / latency_table.FILE)
    run.channels = read(folder / "dense" / "model.safetensors", _output_channels, {})
    run.dense_bytes = _sizes(folder / "dense").get("model.safetensors")
    run.episodes = read(folder / "search" / "episodes.csv", _episodes, [])
    run.front = read(folder / "search" / "tradeoff.csv", _numbers, [])
    phases = read.mapping(folder / "search" / "profile.json")
    run.profile = {name: seconds for name in phases if (seconds := number(phases, name))}
    run.models = [
        _model(read, folder, path.stem, record)
        for path in sorted((folder / "policies").glob("*.json"))
        if (record := read(path, lambda path: PolicyRecord.from_json(_json(path), str(path)), None))
    ]
    run.models.sort(key=lambda model: (model.record.budget.mean_target, model.name))
    for path in sorted((folder / "method").glob("*/epochs.csv")):
        run.method_epochs[path.parent.name] = read(path, _epochs, [])
    for path in sorted((folder / "unstructured").glob("*/result.json")):
        run.unstructured[path.parent.name] = read.mapping(path)
    run.sweep = read(folder / "sweep" / "sweep.csv", lambda path: load_sweep(folder), [])
    return run


def _model(read: _Reader, folder: Path, name: str, record: PolicyRecord) -> PrunedModel:
    export, tuned = folder / "export" / name, folder / "finetune" / name
    report = read.mapping(export / "report.json")
    if report and report.get("policy") != record.to_json():
        report = {}  # of another policy: export.py makes it anew
    return PrunedModel(
        name=name,
        record=record,
        exported=report,
        tuned=read.mapping(tuned / "result.json"),
        tuning=read.mapping(tuned / "source.json"),
        epochs=read(tuned / "epochs.csv", _epochs, []),
        export_bytes=_sizes(export) if report else {},
        tuned_bytes=_sizes(tuned),
    )


class _Reader:
    """Reads files that may be missing or damaged."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def __call__(self, path: Path, reader: Callable[[Path], Value], default: Value) -> Value:
        """What `reader` makes of a file; `default` for none, and for a damaged one, which is noted."""
        if not path.is_file():
            return default
        try:
            return reader(path)
        except _UNREADABLE as error:
            self._problems.append(f"{path} cannot be read: {error}")
            return default

    def mapping(self, path: Path) -> dict[str, Any]:
        """A JSON object; empty for none."""
        data: Any = self(path, _json, {})
        return data if isinstance(data, dict) else {}


def _json(path: Path) -> Any:
    return parse_json(read_text(path, LARGEST_JSON))


def _settings(path: Path) -> dict[str, Any]:
    return parse_settings(read_text(path, LARGEST_YAML))


def _experiment(settings: Mapping[str, Any], folder: Path) -> Experiment:
    known = {item.name for item in dataclasses.fields(Experiment)}
    return Experiment(**{**{key: value for key, value in settings.items() if key in known}, "output": str(folder)})


def _numbers(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{str(key): float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
    if not bounded(cell for row in rows for cell in row.values() if cell is not None):
        raise ValueError(f"numbers must be finite and at most {LARGEST_NUMBER:g}")
    return rows


def _epochs(path: Path) -> Rows:
    rows = _numbers(path)
    if any(row.get("epoch") is None for row in rows):
        raise ValueError("a row has no epoch")
    return rows


def _episodes(path: Path) -> list[Episode]:
    """The rows of episodes.csv; a last one that is still being written is left out."""
    text = path.read_text(encoding="utf-8")
    return [Episode.from_row(row) for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines())]


def _output_channels(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt", device="cpu") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {name: shape[0] for name, shape in weights.items() if shape and shape[0]}  # not those of a single number


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes of the files of a folder that one ships, by name."""
    paths = sorted(folder.glob("*")) if folder.is_dir() else []
    kept = ("architecture.json", "model.")
    return {path.name: path.stat().st_size for path in paths if path.is_file() and path.name.startswith(kept)}


class Stage(NamedTuple):
    """A stage of a run: what of it is there, and the command that makes the rest; none for a stage that is done."""

    name: str
    state: str
    command: str = ""


def stages(run: RunFolder) -> list[Stage]:
    """How far a run is."""
    return [_dense_stage(run), _policy_stage(run), *_model_stages(run)]


def command(*words: object) -> str:
    """A command line to paste into a shell."""
    return shlex.join(["python", *map(str, words)])


def _dense_stage(run: RunFolder) -> Stage:
    if run.dense:
        return Stage("dense model", "done")
    epochs = f"{len(run.dense_epochs)} of {run.settings.get('pretrain_epochs', '?')} epochs"
    return Stage(
        "dense model", epochs if run.dense_epochs else "not yet", command("pretrain.py", "--output", run.folder)
    )


def _policy_stage(run: RunFolder) -> Stage:
    there = {model.name for model in run.models} | run.unstructured.keys()
    missing = [budget.name for budget in run.budgets if budget.name not in there]
    quantiles = run.experiment.quantile_list if run.experiment else []
    missing += [f"quantile {one:g}" for one in quantiles if one not in {row.quantile for row in run.sweep}]
    state = f"{len(there)} done" if there else "none yet"
    if run.episodes:
        state += f", {len(run.episodes)} of {run.settings.get('episodes', '?')} episodes"
    if not missing and there:
        return Stage("policies", state)
    pruned = run.method_epochs or run.unstructured or quantiles or (run.models and not run.method.startswith("search"))
    script = "prune.py" if pruned else "search.py"
    if missing:
        state += f"; missing: {', '.join(missing)}"
    return Stage("policies", state, command(script, "--output", run.folder))


def _model_stages(run: RunFolder) -> list[Stage]:
    """Of exporting and fine-tuning; none for networks with single weights zero."""
    if run.unstructured and not run.models:
        return []
    exported = [model.name for model in run.models if model.exported]
    tuned = [model.name for model in run.models if model.tuned]
    begun = [model for model in run.models if model.epochs and not model.tuned]
    state = f"{len(tuned)} of {len(run.models)}"
    if begun:
        state += f"; {begun[0].name}: {len(begun[0].epochs)} of {begun[0].tuning.get('epochs', '?')} epochs"
    done = bool(run.models) and len(tuned) == len(run.models)
    return [
        Stage(
            "export",
            f"{len(exported)} of {len(run.models)}",
            "" if run.models and len(exported) == len(run.models) else command("export.py", run.folder),
        ),
        Stage("fine-tuning", state, "" if done else command("finetune.py", run.folder, *_recipe_flags(run))),
    ]


def _recipe_flags(run: RunFolder) -> list[str]:
    """Flags that a fine-tuning had which has begun, since another recipe would be refused."""
    begun = [model.tuning for model in run.models if model.tuning]
    if not begun or run.experiment is None:
        return []
    recipe = saved_settings(begun[0])
    there = {**vars(run.experiment), "resized_crop": run.experiment.crops}
    own = {key: f"finetune_{key}" for key in ("epochs", "lr", "schedule", "distillation")}
    shared = {key: key for key in ("weight_decay", "batch_size", "flip", "resized_crop", "precision")}
    return [
        f"--{setting}={'null' if recipe[key] is None else recipe[key]}"
        for key, setting in {**own, **shared, "padding": "crop_padding"}.items()
        if recipe[key] != there[setting]
    ]
