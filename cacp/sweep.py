"""The quantiles of a GFI-AP run: sweep/sweep.csv, a row each, and the six plots over them, sweep/sweep.svg."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from cacp.checkpoint import load_json, save_csv
from cacp.figures import COLOURS, new_figure, save_figure, styled
from cacp.parsing import bounded
from cacp.schema import UserError

_NAME = re.compile(r"macs-[01]\.\d+")


class SweepRow(NamedTuple):
    """A quantile with its threshold, the policy that it gave, by name, and what that keeps and scores before
    fine-tuning, on the second half of the validation images; `seconds` is the time of pruning and retraining, without
    the pass over the images that serves all quantiles, and without fine-tuning.
    """

    quantile: float
    threshold: float
    policy: str
    macs: float
    params: float
    top1: float
    seconds: float

    @classmethod
    def from_row(cls, row: dict[str, str]) -> SweepRow:
        values = {name: float(row[name]) for name in cls._fields if name != "policy"}
        if not bounded(values.values()) or not _NAME.fullmatch(row["policy"]):
            raise ValueError(f"{row!s:.300} is no row of a sweep")
        return cls(policy=row["policy"], **values)


def load_sweep(folder: Path) -> list[SweepRow]:
    """The rows of a run folder so far, by quantile.

    Raises:
        UserError: for a damaged file.
    """
    path = folder / "sweep" / "sweep.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [SweepRow.from_row(row) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it and run prune.py again") from error
    return sorted(rows)


def save_sweep(folder: Path, rows: Sequence[SweepRow]) -> None:
    """Write the rows, and the plots."""
    rows = sorted(rows)
    save_csv(folder / "sweep" / "sweep.csv", [SweepRow._fields, *rows])
    save_figure(folder / "sweep" / "sweep.svg", sweep_figure(folder, rows))


@styled
def sweep_figure(folder: Path, rows: Sequence[SweepRow]) -> Figure:
    """Six plots over the quantiles: threshold, macs, params, top-1 before and after fine-tuning, seconds.

    Top-1 after it is on the test images, where finetune.py is done with a policy; seconds then include it.
    """
    results = {}
    for row in rows:
        path = folder / "finetune" / row.policy / "result.json"
        if path.is_file():
            results[row.policy] = load_json(path, {"test_top1": {"after": float}, "seconds": float})
    tuned = [row for row in rows if row.policy in results]
    seconds = [row.seconds + results.get(row.policy, {"seconds": 0.0})["seconds"] for row in rows]
    plots = {
        "threshold on the importance": (rows, [row.threshold for row in rows]),
        "MACs kept": (rows, [row.macs for row in rows]),
        "parameters kept": (rows, [row.params for row in rows]),
        "top-1 before fine-tuning, validation, %": (rows, [100 * row.top1 for row in rows]),
        "top-1 after fine-tuning, test, %": (tuned, [100 * results[row.policy]["test_top1"]["after"] for row in tuned]),
        "seconds, fine-tuning included": (rows, seconds),
    }
    figure = new_figure(10, 5.5)
    for axes, (title, (drawn, values)) in zip(figure.subplots(2, 3).flat, plots.items(), strict=True):
        axes.plot([row.quantile for row in drawn], values, "o-", color=COLOURS[0], gid=title.partition(",")[0])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("quantile of all filters", fontsize=8)
        axes.set_xlim(rows[0].quantile - 0.05, rows[-1].quantile + 0.05)
    return figure
