"""What a person sees: progress on the screen, tables, TensorBoard, figures."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from cacp.checkpoint import save_csv, write_atomically
from cacp.history import Candidate, Episode
from cacp.policies import load_policies
from cacp.profiling import Profile
from cacp.schema import ChannelGroups, Cost
from cacp.shipping import FILES
from cacp.training import EpochRecord

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_LINES = 10  # progress lines of a command whose output is no terminal


class ProgressLine:
    """A progress bar with the time left on a terminal; elsewhere a line after the first and the tenth step and every
    tenth of the work.

    Args:
        title: of the work.
        total: steps in all.
        done: steps that an earlier call has done.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first, self._done = title, total, done, done
        self._start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, status: str, seconds: float | None = None) -> None:
        """One step more; `status` says how it stands, `seconds` what a step takes where that is known better."""
        self._done += 1
        self._bar.update(self._task, advance=1, description=f"{self._title} {status}")
        share, steps = max(1, self._total // _LINES), self._done - self._first
        if not console.is_terminal and (steps in (1, 10) or self._done % share == 0 or self._done == self._total):
            spent = time.monotonic() - self._start
            left = (seconds or spent / steps) * (self._total - self._done)
            console.print(f"{self._title} {self._done}/{self._total} {status}, {left:.0f} s left")


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
    logger.record(f"{target}/best top1", best)
    logger.record("search/seconds", episode.seconds)
    logger.record("search/reward", episode.reward)
    for name, count, whole in zip(names, episode.counts, channels, strict=True):
        logger.record(f"keep {target}/{name}", count / whole)


def log_best_policy(logger: Logger, groups: ChannelGroups, budget: str, episode: Episode) -> None:
    """Record the figure of the best policy of a budget, by its name, in TensorBoard."""
    figure = policy_figure(groups, episode.counts, f"{budget}: top-1 {100 * episode.top1:.1f} %")
    logger.record(f"target {budget}/best policy", LoggedFigure(figure, close=True), exclude=("stdout", "csv"))


def policy_figure(groups: ChannelGroups, counts: Sequence[int], title: str) -> Figure:
    """Bars of the kept channels of every prunable group, in front of all of them."""
    prunable = groups.prunable
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    positions = range(len(prunable))
    axes.bar(positions, [group.channels for group in prunable], color="#d9dde3", label="channels")
    axes.bar(positions, counts, color="#2563a8", label="kept")
    axes.set_xticks(positions, [group.name for group in prunable], rotation=90, fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return figure


def save_tradeoff(folder: Path, front: Sequence[Candidate], dense: Cost) -> None:
    """Write the trade-off curve of a search: tradeoff.csv, a row a policy, and tradeoff.svg.

    Args:
        folder: of the search.
        front: from `cacp.history.tradeoff`.
        dense: cost of the dense model.
    """
    kept = [one.score.cost.macs / dense.macs for one in front]
    rows = [
        [f"{part:.6f}", one.score.cost.macs, *one.score[:3], one.episode] for part, one in zip(kept, front, strict=True)
    ]
    save_csv(folder / "tradeoff.csv", [["macs_kept", "macs", "top1", "loss", "probability", "episode"], *rows])
    figure = new_figure(6, 4)
    axes = figure.subplots()
    lines = {"probability of the true class, which picks the policy": "probability", "top-1 of that policy": "top1"}
    for (label, number), colour in zip(lines.items(), ("#2563a8", "#b45309"), strict=True):
        values = [100 * getattr(one.score, number) for one in (*front, front[-1])]
        axes.step([*kept, 1.0], values, where="post", color=colour, label=label)
    axes.set_xlabel("MACs kept at most")
    axes.set_ylabel("on the validation images, before fine-tuning, %")
    axes.legend(frameon=False)
    save_figure(folder / "tradeoff.svg", figure)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; matplotlib's windows and global state stay out of it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as SVG."""
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    write_atomically(path, image.getvalue())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table for the console; the first column to the left, the others to the right."""
    result = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        result.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


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
            console.print(f"  no {FILES[name]}: {form['missing']}", markup=False)


def show_policies(folder: Path, names: Sequence[str]) -> None:
    """A table of the named policies of a run folder."""
    rows = [
        [
            record.budget.name,
            millions(record.score.cost.macs),
            millions(record.score.cost.params),
            percent(record.search_score.top1),
            percent(record.score.top1),
            record.episode or "-",
        ]
        for record in load_policies(folder)
        if record.budget.name in names
    ]
    columns = ["policy", "MACs", "params", "searched, %", "scored again, %", "episode"]
    title = f"policies of {folder}: top-1 before fine-tuning on the images of the search, and on as many others"
    console.print(table(title, columns, rows))


def show_profile(profile: Profile) -> None:
    """A table of where the time of a command went, the longest phase first."""
    total = sum(profile.seconds.values())
    phases = sorted(profile.seconds.items(), key=lambda item: -item[1])
    rows = [[name, f"{seconds:.2f}", percent(seconds / total)] for name, seconds in [*phases, ("all", total)]]
    console.print(table("where the time of this command went, imports apart", ["phase", "seconds", "%"], rows))


def percent(fraction: float) -> str:
    """A fraction in [0, 1] as percent with two decimals."""
    return f"{100 * fraction:.2f}"


def millions(count: int) -> str:
    """A count in millions with two decimals."""
    return f"{count / 1e6:.2f} M"
