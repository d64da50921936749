"""A complete search, timed: `search.py` as a process of its own, from its start to its end.

    python -m benchmarks.whole_search --result results/whole_search.json --config FILE [settings of search.py]

Everything behind --result is handed to search.py, with --profile. The JSON holds the wall seconds, where they went, and
the policies that were found. A run folder that is there already is refused: a resumed search cannot be timed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.summarise import portable
from cacp.checkpoint import load_json, save_json
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.environment import environment
from cacp.policies import load_policies
from cacp.schema import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", required=True, type=Path, help="JSON file to write")
    arguments, words = parser.parse_known_args()
    experiment = experiment_from(parse("search", "", words))
    if experiment.folder.exists():
        raise UserError(f"{experiment.folder} is there already; move it away, or use another --output")
    start = time.perf_counter()
    subprocess.run([sys.executable, "search.py", *words, "--profile"], check=True)
    seconds = time.perf_counter() - start
    records = load_policies(experiment.folder)
    result = {
        "wall_seconds": seconds,
        "episodes": experiment.episodes,
        "seconds_an_episode": seconds / experiment.episodes,
        "phase_seconds": load_json(experiment.folder / "search" / "profile.json"),
        "policies": {record.budget.name: record.to_json() for record in records},
        "dense": load_json(experiment.folder / "dense" / "result.json"),
        "settings": {key: value for key, value in vars(experiment).items() if key not in ("output", "data_dir")},
        "threads": torch.get_num_threads(),
        "environment": environment(experiment.seed),
    }
    save_json(arguments.result, portable(result))
    print(f"{experiment.episodes} episodes in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
