"""What a person sees of a running command: progress on the screen, tables, TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.logger import HParam, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from cacp.budget import BudgetWalk, check_reachable, reachable_fractions, uniform_counts
from cacp.checkpoint import save_csv
from cacp.cost import CostModel
from cacp.figures import policy_figure
from cacp.history import Episode
from cacp.latency_table import LatencyTable
from cacp.policies import load_policies
from cacp.profiling import Profile
from cacp.schema import COSTS, PS_PER_MS, Budget, ChannelGroups
from cacp.shipping import FILES
from cacp.training import EpochRecord

console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
_LINES = 10  # progress lines of a command whose output is no terminal


class ProgressLine:
    """A progress bar with the time left on a terminal, and below it how the work stands; elsewhere a line after the
    first and the tenth step and every tenth of the work.

    Args:
        title: of the work.
        total: steps in all.
        done: steps that an earlier call has done.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first, self._done = title, total, done, done
        self._start = time.monotonic()
        self._drawn = console.is_terminal and parent_process() is None  # processes side by side write lines
        self._bar = _Bar(disable=not self._drawn)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, status: str, seconds: float | None = None) -> None:
        """One step more; `status` says how it stands, `seconds` what a step takes where that is known better."""
        self._done += 1
        now = time.monotonic()
        share, steps = max(1, self._total // _LINES), self._done - self._first
        left = (seconds or (now - self._start) / steps) * (self._total - self._done)
        self._bar.status = status
        self._bar.update(self._task, advance=1, ends=now + left)
        if not self._drawn and (steps in (1, 10) or self._done % share == 0 or self._done == self._total):
            shown = f"{status}, {duration(left)} left" if status else f"{duration(left)} left"
            console.print(f"{self._title} {self._done}/{self._total} {shown}", soft_wrap=True)


class _Left(ProgressColumn):
    """The time left, by the estimate at the last step: rich's own forgets steps that take minutes."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        return Text("" if ends is None else f"{duration(ends - time.monotonic())} left", style="progress.remaining")


class _Bar(Progress):
    """A bar with a line of text below it, which wraps where the window is narrow."""

    def __init__(self, disable: bool) -> None:
        self.status = ""
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), _Left())
        super().__init__(*columns, console=console, disable=disable)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.status)


def track_training(records: Iterator[EpochRecord], epochs: int, folder: Path, title: str) -> list[EpochRecord]:
    """Drive a training to its end: progress, `epochs.csv` and TensorBoard events in `folder`.

    Returns:
        The record of every epoch.
    """
    seen: list[EpochRecord] = []
    with SummaryWriter(str(folder), purge_step=1) as writer, ProgressLine(title, epochs) as progress:
        for record in records:
            seen.append(record)
            for name, value in record._asdict().items():
                if value is not None and name != "epoch":
                    writer.add_scalar(f"training/{name}", value, record.epoch)
            save_csv(folder / "epochs.csv", [EpochRecord._fields, *seen])
            progress.advance(f"loss {record.train_loss:.3f}{_validation(record)}", record.seconds)
    return seen


def _validation(record: EpochRecord) -> str:
    return "" if record.validation_top1 is None else f", validation {100 * record.validation_top1:.1f} %"


class _ResumedTensorBoard(TensorBoardOutputFormat):
    """SB3's TensorBoard output, going on at a step: what an interrupted run logged from there on is dropped."""

    def __init__(self, folder: str, first_step: int) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=first_step)
        self._is_closed = False


def search_logger(folder: Path, first_episode: int) -> Logger:
    """The logger that the agent records into; `dump(episode)` writes TensorBoard events in `folder`."""
    return Logger(str(folder), [_ResumedTensorBoard(str(folder), first_episode)])


def log_episode(
    logger: Logger, episode: Episode, budget: str, names: Sequence[str], channels: Sequence[int], best: float
) -> None:
    """Record one episode in TensorBoard: score, best score, cost, and the keep ratio of every group, by budget."""
    target = f"target {budget}"
    for key in ("top1", "loss", "probability", "reward", "macs", "params"):
        logger.record(f"{target}/{key}", getattr(episode, key))
    if episode.latency_ps:
        logger.record(f"{target}/latency_ms", episode.latency_ps / PS_PER_MS)
    logger.record(f"{target}/best top1", best)
    logger.record("search/seconds", episode.seconds)
    logger.record("search/reward", episode.reward)
    for name, count, whole in zip(names, episode.counts, channels, strict=True):
        logger.record(f"keep {target}/{name}", count / whole)


def log_settings(logger: Logger, settings: Mapping[str, Any], groups: ChannelGroups, budgets: Sequence[str]) -> None:
    """Record, before the first episode, the settings of a search as text and as hyper-parameters, whose metrics are the
    best top-1 of every budget, by its name; and the table of channel groups.
    """
    rows = "".join(f"\n| {key} | {value} |" for key, value in settings.items())
    logger.record("search/settings", f"| setting | value |\n|---|---|{rows}", exclude=("stdout", "csv"))
    logger.record("search/groups", "\n".join(f"    {line}" for line in str(groups).splitlines()))
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
    logger.record("hparams", HParam(plain, {f"target {name}/best top1": 0.0 for name in budgets}))
    logger.dump(0)


def log_tradeoff(logger: Logger, figure: Figure) -> None:
    """Record the trade-off curve of the episodes so far."""
    logger.record("search/trade-off", LoggedFigure(figure, close=True), exclude=("stdout", "csv"))


def log_best_policy(logger: Logger, groups: ChannelGroups, budget: str, episode: Episode) -> None:
    """Record the figure of the best policy of a budget, by its name, in TensorBoard."""
    figure = policy_figure(groups, episode.counts, f"{budget}: top-1 {100 * episode.top1:.1f} %")
    logger.record(f"target {budget}/best policy", LoggedFigure(figure, close=True), exclude=("stdout", "csv"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Group:
    """A table for the console, its title over it; the first column to the left, the others to the right."""
    result = Table()
    for position, column in enumerate(columns):
        result.add_column(Text(column), justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return Group(Text(title, style="italic"), result)


def show_dense(model: str, validation_top1: float, unseen: bool) -> None:
    """What a dense model reaches."""
    console.print(f"dense {model}: {percent(validation_top1)} % top-1 on the {validation_images(unseen)}")


def validation_images(unseen: bool) -> str:
    """What they are called beside a dense model, whose weights are known never to have seen them, or are not."""
    return "validation images" if unseen else "validation images, which its weights may have seen"


def show_reachable(groups: ChannelGroups, cost_model: CostModel, budgets: Sequence[Budget]) -> None:
    """A table of what can be reached, before the first episode; a budget that can't be is refused."""
    for budget in budgets:
        check_reachable(cost_model, budget)
    for name in groups.unknown:
        console.print(f"not known to trace, kept whole: {name}")
    dense, least = cost_model.dense, reachable_fractions(cost_model)
    costs = list(budgets[0].targets)  # the same for all
    rows = [
        [
            budget.name,
            *(amount(cost, target * dense[COSTS.index(cost)]) for cost, target in budget.targets.items()),
            f"{BudgetWalk(cost_model, budget).even_ratio():.3f}",
            *(amount(cost, uniform[COSTS.index(cost)]) for cost in costs),
        ]
        for budget in budgets
        for uniform in [cost_model.cost(uniform_counts(cost_model, budget))]
    ]
    title = (
        f"{len(groups.prunable)} prunable groups; dense {millions(dense.macs)} MACs, {millions(dense.params)} "
        f"parameters; reachable: {', '.join(f'{cost} {least[cost]:.3f} to 1' for cost in costs)}"
    )
    at_most, uniform_costs = ([form.format(cost) for cost in costs] for form in ("{} at most", "uniform {}"))
    console.print(table(title, ["budget", *at_most, "uniform keep ratio", *uniform_costs], rows))


def show_latency_table(measured: LatencyTable) -> None:
    """Predicted beside measured latency of the networks that have checked a table, and how far it is off."""
    rows = [
        [one.policy, *(percent(part) for part in (one.macs, one.predicted, one.measured, one.predicted - one.measured))]
        for one in measured.checked
    ]
    title = (
        f"latency of batches of {measured.batch} on {measured.device}, {measured.threads} threads: dense "
        f"{measured.measured_dense_ps / PS_PER_MS:.2f} ms; networks that the table has not seen, % of the dense one"
    )
    columns = ["keep ratios", "MACs", "predicted", "measured", "off by"]
    console.print(table(title, columns, rows))
    errors = [percent(one) for one in (measured.median_error, measured.largest_error, measured.fit_error)]
    console.print(
        f"off by {errors[0]} % of the dense latency (median), {errors[1]} % at most; the layers' "
        f"fit by {errors[2]} % in all"
    )
    if measured.note:
        console.print(measured.note)


def show_files(done: str, folder: Path, forms: Mapping[str, Mapping[str, Any]], record: str) -> None:
    """Say which files a model was written to, and which of its forms are missing and why.

    Args:
        done: what was done to the model.
        folder: of the files.
        forms: from `cacp.shipping.ship`.
        record: name of the file that was written last.
    """
    files = [form["file"] for form in forms.values() if "file" in form]
    console.print(f"{done} {folder}: {', '.join(['model.safetensors', 'architecture.json', *files, record])}")
    for name, form in forms.items():
        if "missing" in form:
            console.print(f"  no {FILES[name]}: {form['missing']}")


def show_policies(folder: Path, names: Sequence[str]) -> None:
    """A table of the named policies of a run folder."""
    records = [record for record in load_policies(folder) if record.budget.name in names]
    known = 3 if any(record.score.cost.latency_ps for record in records) else 2
    rows = [
        [
            record.budget.name,
            *(amount(cost, value) for cost, value in zip(COSTS[:known], record.score.cost, strict=False)),
            percent(record.search_score.top1),
            percent(record.score.top1),
            record.episode or "-",
        ]
        for record in records
    ]
    costs = ["MACs", "params", "latency by the table"][:known]
    columns = ["policy", *costs, "searched, %", "scored again, %", "episode"]
    title = f"policies of {folder}: top-1 before fine-tuning on the images of the search, and on as many others"
    console.print(table(title, columns, rows))


def show_exports(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """A table of exported models, by their reports, the dense one first."""
    columns = ["model", "MACs", "of dense", "params", "top-1, %"]
    rows: list[list[str]] = []
    for name, report in reports.items():
        dense, pruned = report["dense"], report["pruned"]
        if not rows:
            macs, params = millions(dense["macs"]), millions(dense["params"])
            rows.append(["dense", macs, "1.000", params, percent(dense["holdout_top1"])])
        share = f"{pruned['macs'] / dense['macs']:.3f}"
        top1 = percent(report["score_at_export"]["top1"])
        rows.append([name, millions(pruned["macs"]), share, millions(pruned["params"]), top1])
    console.print(table(f"exported models of {folder}, before fine-tuning", columns, rows))


def show_latencies(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """A table of all latencies, a row a model and a batch, and what keeps models from what their MACs promise."""
    rows, reasons = [], []
    for name, report in reports.items():
        runtimes = (report["latency_ms"], report["latency_ms_onnxruntime"])
        for batch in report["latency_ms"]:
            cells = [_latency_cells(times[batch]) if batch in times else ["-"] * 3 for times in runtimes]
            rows.append([name, batch, *cells[0], *cells[1]])
        reasons += [f"{name}, {where}: {said['why']}" for where, said in report["latency_why"].items()]
    columns = [f"{runtime}\n{what}" for runtime in ("torch", "ONNX Runtime") for what in ("dense", "pruned", "faster")]
    threads = " or ".join(sorted({str(report["latency_conditions"]["threads"]) for report in reports.values()}))
    title = f"milliseconds of {folder}: median (interquartile range), threads: {threads}"
    console.print(table(title, ["model", "images", *columns], rows))
    for reason in reasons:
        console.print(reason)
    targeted = {name: report["latency_target"] for name, report in reports.items() if "latency_target" in report}
    if targeted:
        keys = ("target", "predicted", "measured", "table_off_at_most")
        rows = [[name, one["batch"], *(percent(one[key]) for key in keys)] for name, one in targeted.items()]
        columns = ["model", "images", "target", "by the table", "measured", "table off by at most"]
        console.print(table("latency in PyTorch that was asked for, % of the dense model's", columns, rows))


def _latency_cells(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Dense and pruned time, and how many times as fast that is."""
    cells = [f"{one['median']:.1f} ({one['interquartile_range']:.1f})" for one in (times["dense"], times["pruned"])]
    return [*cells, f"{times['dense']['median'] / times['pruned']['median']:.2f} x"]


def show_profile(profile: Profile) -> None:
    """A table of where the time of a command went, the longest phase first."""
    total = sum(profile.seconds.values())
    phases = sorted(profile.seconds.items(), key=lambda item: -item[1])
    rows = [[name, f"{seconds:.2f}", percent(seconds / total)] for name, seconds in [*phases, ("all", total)]]
    console.print(table("where the time of this command went, imports apart", ["phase", "seconds", "%"], rows))


def percent(fraction: float) -> str:
    """A fraction in [0, 1] as percent with two decimals."""
    return f"{100 * fraction:.2f}"


def duration(seconds: float) -> str:
    """A time in the two largest units that it has.

    >>> duration(7384.0)
    '2 h 3 min'
    """
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def amount(cost: str, value: float) -> str:
    """A cost of COSTS in its unit.

    >>> amount("latency", 2.5e9), amount("macs", 1.5e6)
    ('2.50 ms', '1.50 M')
    """
    return f"{value / PS_PER_MS:.2f} ms" if cost == "latency" else millions(int(value))


def millions(count: int) -> str:
    """A count in millions with two decimals."""
    return f"{count / 1e6:.2f} M"
