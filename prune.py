"""Prune by a criterion-driven method, without episodes: CAIE, GFI-AP, SFP, FPGM, Taylor, magnitude, one's own.

    python prune.py --config configs/digits_resnet56.yaml --method taylor --output runs/digits_taylor
    python prune.py --config configs/digits_resnet56.yaml --method gfi_ap --sweep 0.3:0.7:0.1 --output runs/digits_sweep

Writes policies/NAME.json for every target or quantile, with NAME.safetensors where the method trains; export.py and
finetune.py take them as they are. Method magnitude, which cuts no channel, writes unstructured/NAME/ instead.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cacp.budget import check_prunable, check_reachable, meets_targets
from cacp.checkpoint import load_json, save_json, save_tensors
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.environment import environment
from cacp.experiment import Experiment
from cacp.methods import Pruned, Subject, Training, make_method
from cacp.pipeline import Workbench, build_workbench, open_run, select_device, training_recipe
from cacp.policies import has_policies, load_policies, missing_policies, save_policy
from cacp.reporting import ProgressLine, console, percent, show_dense, show_policies, table, track_training
from cacp.schema import Budget, Policy, PolicyRecord, Score, UserError
from cacp.scoring import PolicyScorer
from cacp.sweep import SweepRow, load_sweep, save_sweep

UNSTRUCTURED = {"sparsity": float, "dense_holdout_top1": float, "holdout_top1": float}


def main() -> None:
    experiment = experiment_from(parse("prune", __doc__, sys.argv[1:]))
    select_device(experiment.device)
    with open_run(experiment):
        if experiment.quantiles:
            run_sweep(experiment)
        elif experiment.method == "magnitude":
            run_unstructured(experiment)
        else:
            run_budgets(experiment)


def run_budgets(experiment: Experiment) -> None:
    """A policy for every budget, but those that are there."""
    names = [budget.name for budget in experiment.budgets]
    missing = missing_policies(experiment.folder, names, experiment.method)
    if missing:
        bench = opened(experiment)
        for budget in experiment.budgets:
            check_reachable(bench.cost_model, budget)
        method = make_method(experiment.method, experiment.method_options)
        for budget in experiment.budgets:
            if budget.name in missing:
                save(experiment, bench, method(subject_of(experiment, bench, budget.name), budget), budget)
    show_policies(experiment.folder, names)


def run_sweep(experiment: Experiment) -> None:
    """A policy for every quantile, named by the MACs that it keeps; sweep/sweep.csv and the plots."""
    missing_policies(experiment.folder, [], experiment.method)
    rows = load_sweep(experiment.folder)
    waiting = [one for one in experiment.quantile_list if one not in {row.quantile for row in rows}]
    if waiting:
        bench = opened(experiment)
        check_prunable(bench.cost_model)
        bench.importance("gfi")  # once for all, and in nobody's time
        unbounded = Budget({"macs": 1.0})
        for quantile in waiting:
            method = make_method(experiment.method, {**experiment.method_options, "quantile": quantile})
            start = time.perf_counter()
            pruned = method(subject_of(experiment, bench, f"quantile-{quantile:g}"), unbounded)
            seconds = time.perf_counter() - start
            record = save(experiment, bench, pruned, None)
            cost, dense = record.score.cost, bench.cost_model.dense
            macs, params = cost.macs / dense.macs, cost.params / dense.params
            threshold, top1 = pruned.details["threshold"], record.score.top1
            rows.append(SweepRow(quantile, threshold, record.budget.name, macs, params, top1, seconds))
            save_sweep(experiment.folder, rows)
    show_policies(experiment.folder, [row.policy for row in rows])


def run_unstructured(experiment: Experiment) -> None:
    """Networks with single weights zero: unstructured/NAME/, model.safetensors and result.json."""
    folders = [experiment.folder / "unstructured" / budget.name for budget in experiment.budgets]
    pairs = zip(experiment.budgets, folders, strict=True)
    waiting = [budget for budget, folder in pairs if not (folder / "result.json").is_file()]
    if waiting:
        bench = opened(experiment)
        method = make_method(experiment.method, {})
        for budget in waiting:
            pruned = method(subject_of(experiment, bench, budget.name), budget)
            save_unstructured(bench, pruned, budget, experiment.folder / "unstructured" / budget.name)
    show_unstructured(experiment.folder, folders)


def opened(experiment: Experiment) -> Workbench:
    """The workbench, and a line about the dense model."""
    bench = build_workbench(experiment)
    show_dense(experiment.model, bench.dense.validation_top1, bench.dense.validation_unseen)
    return bench


def subject_of(experiment: Experiment, bench: Workbench, name: str) -> Subject:
    """What a method gets for one policy; its training, if it trains, is kept in method/`name`/."""
    folder = experiment.folder / "method" / name
    return Subject(
        model=bench.dense.model,
        groups=bench.groups,
        cost_model=bench.cost_model,
        importance=bench.importance,
        criterion=experiment.criterion,
        scores=partial(scores, bench.scorer),
        evaluations=experiment.episodes,
        normalisation=bench.dense.normalisation,
        training=Training(
            images=bench.splits.train,
            recipe=training_recipe(experiment, epochs=1, lr=1.0, schedule="constant"),  # the method's own replace these
            seed=experiment.seed,
            folder=folder / "checkpoint",
            track=partial(track_training, folder=folder, title=f"{experiment.method} {name}"),
        ),
    )


def scores(scorer: PolicyScorer, policies: Sequence[Policy]) -> list[Score]:
    """Of every policy, with progress over those that were not scored before."""
    waiting = [policy for policy in policies if not scorer.knows(policy)]
    if waiting:
        with ProgressLine("policies scored", len(waiting)) as progress:
            for policy in waiting:
                progress.advance(f"top-1 {percent(scorer(policy).top1)} %")
    return [scorer(policy) for policy in policies]


def save(experiment: Experiment, bench: Workbench, pruned: Pruned, budget: Budget | None) -> PolicyRecord:
    """Score a policy with the weights that it goes with, and write it.

    Args:
        experiment: of the run.
        bench: of the dense model.
        pruned: has a policy.
        budget: that it was made for; None takes the MACs that it keeps, rounded up.
    """
    policy = pruned.policy
    if policy is None:
        raise UserError(f"method {experiment.method} returned no policy; only magnitude has none")
    policy.validate(bench.groups)
    judge = bench if pruned.weights is None else bench.retrained(pruned.weights)
    score = judge.rescorer(policy)
    if budget is None:
        budget = free_budget(experiment.folder, policy, score.cost.macs / bench.cost_model.dense.macs)
    if not meets_targets(score.cost, bench.cost_model.dense, budget):
        raise UserError(f"method {experiment.method} returned a policy that costs {score.cost}, above {budget.name}")
    record = PolicyRecord(
        policy=policy,
        budget=budget,
        score=score,
        search_score=judge.scorer(policy),
        method=experiment.method,
        episode=0,
        scope=experiment.pruned_scope,
        details=pruned.details,
    )
    save_policy(experiment.folder, record, pruned.weights)
    return record


def free_budget(folder: Path, policy: Policy, macs: float) -> Budget:
    """The MACs that a policy keeps, rounded up, and further up where a different policy has that name."""
    there = {record.budget.name: record.policy for record in load_policies(folder)} if has_policies(folder) else {}
    rounded = math.ceil(1e4 * macs)
    while there.get((budget := Budget({"macs": rounded / 1e4})).name, policy) != policy:
        rounded += 1
    return budget


def save_unstructured(bench: Workbench, pruned: Pruned, budget: Budget, folder: Path) -> None:
    """Recalibrate and score a network whose single weights are zero, and write it; result.json last."""
    assert pruned.weights is not None
    model = copy.deepcopy(bench.dense.model)
    model.load_state_dict(pruned.weights)
    bench.rescorer.recalibrated(model)
    save_tensors(folder / "model.safetensors", model.state_dict())
    result = {
        "budget": dict(budget.targets),
        **pruned.details,
        "holdout_top1": bench.rescorer.evaluate(model).top1,
        "dense_holdout_top1": bench.rescorer.evaluate(bench.dense.model).top1,
        "environment": environment(bench.seed),
    }
    save_json(folder / "result.json", result)


def show_unstructured(folder: Path, made: list[Path]) -> None:
    results = {path.name: load_json(path / "result.json", UNSTRUCTURED) for path in made}
    rows = [
        [name, f"{result['sparsity']:.4f}", percent(result["dense_holdout_top1"]), percent(result["holdout_top1"])]
        for name, result in results.items()
    ]
    title = f"networks of {folder} with single weights zero: nothing to export; top-1 in %"
    console.print(table(title, ["network", "sparsity", "dense", "before fine-tuning"], rows))


if __name__ == "__main__":
    run_command(main)
