"""What stands around the numbers of a run: what is missing, time, how to load the models, settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cacp.own import is_own
from cacp.page.markup import Markup, joined, table, tag
from cacp.page.result import megabytes, policy_title
from cacp.reporting import duration, percent
from cacp.runfolder import Rows, RunFolder, at, command, stages


def unfinished(run: RunFolder) -> Iterator[Markup]:
    """Every stage that is not done, and the command that makes it."""
    for stage in stages(run):
        if stage.command:
            yield tag("p", tag("b", stage.name), f": {stage.state}. To go on:")
            yield tag("pre", tag("code", stage.command))


def problems(runs: Sequence[RunFolder]) -> Iterator[Markup]:
    """Files that could not be read."""
    for problem in (problem for run in runs for problem in run.problems):
        yield tag("p", problem, class_="problem")


def times(run: RunFolder) -> Markup:
    """Where the time went, as far as the files say."""
    spent = {
        "training of the dense model": _seconds(run.dense_epochs),
        "search": sum(episode.seconds for episode in run.episodes),
        **{f"training of the method, {name}": _seconds(rows) for name, rows in run.method_epochs.items()},
        **{f"quantile {row.quantile:g}": row.seconds for row in run.sweep},
        **{f"fine-tuning, {policy_title(model)}": _seconds(model.epochs) for model in run.models},
    }
    spent = {name: seconds for name, seconds in spent.items() if seconds}
    if not spent:
        return Markup("")
    parts = [
        table("Time of the stages that say theirs.", ["stage", "time"], [[k, duration(v)] for k, v in spent.items()])
    ]
    if run.profile:
        whole = sum(run.profile.values())
        rows = [[name, duration(one), percent(one / whole)] for name, one in run.profile.items() if whole]
        parts.append(table("The last search.py with --profile.", ["phase", "time", "%"], rows))
    return joined(parts)


def _seconds(rows: Rows) -> float:
    return sum(row.get("seconds") or 0.0 for row in rows)


def usage(run: RunFolder) -> Markup:
    """How to load the models, and what lies in their folders."""
    ready = [
        (model, "finetune" if model.tuned else "export", model.tuned_bytes if model.tuned else model.export_bytes)
        for model in run.models
        if model.tuned or model.exported
    ]
    if not ready:
        return Markup("")
    own = is_own(str(run.settings.get("model", "")))
    lines = ["import cacp", "import torch", ""]
    for model, stage, _ in ready:
        build = ", build=function" if own else ""
        lines.append(f"model = cacp.load_pruned({str(run.folder / stage / model.name)!r}{build})")
    lines += [
        "",
        f"mean = torch.tensor({run.dense.get('mean')}).view(-1, 1, 1)",
        f"std = torch.tensor({run.dense.get('std')}).view(-1, 1, 1)",
        "scores = model((images - mean) / std)  # images (B, C, H, W) in [0, 1]; model is an nn.Module in eval mode",
        f"classes = {run.dense.get('classes')!r:.2000}",
    ]
    if own:
        lines[2:2] = ["# function() -> nn.Module builds the unpruned network: nothing that a file names is imported"]
    rows = [
        [f"{stage}/{model.name}/{name}", megabytes(size)]
        for model, stage, sizes in ready
        for name, size in sizes.items()
    ]
    return joined([tag("pre", tag("code", "\n".join(lines))), table("Files of these models.", ["file", "MB"], rows)])


def setup(run: RunFolder) -> Markup:
    """Settings, commands, versions and hardware."""
    rows = [[name, _plain(value)] for name, value in run.settings.items()]
    typed = [entry["command"] for entry in run.environments if isinstance(entry.get("command"), list)]
    commands = [command(*words) for words in typed]
    parts = [tag("pre", tag("code", "\n".join(dict.fromkeys(commands))))] if commands else []
    facts = {key: value for key, value in run.dense.items() if key != "classes"}
    parts.append(_fold("Settings", table("config.yaml", ["setting", "value"], rows, text=True)))
    if facts:
        listed = [[key, _plain(value)] for key, value in facts.items()]
        parts.append(_fold("Dense model", table("dense/result.json", ["entry", "value"], listed, text=True)))
    if run.environments:
        packages = at(run.environments[-1], "packages")
        machine = {**run.environments[-1], **(packages if isinstance(packages, dict) else {})}
        listed = [[key, _plain(value)] for key, value in machine.items() if key not in ("packages", "command")]
        parts.append(_fold("Machine and versions", table("of the last command", ["entry", "value"], listed, text=True)))
    return joined(parts)


def _fold(title: str, content: Markup) -> Markup:
    return tag("details", tag("summary", title), content)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None or value == "" else str(value)
