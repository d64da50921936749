"""The page of a run: one file to look at, from whatever the run folders hold."""

from __future__ import annotations

from collections.abc import Sequence

from cacp.page.about import problems, setup, times, unfinished, usage
from cacp.page.curves import layers, learning, quantiles, tradeoff
from cacp.page.markup import Figures, document, joined, sections, tag
from cacp.page.result import answer
from cacp.runfolder import RunFolder


def page(runs: Sequence[RunFolder]) -> str:
    """The page of the first run, compared with the others.

    Args:
        runs: at least one, with different labels.
    """
    run, figures = runs[0], Figures()
    settings = run.settings
    subject = f"{settings.get('model', 'a network')} on {settings.get('dataset', 'unknown data')}"
    pruned = f", pruned by {run.method}" if run.method else ", not pruned yet"
    parts = {
        "Result": answer(run),
        "Not there yet": joined([*unfinished(run), *problems(runs)]),
        "Trade-off": tradeoff(runs, figures),
        "Layers": layers(runs, figures),
        "Learning": joined([part for one in runs for part in learning(one, figures, one is not run)]),
        "Quantiles": quantiles(run, figures),
        "Time": times(run),
        "Use it": usage(run),
        "Settings": setup(run),
    }
    header = [tag("h1", run.label), tag("p", f"{subject}{pruned}. Folder: ", tag("code", run.folder))]
    return document(f"{run.label}: {subject}", tag("header", *header), *sections(parts))


__all__ = ["page"]
