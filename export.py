"""Turn the policies of a run into sliced models, check them and measure them.

    python export.py runs/digits_resnet56

Writes export/NAME/ for every policy: architecture.json, model.safetensors, report.json. Run again, it
skips what is done.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp.checkpoint import load_json, load_tensors, save_json, sha256
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.cost import counted_cost
from cacp.evaluation import device_of
from cacp.experiment import Experiment
from cacp.exporting import Architecture, measure_latency, save_pruned
from cacp.locking import only_writer
from cacp.pipeline import Workbench, build_workbench, check_run, environment, load_exported, select_device
from cacp.policies import load_policies, weights_path
from cacp.reporting import console, millions, percent, table
from cacp.schema import PolicyRecord, UserError

SCORE_TOLERANCE = 0.005  # of top-1 between search and export, both fp32 on the same images
LATENCY_BATCHES = (1, 64)  # images
_MEDIAN = {name: {"median": float} for name in ("dense", "pruned")}
REPORT = {
    "policy": {},
    "dense": {"macs": int, "params": int, "holdout_top1": float},
    "pruned": {"macs": int, "params": int},
    "score_at_export": {"top1": float},
    "latency_ms": {f"batch {batch}": _MEDIAN for batch in LATENCY_BATCHES},
}


def main() -> None:
    experiment = experiment_from(parse("export", __doc__, sys.argv[1:], run_argument=True))
    select_device(experiment.device)
    check_run(experiment)
    records = load_policies(experiment.folder)
    folders = {record.budget.name: experiment.folder / "export" / record.budget.name for record in records}
    missing = [budget.name for budget in experiment.budgets if budget.name not in folders]
    if missing:
        raise UserError(
            f"no policy yet for {', '.join(missing)}; run search.py (or prune.py) on this folder again first"
        )
    if not all(is_current(folders[record.budget.name], record) for record in records):
        with only_writer(experiment.folder):
            export_all(experiment, records, folders)
    reports = {name: load_json(folder / "report.json", REPORT) for name, folder in folders.items()}
    show_reports(reports, experiment.folder)
    console.print(f"next: bash scripts/finetune.sh {experiment.folder}")


def export_all(experiment: Experiment, records: Sequence[PolicyRecord], folders: Mapping[str, Path]) -> None:
    """Export the policies that are not, each to the folder of its name."""
    bench = build_workbench(experiment)
    for record in records:
        folder = folders[record.budget.name]
        if not is_current(folder, record):
            export(with_weights(bench, experiment.folder, record), experiment, record, folder)
            console.print(f"exported {folder}")


def is_current(folder: Path, record: PolicyRecord) -> bool:
    """Whether the folder holds the export of exactly this policy."""
    path = folder / "report.json"
    return path.is_file() and load_json(path, {"policy": {}})["policy"] == record.to_json()


def with_weights(bench: Workbench, folder: Path, record: PolicyRecord) -> Workbench:
    """The workbench of the weights that a policy goes with: the dense model's, or those that its method has trained.

    Raises:
        UserError: if these are not the ones that the policy file names.
    """
    if not record.weights_sha256:
        return bench
    path = weights_path(folder, record.budget.name)
    if not path.is_file() or sha256(path) != record.weights_sha256:
        raise UserError(
            f"{path} is missing or not the file of its policy; delete {folder}/policies and run prune.py again"
        )
    return bench.retrained(load_tensors(path))


def export(bench: Workbench, experiment: Experiment, record: PolicyRecord, folder: Path) -> None:
    """Slice, save, load again, compare, count, score and time one policy; report.json last.

    Raises:
        UserError: if the loaded model differs, its counted cost is not the closed form's, or its score is not that of
            the search.
    """
    dense = bench.dense
    sliced = bench.rescorer.sliced(record.policy)
    cost = bench.cost_model.cost([len(record.policy.keep[name]) for name in bench.cost_model.names])
    architecture = Architecture(
        model=experiment.model,
        classes=dense.classes,
        input_shape=dense.image_shape,
        normalisation=dense.normalisation,
        scope=record.scope,
        keep_counts=record.policy.counts,
        cost=cost,
        dense_cost=bench.cost_model.dense,
    )
    (folder / "report.json").unlink(missing_ok=True)  # it vouches for the model beside it
    save_pruned(folder, sliced, architecture)
    loaded = load_exported(experiment, folder).to(device_of(sliced)).to(memory_format=torch.channels_last)
    check_parity(sliced, loaded, bench)
    counted = counted_cost(loaded, dense.image_shape)
    if cost != record.score.cost:
        raise UserError(f"{folder}: the policy costs {cost}, but its file says {record.score.cost}; search again")
    if counted != cost:
        raise UserError(f"{folder}: the exported model costs {counted}, but the closed form says {cost}; report this")
    evaluation = bench.rescorer.evaluate(loaded)
    difference = abs(evaluation.top1 - record.score.top1)
    if difference > SCORE_TOLERANCE:
        raise UserError(
            f"{folder}: top-1 is {percent(evaluation.top1)} % now, but was {percent(record.score.top1)} % in the "
            "search; "
            "dense weights, data or calibration images are not those of the search"
        )
    report = {
        "policy": record.to_json(),
        "dense": {**bench.cost_model.dense._asdict(), "holdout_top1": bench.rescorer.evaluate(dense.model).top1},
        "pruned": {**cost._asdict(), "counted_macs": counted.macs, "size_bytes": _size(folder)},
        "score_at_search": record.score.to_json(),
        "score_at_export": evaluation._asdict(),
        "bit_equal_after_loading": True,
        "latency_ms": measured_latencies(dense.model, loaded, dense.image_shape),
        "environment": environment(bench.seed),
    }
    save_json(folder / "report.json", report)


def check_parity(sliced: nn.Module, loaded: nn.Module, bench: Workbench) -> None:
    """Refuse a loaded model whose output differs in a single bit.

    Raises:
        UserError: if it does.
    """
    images = torch.rand(8, *bench.dense.image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(device_of(sliced))
    with torch.inference_mode():
        if not torch.equal(sliced(images), loaded(images)):
            raise UserError("the exported model, loaded again, gives other outputs; report this with the policy file")


def measured_latencies(dense: nn.Module, pruned: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Milliseconds a batch of both models, measured in turn."""
    measured: dict[str, Any] = {}
    for batch in LATENCY_BATCHES:
        latencies = measure_latency([dense, pruned], image_shape, batch)
        measured[f"batch {batch}"] = {
            name: {"median": latency.median_ms, "interquartile_range": latency.spread_ms}
            for name, latency in zip(("dense", "pruned"), latencies, strict=True)
        }
    return measured


def _size(folder: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in load_tensors(folder / "model.safetensors").values())


def show_reports(reports: dict[str, dict[str, Any]], folder: Path) -> None:
    columns = ["model", "MACs", "of dense", "params", "top-1, %", f"ms/{LATENCY_BATCHES[-1]}", "speed"]
    rows: list[list[str]] = []
    for name, report in reports.items():
        dense, pruned = report["dense"], report["pruned"]
        latency = report["latency_ms"][f"batch {LATENCY_BATCHES[-1]}"]
        dense_ms, pruned_ms = (latency[key]["median"] for key in ("dense", "pruned"))
        if not rows:
            macs, params = millions(dense["macs"]), millions(dense["params"])
            rows.append(["dense", macs, "1.000", params, percent(dense["holdout_top1"]), f"{dense_ms:.1f}", "1.00 x"])
        rows.append(
            [
                name,
                millions(pruned["macs"]),
                f"{pruned['macs'] / dense['macs']:.3f}",
                millions(pruned["params"]),
                percent(report["score_at_export"]["top1"]),
                f"{pruned_ms:.1f}",
                f"{dense_ms / pruned_ms:.2f} x",
            ]
        )
    console.print(table(f"exported models of {folder}, before fine-tuning; latency of 64 images", columns, rows))


if __name__ == "__main__":
    run_command(main)
