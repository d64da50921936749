"""The figures of a page: trade-off, layers, learning, quantiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from cacp.figures import Series, comparison_figure, keep_figure, search_figure, training_figure
from cacp.history import Episode
from cacp.page.markup import Figures, Markup, joined, table, tag
from cacp.page.result import caveats, comparison, kept_parts, policy_title
from cacp.reporting import percent
from cacp.runfolder import PrunedModel, Rows, RunFolder, number
from cacp.sweep import sweep_figure

BEFORE = "Before fine-tuning, held-out validation images"
AFTER = "After fine-tuning, test images"
SEARCHED = "Best policies of the search, on the images that chose them"


def tradeoff(runs: Sequence[RunFolder], figures: Figures) -> Markup:
    """Top-1 over the MACs kept: all runs, before and after fine-tuning, and what the searches found."""
    run = runs[0]
    dense: dict[str, float | None] = {
        AFTER: next((number(model.tuned, "test_top1", "dense") for model in run.models if model.tuned), None),
        BEFORE: next((number(model.exported, "dense", "holdout_top1") for model in run.models if model.exported), None),
        SEARCHED: number(run.dense, "validation_top1"),
    }
    drawn = {
        AFTER: [_points(one, after=True) for one in runs],
        BEFORE: [_points(one, after=False) for one in runs],
        SEARCHED: [_front(one) for one in runs],
    }
    parts = [
        figures(
            comparison_figure(series, dense[title], steps=title == SEARCHED),
            f"{title}.",
            "The mean probability of the true class picks them." if title == SEARCHED else "",
        )
        for title, series in drawn.items()
        if any(one.x for one in series)
    ]
    if not parts:
        return Markup("")
    return joined([tag("div", *parts, class_="figures"), comparison(runs), *caveats(runs)])


def _points(run: RunFolder, after: bool) -> Series:
    """The pruned models of a run, by the MACs that they keep."""
    points = []
    for model in run.models:
        top1 = number(model.tuned, "test_top1", "after") if after else model.record.score.top1
        kept = kept_parts(run, model).get("MACs")
        if top1 is not None and kept:
            points.append((kept, 100 * top1))
    points.sort()
    return Series(run.label, [x for x, _ in points], [y for _, y in points])


def _front(run: RunFolder) -> Series:
    rows = [(row["macs_kept"], row["top1"]) for row in run.front if row.get("macs_kept") and row.get("top1")]
    return Series(run.label, [x or 0.0 for x, _ in rows], [100 * (y or 0.0) for _, y in rows])


def layers(runs: Sequence[RunFolder], figures: Figures) -> Markup:
    """Keep ratios layer by layer: of the first run's policies, and of those of the others for the same budgets."""
    run = runs[0]
    if not run.models:
        return Markup("")
    counts = {model.name: model.record.policy.counts for model in run.models}
    names = list(dict.fromkeys(itertools.chain.from_iterable(counts.values())))
    same = [other for other in runs if other.settings.get("model") == run.settings.get("model")]
    budgets = {
        policy_title(model): [
            _ratios(other, one, names) for other in same for one in other.models if one.name == model.name
        ]
        for model in run.models
    }
    rows = [
        [name, run.channels.get(name), *(_count(run, name, one.get(name)) for one in counts.values())] for name in names
    ]
    columns = ["group", "channels", *map(policy_title, run.models)]
    detail = table("Channels kept, and their part of the group's in %.", columns, rows)
    title = "Keep ratios layer by layer, from the input to the output."
    return joined([figures(keep_figure(names, budgets), title), tag("details", tag("summary", "As a table"), detail)])


def _ratios(run: RunFolder, model: PrunedModel, names: Sequence[str]) -> Series:
    """Keep ratios of the groups that a policy and the first run's have in common, in percent."""
    counts = model.record.policy.counts
    shared = [
        (position, 100 * counts[name] / run.channels[name])
        for position, name in enumerate(names)
        if name in counts and name in run.channels
    ]
    return Series(run.label, [position for position, _ in shared], [ratio for _, ratio in shared])


def _count(run: RunFolder, group: str, count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count} ({100 * count / run.channels[group]:.0f} %)" if group in run.channels else str(count)


def learning(run: RunFolder, figures: Figures, folded: bool) -> list[Markup]:
    """Search, training and fine-tuning of a run while they went on; `folded` for a run beside the first."""
    parts = [*_search_curves(run, figures)]
    tuning = {policy_title(model): model.epochs for model in run.models if model.epochs}
    trainings = {"Fine-tuning": tuning, "Training of the method": run.method_epochs, "Training of the dense model": {}}
    if run.dense_epochs:
        trainings["Training of the dense model"] = {"dense": run.dense_epochs}
    for title, curves in trainings.items():
        parts += _training_curves(title, {name: rows for name, rows in curves.items() if rows}, figures)
    if not parts:
        return []
    grid = tag("div", *parts, class_="figures")
    return [tag("details", tag("summary", f"The same of {run.label}"), grid)] if folded else [grid]


def _search_curves(run: RunFolder, figures: Figures) -> Iterator[Markup]:
    if not run.episodes:
        return
    budgets: dict[str, list[Episode]] = {}
    asked = run.budgets
    for episode in run.episodes:
        nearest = min(asked, key=lambda budget: abs(budget.mean_target - episode.target), default=None)
        budgets.setdefault(nearest.name if nearest else f"target {episode.target:g}", []).append(episode)
    budgets = dict(sorted(budgets.items()))
    title = f"Search: {len(run.episodes)} of {run.settings.get('episodes', '?')} episodes."
    about = "A dot is an episode, the line the best policy so far, by the mean probability of the true class."
    yield figures(search_figure("top1", "top-1 on the images of the search, %", budgets), title, about)
    yield figures(search_figure("reward", "reward", budgets), "Reward of the same episodes.")


def _training_curves(title: str, curves: Mapping[str, Rows], figures: Figures) -> Iterator[Markup]:
    if curves:
        yield figures(training_figure("top1", "top-1, %", curves), f"{title}: top-1.")
        yield figures(training_figure("loss", "loss, nats", curves), f"{title}: loss.")


def quantiles(run: RunFolder, figures: Figures) -> Markup:
    """The plots of a GFI-AP sweep."""
    if not run.sweep:
        return Markup("")
    title = "What every quantile of all filters gives."
    rows = [
        [f"{row.quantile:g}", f"{row.threshold:.4g}", percent(row.macs), percent(row.params), percent(row.top1)]
        for row in run.sweep
    ]
    columns = ["quantile", "threshold", "MACs kept, %", "params kept, %", "top-1 before, validation, %"]
    return joined([figures(sweep_figure(run.folder, run.sweep), title), table(title, columns, rows)])
