"""Write one page to look at from run folders, at any stage of a run.

    python report.py runs/digits_resnet56
    python report.py runs/digits_resnet56 runs/uniform runs/taylor runs/random

Writes report/index.html into the first run's folder: its result, the trade-off curve with the other runs beside it,
keep ratios layer by layer, learning curves, time, how to load the models, settings; and what is not there yet, with the
command that makes it. The page is one file and fetches nothing. Run again, it is written anew.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cacp.checkpoint import write_atomically
from cacp.command import run_command
from cacp.locking import PAGES
from cacp.page import page
from cacp.reporting import console
from cacp.runfolder import RunFolder, read_run


def main() -> None:
    runs = [read_run(folder) for folder in dict.fromkeys(folders(sys.argv[1:]))]
    tell_apart(runs)
    for problem in (problem for run in runs for problem in run.problems):
        console.print(f"note: {problem}", markup=False)
    path = runs[0].folder / PAGES / "index.html"
    write_atomically(path, page(runs))
    console.print(f"wrote {path}; open it in a browser", markup=False)


def folders(argv: Sequence[str]) -> list[Path]:
    """The run folders of a command line."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder; the first one gets the page")
    runs: list[Path] = parser.parse_args(argv).runs
    return runs


def tell_apart(runs: Sequence[RunFolder]) -> None:
    """Name runs of equal names by their folders."""
    counts = Counter(run.label for run in runs)
    for run in runs:
        if counts[run.label] > 1:
            run.label = str(run.folder)


if __name__ == "__main__":
    run_command(main)
