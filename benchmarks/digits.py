"""What a new user does first, timed: search_export.sh and finetune.sh on the digits, for several seeds.

    python -m benchmarks.digits --seeds 0 1 2 --output results/digits.json

Every command runs in a process of its own, in a fresh run folder runs/digits_seed_N; wall seconds, peak memory of its
largest process, test top-1 dense, before and after fine-tuning. A seed whose run folder is there is refused.
"""

import argparse
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from cacp.checkpoint import load_json, save_json
from cacp.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    runs = {str(seed): measured(seed) for seed in arguments.seeds}
    names = runs[str(arguments.seeds[0])]["models"]
    changes = {
        name: [100 * (run["models"][name]["after"] - run["models"][name]["dense"]) for run in runs.values()]
        for name in names
    }
    summary = {
        "runs": runs,
        "dense_test_top1": _spread([run["models"]["macs-0.50"]["dense"] for run in runs.values()]),
        "points_after_minus_dense": {name: _spread(values) for name, values in changes.items()},
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "environment": environment(arguments.seeds[0]),
    }
    save_json(arguments.output, summary)
    print(f"dense {summary['dense_test_top1']}, after - dense in points {summary['points_after_minus_dense']}")


def measured(seed: int) -> dict[str, Any]:
    folder = Path(f"runs/digits_seed_{seed}")
    if folder.exists():
        raise SystemExit(f"{folder} is there already; move it away, a resumed run cannot be timed")
    seconds = {
        "search_export": _timed("scripts/search_export.sh", "digits", "--seed", str(seed), "--output", str(folder)),
        "finetune": _timed("scripts/finetune.sh", str(folder)),
    }
    results = {path.parent.name: load_json(path) for path in sorted(folder.glob("finetune/*/result.json"))}
    return {"seconds": seconds, "models": {name: result["test_top1"] for name, result in results.items()}}


def _timed(script: str, *arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run(["bash", script, *arguments], check=True)
    return round(time.perf_counter() - start, 1)


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()
