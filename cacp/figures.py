"""Figures of a run, in matplotlib: of a search while it runs, and for the page of `cacp.page`.

Every series has a marker and a line of its own, so that a figure can be read without its colours. `COLOURS` are those
of a white page; the page replaces each, and INK, FAINT and WHOLE, by one that follows the reader's theme.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cacp.checkpoint import save_csv, write_atomically
from cacp.history import Candidate, Episode
from cacp.schema import ChannelGroups, Cost

COLOURS = ("#2563a8", "#b45309", "#0f766e", "#9333a8", "#b91c4a", "#4d7c0f", "#52607a", "#7c4a2d")
INK, FAINT, WHOLE = "#1f2937", "#c3c9d2", "#d9dde3"
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
_SIZE = (5.2, 3.4)  # inches; text stays readable where a phone shrinks it
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",  # text that can be read, searched and copied
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
styled = matplotlib.rc_context(_STYLE)  # a decorator of what draws


class Series(NamedTuple):
    """Points of a line, by its label."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; matplotlib's windows and global state stay out of it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@styled
def svg(figure: Figure, transparent: bool = False) -> str:
    """A figure as SVG, the same for the same figure."""
    image = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cacp"}):
        figure.savefig(image, format="svg", metadata={"Date": None}, transparent=transparent)
    return image.getvalue()


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as SVG."""
    write_atomically(path, svg(figure))


@styled
def policy_figure(groups: ChannelGroups, counts: Sequence[int], title: str) -> Figure:
    """Bars of the kept channels of every prunable group, in front of all of them."""
    prunable = groups.prunable
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    axes.grid(axis="x", visible=False)
    positions = range(len(prunable))
    axes.bar(positions, [group.channels for group in prunable], color=WHOLE, label="channels")
    axes.bar(positions, counts, color=COLOURS[0], label="kept")
    axes.set_xticks(positions, [group.name for group in prunable], rotation=90, fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.legend()
    return figure


@styled
def tradeoff_figure(front: Sequence[Candidate], dense: Cost) -> Figure:
    """The trade-off curve of a search, `front` from `cacp.history.tradeoff`."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    kept = [one.score.cost.macs / dense.macs for one in front]
    lines = {"probability of the true class, which picks the policy": "probability", "top-1 of that policy": "top1"}
    for (label, number), colour, line in zip(lines.items(), COLOURS, LINES, strict=False):
        values = [100 * getattr(one.score, number) for one in (*front, front[-1])]
        axes.step([*kept, 1.0], values, line, where="post", color=colour, label=label)
    axes.set_xlabel("MACs kept at most")
    axes.set_ylabel("on the validation images, before fine-tuning, %")
    axes.legend()
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
    save_figure(folder / "tradeoff.svg", tradeoff_figure(front, dense))


@styled
def comparison_figure(runs: Sequence[Series], dense: float | None, steps: bool = False) -> Figure:
    """Top-1 over the MACs kept, a line a run; the first lies in front, the others have hollow marks around its.

    Args:
        runs: x is the part of the dense MACs, y top-1 in percent; one without points keeps its look for itself.
        dense: top-1 of the dense model in [0, 1], where it is known.
        steps: a run's policies are the best with at most so many MACs.
    """
    figure = new_figure(*_SIZE)
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(100 * dense, color=INK, linewidth=0.8, linestyle=":", label=f"dense, {100 * dense:.2f} %")
    for number, (series, look) in enumerate(zip(runs, _looks(len(runs)), strict=True)):
        if series.x:
            fill = look["color"] if number == 0 else "none"
            shown = {**look, "markerfacecolor": fill, "markersize": 5 + 2 * number, "zorder": 3 - 0.1 * number}
            axes.plot(series.x, series.y, label=series.label, drawstyle="steps-post" if steps else "default", **shown)
    axes.set_ylabel("top-1, %")
    axes.set_xlabel("MACs kept, of the dense model's")
    axes.legend()
    return figure


@styled
def keep_figure(names: Sequence[str], budgets: Mapping[str, Sequence[Series]]) -> Figure:
    """Keep ratios layer by layer: a panel a budget, bars for the first run and marks for the others.

    Args:
        names: of the groups, in forward order.
        budgets: name -> the runs that have a policy for it; x is the position of a group, y its keep ratio in percent.
    """
    figure = new_figure(max(_SIZE[0], 0.2 * len(names)), 1.5 * len(budgets) + 1.3)
    labels = list(dict.fromkeys(series.label for runs in budgets.values() for series in runs))
    looks = dict(zip(labels, _looks(len(labels)), strict=True))
    rows = list(figure.subplots(len(budgets), 1, squeeze=False)[:, 0])
    for axes, (budget, runs) in zip(rows, budgets.items(), strict=True):
        axes.grid(axis="x", visible=False)
        for position, series in enumerate(runs):
            look = looks[series.label]
            if position == 0:
                axes.bar(series.x, series.y, color=look["color"], label=series.label)
            else:
                axes.plot(series.x, series.y, label=series.label, **{**look, "linestyle": "none", "markersize": 4})
        axes.set_ylim(0, 105)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel("kept, %")
        axes.set_title(budget, loc="left")
        axes.set_xticks(range(len(names)), names if axes is rows[-1] else [""] * len(names), rotation=90, fontsize=7)
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
    return figure


@styled
def search_figure(number: str, label: str, budgets: Mapping[str, Sequence[Episode]]) -> Figure:
    """A number of the episodes in order, a colour a budget; the line is that of the best policy so far, which the
    probability of the true class picks.

    Args:
        number: field of an episode; top1 is drawn in percent.
        label: of the axis.
        budgets: name -> the episodes played for it.
    """
    figure = new_figure(*_SIZE)
    axes = figure.subplots()
    factor = 100 if number == "top1" else 1
    last = max(played[-1].episode for played in budgets.values())
    for (name, played), look in zip(budgets.items(), _looks(len(budgets)), strict=True):
        episodes = [episode.episode for episode in played]
        values = [factor * getattr(episode, number) for episode in played]
        best = [factor * getattr(episode, number) for episode in _best_so_far(played)]
        dots = {**look, "linestyle": "none"}
        axes.plot(episodes, values, **dots, markersize=4, alpha=0.7, markeredgewidth=0)
        axes.step([*episodes, last], [*best, best[-1]], where="post", color=look["color"])
        axes.plot([], [], color=look["color"], marker=look["marker"], label=name)
    axes.set_ylabel(label)
    axes.set_xlabel("episode")
    axes.legend()
    return figure


@styled
def training_figure(number: str, label: str, trainings: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Figure:
    """top1 (in percent) or loss over the epochs of several trainings, rows of their epochs.csv; training images
    dashed."""
    figure = new_figure(*_SIZE)
    axes = figure.subplots()
    factor = 100 if number == "top1" else 1
    for (name, rows), look in zip(trainings.items(), _looks(len(trainings)), strict=True):
        for images, line in (("validation", "-"), ("train", "--")):
            drawn = [
                (row["epoch"], factor * value) for row in rows if (value := row.get(f"{images}_{number}")) is not None
            ]
            if drawn:
                epochs, values = zip(*drawn, strict=True)
                shown = {**look, "linestyle": line, "markersize": 3}
                axes.plot(epochs, values, label=f"{name}, {images} images", **shown)
    axes.set_ylabel(label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def _best_so_far(episodes: Sequence[Episode]) -> Iterator[Episode]:
    return itertools.accumulate(episodes, lambda best, new: new if new.probability > best.probability else best)


def _looks(count: int) -> list[dict[str, Any]]:
    """Colour, marker and line of so many series."""
    pairs = zip(range(count), itertools.cycle(COLOURS), strict=False)
    return [
        {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)]}
        for number, colour in pairs
    ]
