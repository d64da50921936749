"""What `benchmarks.search_quality` concludes from its cells: means, standard errors, differences from ours by seed."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.environment import environment

OURS = "cacp"
NUMBERS = ("top1", "loss", "probability")

Summaries = dict[str, Any]  # by searcher and target


def conclude(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], targets: Sequence[float], settings: dict[str, Any]
) -> None:
    """Write what was measured, with the settings that it was measured with, and print the tables."""
    models = tables(rows, targets)
    result = {"judged_on": arguments.judge, "targets": targets, **settings, "models": models, "cells": rows}
    save_json(arguments.result, portable({**result, "environment": environment(0)}))
    show(models)


def tables(rows: list[dict[str, Any]], targets: Sequence[float]) -> dict[str, dict[str, Summaries]]:
    """`summed_up` for every model of the rows and every number."""
    models = dict.fromkeys(row["model"] for row in rows)
    return {
        model: {
            number: summed_up([row for row in rows if row["model"] == model], targets, number) for number in NUMBERS
        }
        for model in models
    }


def summed_up(rows: list[dict[str, Any]], targets: Sequence[float], number: str = "top1") -> Summaries:
    """By searcher: a number at every target and on the mean of the targets, over the seeds.

    Args:
        rows: cells of one model, each with "searcher", "seed" and "measured": target -> numbers of what it picked.
        targets: that the mean is over.
        number: one of NUMBERS.

    Returns:
        For each searcher and target (and "mean"): mean, standard error (None for one seed), number of seeds, and the
        same of ours minus it, seed by seed. A target for which a searcher found nothing in some seed is left out.
    """
    names = [f"{target:.2f}" for target in targets]
    by_searcher: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        values = {target: measured[number] for target, measured in row["measured"].items()}
        if set(names) <= set(values):
            values["mean"] = statistics.mean(values[name] for name in names)
        by_searcher.setdefault(row["searcher"], {})[row["seed"]] = values
    ours = by_searcher.get(OURS, {})
    return {searcher: _summary(seeds, ours) for searcher, seeds in by_searcher.items()}


def _summary(seeds: dict[int, dict[str, float]], ours: dict[int, dict[str, float]]) -> dict[str, Any]:
    common = set.intersection(*(set(tops) for tops in seeds.values()))
    summary: dict[str, Any] = {}
    for target in sorted(common):
        values = [tops[target] for tops in seeds.values()]
        differences = [
            ours[seed][target] - tops[target] for seed, tops in seeds.items() if target in ours.get(seed, {})
        ]
        summary[target] = {**_mean(values), "ours_minus_it": _mean(differences) if differences else None}
    return summary


def _mean(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_error": error, "seeds": len(values)}


def show(models: dict[str, dict[str, Summaries]]) -> None:
    """Print a table a model and number, the best on the mean first."""
    for model, numbers in models.items():
        for number, searchers in numbers.items():
            print(model, number)
            sign = 1 if number == "loss" else -1
            for name in sorted(searchers, key=lambda name: sign * _shown_mean(searchers[name], number)):
                cells = [f"{target} {_cell(value, number)}" for target, value in searchers[name].items()]
                print(f"  {name:20}", "  ".join(cells))


def _shown_mean(summary: dict[str, Any], number: str) -> float:
    """The mean over the targets; the worst where there is none."""
    return float(summary["mean"]["mean"]) if "mean" in summary else (math.inf if number == "loss" else -math.inf)


def _cell(value: dict[str, Any], number: str) -> str:
    scale, digits = (1, 3) if number == "loss" else (100, 2)
    error = value["standard_error"]
    return f"{scale * value['mean']:5.{digits}f}" + ("" if error is None else f" +- {scale * error:.{digits}f}")
