"""What a run has come to: cards and tables of dense and pruned models."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacp.page.markup import Markup, joined, table, tag
from cacp.reporting import millions, percent
from cacp.runfolder import PrunedModel, RunFolder, at, command, number

LATENCY = "latency by the table"
RUNTIMES = {"latency_ms": "PyTorch", "latency_ms_onnxruntime": "ONNX Runtime"}  # by where a report has their times


def answer(run: RunFolder) -> Markup:
    """Dense and pruned models: what they know, cost and weigh."""
    if run.unstructured:
        return unstructured(run)
    if not run.models:
        top1 = number(run.dense, "validation_top1")
        known = f"The dense model has {percent_of(top1)} % top-1 on validation images." if top1 is not None else ""
        return tag("p", f"No pruned model yet. {known}")
    timed = list(dict.fromkeys(name for model in run.models for name in latencies(model.exported)))
    columns = ["model", "top-1 after fine-tuning, test, %", "minus dense, points", "before fine-tuning, test, %"]
    columns += ["before, validation, %", "MACs", "MACs, % of dense", "params", "params, % of dense"]
    columns += [f"{LATENCY}, % of dense"] if "latency_ps" in run.dense_cost else []
    columns += [part for name in timed for part in (f"{name}, ms", f"{name}, × as fast")] + ["weights on disk, MB"]
    rows = [_dense_row(run, timed), *(_model_row(run, model, timed) for model in run.models)]
    return joined(
        [
            tag("div", *(_card(run, model) for model in run.models), class_="cards"),
            table("Dense and pruned. " + _images(run), columns, rows),
            *_timing(run),
        ]
    )


def _timing(run: RunFolder) -> Iterator[Markup]:
    """How the latencies were measured, and what keeps models from what their MACs promise."""
    conditions = [at(model.exported, "latency_conditions") for model in run.models]
    told = [
        f"Latencies are medians, dense and pruned in turn; threads: {one.get('threads', '?')}. "
        f"PyTorch: {one.get('torch', '?')}. ONNX Runtime: {one.get('onnxruntime', '?')}."
        for one in conditions
        if isinstance(one, Mapping)
    ]
    yield from (tag("p", text, class_="soft") for text in dict.fromkeys(told))
    reasons = [
        tag("p", tag("b", f"{policy_title(model)}, {where}"), f": {at(said, 'why')}.")
        for model in run.models
        if isinstance(found := at(model.exported, "latency_why"), Mapping)
        for where, said in found.items()
    ]
    if reasons:
        yield tag("details", tag("summary", "Why models gain less than their MACs promise, and what helps"), *reasons)


def latencies(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Medians of dense and pruned model in milliseconds, by runtime and batch."""
    found: dict[str, tuple[float, float]] = {}
    for key, runtime in RUNTIMES.items():
        times = report.get(key)
        for batch in times if isinstance(times, Mapping) else ():
            pair = [at(report, key, batch, name, "median") for name in ("dense", "pruned")]
            if all(isinstance(one, int | float) and one > 0 for one in pair):
                found[f"{runtime}, {batch}"] = (float(pair[0]), float(pair[1]))
    return found


def _card(run: RunFolder, model: PrunedModel) -> Markup:
    after, dense = number(model.tuned, "test_top1", "after"), number(model.tuned, "test_top1", "dense")
    if after is not None:
        top1, where = after, f"top-1 after fine-tuning, {model.tuned.get('test_images', '?')} test images"
    else:
        top1, where = model.record.score.top1, "top-1 before fine-tuning, validation images"
        dense = number(model.exported, "dense", "holdout_top1")
    lines = [where]
    if dense is not None:
        lines.append(f"{100 * (top1 - dense):+.2f} points to dense")
    lines += [f"{percent(part)} % of the {cost}" for cost, part in kept_parts(run, model).items()]
    for name, (slow, fast) in latencies(model.exported).items():
        lines.append(f"{slow / fast:.2f} × as fast, {name}")
    head = [tag("b", policy_title(model)), tag("strong", f"{percent(top1)} %")]
    return tag("div", *head, *(tag("span", line) for line in lines), class_="card")


def policy_title(model: PrunedModel) -> str:
    """macs 0.50 params 0.60"""
    return model.name.replace("_", " ").replace("-", " ")


def kept_parts(run: RunFolder, model: PrunedModel) -> dict[str, float]:
    """Kept part of every cost whose dense value is known."""
    names = {"macs": "MACs", "params": "parameters", "latency_ps": LATENCY}
    cost = model.record.score.cost._asdict()
    return {names[key]: cost[key] / dense for key, dense in run.dense_cost.items() if dense}


def _dense_row(run: RunFolder, timed: Sequence[str]) -> list[object]:
    tops = [number(model.tuned, "test_top1", "dense") for model in run.models]
    holdout = [number(model.exported, "dense", "holdout_top1") for model in run.models]
    measured = [latencies(model.exported) for model in run.models]
    times: list[object] = []
    for name in timed:
        dense = [one[name][0] for one in measured if name in one]
        times += [f"{statistics.median(dense):.2f}", "1.00"]
    cost = run.dense_cost
    macs, params = (millions(round(cost[key])) if key in cost else None for key in ("macs", "params"))
    test = percent_of(next((top for top in tops if top is not None), None))
    validation = percent_of(next((top for top in holdout if top is not None), None))
    kept = ["100.00" if one else None for one in (macs, params)]
    times = ["100.00", *times] if "latency_ps" in cost else times
    return ["dense", test, None, None, validation, macs, kept[0], params, kept[1], *times, megabytes(run.dense_bytes)]


def _model_row(run: RunFolder, model: PrunedModel, timed: Sequence[str]) -> list[object]:
    tops = at(model.tuned, "test_top1")
    after, dense = number(tops, "after"), number(tops, "dense")
    gain = None if after is None or dense is None else f"{100 * (after - dense):+.2f}"
    cost, kept = model.record.score.cost, kept_parts(run, model)
    measured = latencies(model.exported)
    times: list[str | None] = []
    for name in timed:
        slow, fast = measured.get(name, (0.0, 0.0))
        times += [f"{fast:.2f}", f"{slow / fast:.2f}"] if fast else [None, None]
    size = model.export_bytes.get("model.safetensors")
    return [
        policy_title(model),
        percent_of(after),
        gain,
        percent_of(number(tops, "before")),
        percent(model.record.score.top1),
        millions(cost.macs),
        percent_of(kept.get("MACs")),
        millions(cost.params),
        percent_of(kept.get("parameters")),
        *([percent_of(kept[LATENCY])] if LATENCY in kept else []),
        *times,
        megabytes(size),
    ]


def _images(run: RunFolder) -> str:
    """How sure the numbers are."""
    tested = next((model.tuned for model in run.models if model.tuned), {})
    count, top1 = tested.get("test_images"), number(tested, "test_top1", "after")
    kind = "test"
    if not count:
        count, kind = run.settings.get("validation_images"), "validation"
        top1 = run.models[0].record.score.top1
    if not isinstance(count, int) or count < 1 or top1 is None:
        return ""
    return (
        f"One standard error of a top-1 of {percent(top1)} % on {count:,} {kind} images is "
        f"{100 * (top1 * (1 - top1) / count) ** 0.5:.2f} points."
    )


def unstructured(run: RunFolder) -> Markup:
    """Networks with single weights zero."""
    rows = [
        [name.replace("-", " "), percent_of(at(result, "sparsity")), *(percent_of(at(result, key)) for key in keys)]
        for keys in [("dense_holdout_top1", "holdout_top1")]
        for name, result in run.unstructured.items()
    ]
    caption = (
        "Single weights are zero, no channel falls: MACs, size and latency stay those of the dense model, and there is "
        "nothing to export. Top-1 on held-out validation images, before fine-tuning."
    )
    return table(caption, ["network", "weights that are zero, %", "dense top-1, %", "top-1, %"], rows)


def comparison(runs: Sequence[RunFolder]) -> Markup:
    """Every policy of every run."""
    costs = ["MACs", "parameters", *([LATENCY] if any("latency_ps" in run.dense_cost for run in runs) else [])]
    rows = [
        [
            f"{policy_title(model)}, {run.label}", model.record.method,
            *(percent_of(kept_parts(run, model).get(cost)) for cost in costs), percent(model.record.score.top1),
            *(percent_of(number(model.tuned, "test_top1", key)) for key in ("before", "after")),
        ]
        for run in runs
        for model in run.models
    ]  # fmt: skip
    rows.sort(key=lambda row: str(row[0]))
    columns = ["policy, run", "pruned by", *(f"{cost} kept, %" for cost in costs), "before, validation, %"]
    columns += ["before, test, %", "after fine-tuning, test, %"]
    if len(runs) > 1:
        return table("All policies, top-1.", columns, rows)
    run = runs[0]
    other = f"{run.folder}_uniform"
    words = ("prune.py", "--config", run.folder / "config.yaml", "--weights", run.folder)
    lines = [
        command(*words, "--method", "uniform", *_budget_flags(run), "--output", other),
        command("report.py", run.folder, other),
    ]
    return joined(
        [tag("p", "To compare with a baseline on the same weights:"), tag("pre", tag("code", "\n".join(lines)))]
    )


def _budget_flags(run: RunFolder) -> list[object]:
    """Flags that ask for the budgets of a run's policies; of several costs together, for the first."""
    budgets = [model.record.budget.targets for model in run.models]
    if all(set(targets) == {"macs"} for targets in budgets):
        return ["--targets", *(targets["macs"] for targets in budgets)]
    return [word for cost, target in next(iter(budgets), {}).items() for word in (f"--{cost}", target)]


def caveats(runs: Sequence[RunFolder]) -> Iterator[Markup]:
    """What keeps runs from being compared."""
    first = runs[0].dense
    for run in runs[1:]:
        pairs = {"sha256": "other dense weights", "split_sha256": "other images"}
        different = [text for key, text in pairs.items() if run.dense.get(key) != first.get(key)]
        if different:
            yield tag("p", f"{run.label} has {' and '.join(different)} than {runs[0].label}.", class_="problem")


def percent_of(fraction: Any) -> str | None:
    return percent(fraction) if isinstance(fraction, int | float) else None


def megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:.3f}"
