"""Prune by a criterion-driven method, without episodes: the baselines of the search.

    python prune.py --config configs/digits_resnet56.yaml --method taylor --output runs/digits_taylor

Writes policies/NAME.json for every target; export.py and finetune.py take them as they are.
"""

import sys

from cacp.budget import check_reachable
from cacp.config import experiment_from, parse
from cacp.methods import METHODS, Subject
from cacp.pipeline import build_workbench, open_run, run_command, select_device
from cacp.policies import missing_policies, save_policy
from cacp.reporting import console, percent, show_policies
from cacp.schema import PolicyRecord


def main() -> None:
    experiment = experiment_from(parse("prune", "Prune by a method without episodes.", sys.argv[1:]))
    select_device(experiment.device)
    open_run(experiment)
    budgets = experiment.budgets
    names = [budget.name for budget in budgets]
    if missing_policies(experiment.folder, names, experiment.method):
        bench = build_workbench(experiment)
        console.print(
            f"dense {experiment.model}: {percent(bench.dense.validation_top1)} % top-1 on the validation images"
        )
        subject = Subject(
            groups=bench.groups,
            cost_model=bench.cost_model,
            importance=bench.importance,
            criterion=experiment.criterion,
            score=bench.scorer,
            evaluations=experiment.episodes,
        )
        for budget in budgets:
            check_reachable(bench.cost_model, budget)
        for budget in budgets:
            policy = METHODS[experiment.method](subject, budget)
            record = PolicyRecord(
                policy=policy,
                budget=budget,
                score=bench.rescorer(policy),
                search_score=bench.scorer(policy),
                method=experiment.method,
                episode=0,
                scope=experiment.scope,
            )
            save_policy(experiment.folder, record)
    show_policies(experiment.folder, names)


if __name__ == "__main__":
    run_command(main)
