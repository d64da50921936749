"""Turn the policies of a run into sliced models, check them, measure them, and write them in every form to ship.

    python export.py runs/digits_resnet56

Writes export/NAME/ for every policy: architecture.json and model.safetensors (load_pruned reads them), model.py,
model.onnx and model.pt2 (which need nothing of this project), report.json. Run again, it skips what is done.
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
from cacp.environment import environment
from cacp.evaluation import Evaluation, device_of
from cacp.experiment import Experiment
from cacp.exporting import Architecture, checksums, finished, save_pruned
from cacp.latency import BATCHES, LatencyBench
from cacp.latency_table import LatencyTable
from cacp.locking import only_writer
from cacp.pipeline import Workbench, build_workbench, check_run, load_exported, select_device
from cacp.policies import load_policies, weights_path
from cacp.reporting import console, percent, show_exports, show_files, show_latencies
from cacp.schema import Cost, PolicyRecord, UserError
from cacp.shipping import FILES, forms_of, ship, unshipped

SCORE_TOLERANCE = 0.005  # of top-1 between search and export, both fp32 on the same images
_TIMES = {
    f"batch {batch}": {name: {"median": float, "interquartile_range": float} for name in ("dense", "pruned")}
    for batch in BATCHES
}
REPORT = {
    "policy": {},
    "dense": {"macs": int, "params": int, "holdout_top1": float},
    "pruned": {"macs": int, "params": int},
    "score_at_export": {"top1": float},
    "forms": {str: {}},
    "latency_ms": _TIMES,
    "latency_ms_onnxruntime": {},
    "latency_conditions": {"threads": int},
    "latency_why": {str: {"why": str}},
}
TARGETED = {
    "target": float, "batch": int, "predicted": float, "measured": float, "table_off_at_most": float, "table": str,
}  # fmt: skip


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
    pairs = zip(folders.values(), records, strict=True)
    if any(is_lacking(finished_report(folder, record), folder, experiment) for folder, record in pairs):
        with only_writer(experiment.folder):
            export_all(experiment, records, folders)
    reports = {name: load_report(folder) for name, folder in folders.items()}
    show_exports(reports, experiment.folder)
    show_latencies(reports, experiment.folder)
    console.print(f"next: bash scripts/finetune.sh {experiment.folder}")


def export_all(experiment: Experiment, records: Sequence[PolicyRecord], folders: Mapping[str, Path]) -> None:
    """Export the policies that are not, each to the folder of its name, and add what older exports lack."""
    bench = build_workbench(experiment, any_device=True)
    stopwatch = LatencyBench(bench.dense.model, bench.groups, bench.dense.image_shape)
    for record in records:
        folder = folders[record.budget.name]
        report = finished_report(folder, record)
        if not is_lacking(report, folder, experiment):
            continue
        report = report or export(with_weights(bench, experiment.folder, record), experiment, record, folder)
        complete(report, experiment, record, folder, stopwatch)
        if bench.table and "latency" in record.budget.targets:
            report["latency_target"] = targeted_latency(report, record, bench.table)
        save_json(folder / "report.json", report)
        show_files("exported", folder, report["forms"], "report.json")


def finished_report(folder: Path, record: PolicyRecord) -> dict[str, Any]:
    """The report of a folder that holds the export of exactly this policy, whole; else empty."""
    report = finished(folder, "report.json")
    return report if report.get("policy") == record.to_json() else {}


def is_lacking(report: dict[str, Any], folder: Path, experiment: Experiment) -> bool:
    """Whether there is no report, or one of an older version, without forms or latencies that are asked for."""
    timed = "latency_ms_onnxruntime" in report
    return not timed or bool(unshipped(folder, experiment.forms, forms_of(report)))


def load_report(folder: Path) -> dict[str, Any]:
    """A finished report.json."""
    path = folder / "report.json"
    report: dict[str, Any] = load_json(path, REPORT)
    if "missing" not in report["latency_ms_onnxruntime"]:
        load_json(path, {"latency_ms_onnxruntime": _TIMES})
    if "latency_target" in report:
        load_json(path, {"latency_target": TARGETED})
    return report


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


def export(bench: Workbench, experiment: Experiment, record: PolicyRecord, folder: Path) -> dict[str, Any]:
    """Slice, save, load again, compare, count and score one policy.

    Returns:
        What report.json says of that.

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
        cost=cost.counted,
        dense_cost=bench.cost_model.dense.counted,
    )
    (folder / "report.json").unlink(missing_ok=True)  # it vouches for the model beside it
    save_pruned(folder, sliced, architecture)
    loaded = load_exported(experiment, folder).to(device_of(sliced)).to(memory_format=torch.channels_last)
    check_parity(sliced, loaded, bench)
    counted, evaluation = counted_cost(loaded, dense.image_shape), bench.rescorer.evaluate(loaded)
    check_promises(record, cost, counted, evaluation, folder)
    return {
        "policy": record.to_json(),
        "dense": {**bench.cost_model.dense.to_json(), "holdout_top1": bench.rescorer.evaluate(dense.model).top1},
        "pruned": {**cost.to_json(), "counted_macs": counted.macs, "size_bytes": _size(folder)},
        "score_at_search": record.score.to_json(),
        "score_at_export": evaluation._asdict(),
        "bit_equal_after_loading": True,
        "sha256": checksums(folder),
        "environment": environment(bench.seed),
    }


def check_promises(record: PolicyRecord, cost: Cost, counted: Cost, evaluation: Evaluation, folder: Path) -> None:
    """Refuse a model that is not what its policy file says; `cost` is by the closed form, `counted` on the model.

    Raises:
        UserError: naming what differs.
    """
    if cost != record.score.cost:
        raise UserError(f"{folder}: the policy costs {cost}, but its file says {record.score.cost}; search again")
    if counted != cost.counted:
        raise UserError(
            f"{folder}: the exported model costs {counted}, but the closed form says {cost.counted}; report this"
        )
    if abs(evaluation.top1 - record.score.top1) > SCORE_TOLERANCE:
        raise UserError(
            f"{folder}: top-1 is {percent(evaluation.top1)} % now, but was {percent(record.score.top1)} % in the "
            "search; dense weights, data or calibration images are not those of the search"
        )


def complete(
    report: dict[str, Any], experiment: Experiment, record: PolicyRecord, folder: Path, stopwatch: LatencyBench
) -> None:
    """Write the forms that a folder lacks, time the model, and add both to the report."""
    loaded = load_exported(experiment, folder)
    report["forms"] = ship(folder, loaded, experiment.forms, forms_of(report))
    onnx = report["forms"].get("onnx", {"missing": "not among --forms"})
    model = (folder / FILES["onnx"]).read_bytes() if "file" in onnx else onnx["missing"]
    pruned = loaded.to(select_device(experiment.device)).to(memory_format=torch.channels_last)
    batches = {*BATCHES, experiment.latency_batch} if experiment.latency else BATCHES
    report.update(stopwatch.report(pruned, record.policy.counts, model, sorted(batches)))


def targeted_latency(report: Mapping[str, Any], record: PolicyRecord, table: LatencyTable) -> dict[str, Any]:
    """Parts of the dense latency: asked for, by the table, and as it was measured of the exported model, here."""
    ms = report["latency_ms"][f"batch {table.batch}"]
    return {
        "target": record.budget.targets["latency"],
        "batch": table.batch,
        "predicted": record.score.cost.latency_ps / table.dense_ps,
        "measured": ms["pruned"]["median"] / ms["dense"]["median"],
        "table_off_at_most": table.largest_error,
        "table": f"{table.device}, {table.threads} threads, torch {table.torch}",
    }


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


def _size(folder: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in load_tensors(folder / "model.safetensors").values())


if __name__ == "__main__":
    run_command(main)
