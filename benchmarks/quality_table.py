"""What `benchmarks.search_quality` concludes from its cells: means, standard errors, differences from ours by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

OURS = "cacp"


def summed_up(rows: list[dict[str, Any]], targets: Sequence[float]) -> dict[str, Any]:
    """By searcher: top-1 of every target and on the mean of the targets, over the seeds.

    Args:
        rows: cells of one model, each with "searcher", "seed" and "measured": target -> top1 of what it picked.
        targets: that the mean is over.

    Returns:
        For each searcher and target (and "mean"): mean, standard error (None for one seed), number of seeds, and the
        same of ours minus it, seed by seed. A target for which a searcher found nothing in some seed is left out.
    """
    names = [f"{target:.2f}" for target in targets]
    by_searcher: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        tops = {target: measured["top1"] for target, measured in row["measured"].items()}
        if set(names) <= set(tops):
            tops["mean"] = statistics.mean(tops[name] for name in names)
        by_searcher.setdefault(row["searcher"], {})[row["seed"]] = tops
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


def show(models: dict[str, dict[str, Any]]) -> None:
    """Print a table a model, the best on the mean first."""
    for model, searchers in models.items():
        print(model)
        order = sorted(searchers, key=lambda name: -searchers[name].get("mean", {"mean": 0.0})["mean"])
        for name in order:
            cells = [f"{target} {_cell(value)}" for target, value in searchers[name].items()]
            print(f"  {name:12}", "  ".join(cells))


def _cell(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return f"{100 * value['mean']:5.2f}" + ("" if error is None else f" +- {100 * error:.2f}")
