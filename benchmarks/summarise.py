"""One JSON and one table of several runs on the same data: every exported model on the test images.

    python -m benchmarks.summarise RUN [RUN ...] --output results/NAME.json

For each run: method, seconds of its search, and for each policy MACs, top-1 in the search, scored again, on the test
images before fine-tuning, and (where there is a fine-tuning) after it; of networks with single weights zero, which are
not exported, their results.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import yaml

from cacp.checkpoint import load_json, save_json
from cacp.data import ImageData, load_dataset
from cacp.environment import environment
from cacp.evaluation import evaluate_data
from cacp.exporting import load_architecture, load_pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders, exported where there is something to export; the same data set"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    settings = yaml.safe_load((arguments.runs[0] / "config.yaml").read_text())
    test = load_dataset(settings["dataset"], "test", Path(settings["data_dir"]), settings["image_size"])
    summary = {
        "dense": load_json(arguments.runs[0] / "dense" / "result.json"),
        "runs": {run.name: summarised(run, test) for run in arguments.runs},
        "environment": environment(settings["seed"]),
    }
    save_json(arguments.output, portable(summary))
    for name, run in summary["runs"].items():
        for budget, row in run["policies"].items():
            tops = [row["test_top1_before"]] + ([row["finetuned"]["test_top1"]["after"]] if row["finetuned"] else [])
            test_top1 = " -> ".join(f"{100 * top1:.2f} %" for top1 in tops)
            print(f"{name:24} {budget} {row['macs'] / row['dense_macs']:.4f} test {test_top1}")


def summarised(run: Path, test: ImageData) -> dict[str, Any]:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    places = ("output", "data_dir", "weights", "device", "workers")
    return {
        "settings": {key: value for key, value in settings.items() if key not in places and value is not None},
        "search_seconds": search_seconds(run / "search" / "episodes.csv"),
        "environment": load_json(run / "environment.json"),
        "policies": {folder.name: policy_row(run, folder.name, test) for folder in sorted((run / "export").glob("*"))},
        "unstructured": {
            folder.name: load_json(folder / "result.json") for folder in sorted((run / "unstructured").glob("*"))
        },
    }


def portable(value: Any) -> Any:
    """The same data with absolute paths cut to their last part: results are read on other machines."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = ("", "", value) if value.startswith("/") else value.partition("=")  # resnet20=FILE
    return name + equals + Path(path).name if path.startswith("/") else value


def search_seconds(episodes: Path) -> float | None:
    if not episodes.is_file():
        return None
    with episodes.open(newline="") as file:
        return round(sum(float(row["seconds"]) for row in csv.DictReader(file)), 1)


def policy_row(run: Path, name: str, test: ImageData) -> dict[str, Any]:
    folder = run / "export" / name
    report, architecture = load_json(folder / "report.json"), load_architecture(folder)
    finetuned = run / "finetune" / name / "result.json"
    policy = report["policy"]
    return {
        "method": policy["method"],
        "episode": policy["episode"],
        "macs": architecture.cost.macs,
        "params": architecture.cost.params,
        "dense_macs": architecture.dense_cost.macs,
        "top1_in_search": policy["search_score"]["top1"],
        "top1_scored_again": policy["score"]["top1"],
        "test_top1_before": evaluate_data(load_pruned(folder), test, architecture.normalisation).top1,
        "latency_ms": report["latency_ms"],
        "keep_counts": policy["keep_counts"],
        "finetuned": load_json(finetuned) if finetuned.is_file() else None,
    }


if __name__ == "__main__":
    main()
