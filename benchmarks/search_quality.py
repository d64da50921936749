"""Every searcher with the same purse: what it finds, policy for policy, on the same network and images.

    python -m benchmarks.search_quality --dataset imagefolder --data_dir DIR --work FOLDER \
        --weights resnet20=FILE resnet56=FILE [--searchers NAME ...] [--seeds 0 1 2] \
        [--judge development|test --result results/search_quality.json]

A cell is a searcher, a model and a seed. Its purse pays, a target, for 100 policies that are each scored on 1,000
validation images after batch norm was recalibrated on 512 training images, or for as many images by fewer policies
(--policies 60 --validation 2000). What it found is a JSON file in FOLDER; a cell whose file is there is skipped.
--judge then measures in fp32 what these cells found: on 5,000 training images that nothing else uses (for decisions),
or on the test images (for the final table, once; not the variants of ours).

Searchers:

- cacp: our agent, one run for all targets. amc: the same agent, a run a target, as AMC has an agent a target.
- published: CACP as published, see `benchmarks.published_cacp`; channels ranked by l1, and stale batch norm while it
  searches. Its policies end up to 0.4 % of the dense MACs above their target: up to 0.5 % is forgiven.
- random: random policies, the best by fresh batch norm (EagleEye); random-between: at targets that cacp is asked for
  after its search, 100 each against its one. cma, nsga2: see `agents.evolution`.
- sensitivity: FastNAS-like, see `cacp.methods.sensitivity`. uniform, taylor: without episodes.
- variants of ours, for decisions: without-planner (a DDPG that plays its own actions), without-actor,
  without-imagination, without-networks (neither); by-top1 and by-loss search with these rewards.

All but `published`, by-top1 and by-loss maximise the mean probability of the true class on the validation images, and
it picks the policy of a target among those that meet it. All weights are repaired by least squares before they are
scored or judged; all but published and taylor rank channels by `reconstruction`. What fine-tuning makes of them is in
`benchmarks.quality_finetuning`.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_cell import (
    CALIBRATION,
    TARGETS,
    Cell,
    Found,
    Inputs,
    Spending,
    cell_arguments,
    cell_of,
    load_inputs,
)
from benchmarks.quality_searchers import RIVALS, SEARCHERS
from benchmarks.quality_table import conclude
from benchmarks.summarise import portable
from cacp.budget import meets_targets
from cacp.checkpoint import load_json, save_json, sha256
from cacp.command import run_command
from cacp.environment import environment
from cacp.schema import Budget, UserError


def main() -> None:
    parser = cell_arguments(__doc__)
    parser.add_argument("--policies", type=int, default=Spending().policies, help="of a target")
    parser.add_argument("--validation", type=int, default=Spending().validation, help="images that score a policy")
    parser.add_argument("--searchers", nargs="+", default=list(RIVALS), choices=SEARCHERS)
    arguments = parser.parse_args()
    if (arguments.judge is None) != (arguments.result is None):
        parser.error("--judge and --result go together")
    if arguments.judge == "test" and not set(arguments.searchers) <= set(RIVALS):
        parser.error(f"--judge test is for {', '.join(RIVALS)}; decide among the others with --judge development")
    inputs, paths = load_inputs(arguments), []
    spending = Spending(arguments.policies, arguments.validation).check()
    purse = {"policies_a_target": spending.policies, "validation": spending.validation, "calibration": CALIBRATION}
    checksums = {model: sha256(file) for model, file in inputs.weights.items()}
    for seed, (model, file), searcher in itertools.product(
        arguments.seeds, inputs.weights.items(), arguments.searchers
    ):
        path = arguments.work / f"{model}_{searcher}_{seed}.json"
        made_with = {**purse, "weights_sha256": checksums[model]}
        if not path.is_file():
            found = searched(searcher, model, Cell(model, file, inputs.train, seed, spending))
            save_json(path, portable({**found, "made_with": made_with}))
            print(path.stem, f"{found['seconds']:.0f} s", flush=True)
        elif load_json(path)["made_with"] != made_with:
            raise UserError(f"{path} was made with other weights or another purse; use another --work")
        paths.append(path)
    if arguments.judge:
        rows = [measured(path, inputs) for path in paths]
        conclude(arguments, rows, TARGETS, {"purse": purse})


def searched(searcher: str, model: str, cell: Cell) -> dict[str, Any]:
    """Search, and pick the policy of every target."""
    start = time.monotonic()
    found = SEARCHERS[searcher](cell)
    picked = {f"{target:.2f}": best_of(found, target, cell) for target in dict.fromkeys(one.target for one in found)}
    return {
        "searcher": searcher,
        "model": model,
        "seed": cell.seed,
        "criterion": cell.criterion,
        "policies_scored": cell.scored,
        "seconds": time.monotonic() - start,
        "picked": {name: None if one is None else {"counts": list(one.counts)} for name, one in picked.items()},
        "found": [[one.target, "-".join(map(str, one.counts)), one.value] for one in found],
        "environment": environment(cell.seed),
    }


def measured(path: Path, inputs: Inputs) -> dict[str, Any]:
    """A cell, with the scores in fp32 of what it picked: on the test images, or else on the development split."""
    found = load_json(path)
    file = path.parent / ("development" if inputs.test is None else "test") / path.name
    judged = load_json(file) if file.is_file() else {}
    if judged.get("sha256") != sha256(path):
        judged = {"sha256": sha256(path), "measured": scores_of(found, inputs)}
        save_json(file, judged)
    return {**{key: value for key, value in found.items() if key != "found"}, "measured": judged["measured"]}


def scores_of(found: dict[str, Any], inputs: Inputs) -> dict[str, dict[str, float]]:
    """By target, what the policies score that a cell picked."""
    cell = cell_of(found, inputs)
    cell.criterion = found["criterion"]
    scorer, dense = cell.scorer(cell.development if inputs.test is None else inputs.test), cell.cost_model.dense.macs
    scores = {
        target: scorer(cell.policy(tuple(picked["counts"]))) for target, picked in found["picked"].items() if picked
    }
    return {target: {**score.to_json(), "macs": score.cost.macs / dense} for target, score in scores.items()}


def best_of(found: Sequence[Found], target: float, cell: Cell) -> Found | None:
    """The best that was found for a target and meets it; None where nothing does."""
    cost_model, budget = cell.cost_model, Budget({"macs": target + cell.forgiven})
    meeting = [
        one
        for one in found
        if one.target == target and meets_targets(cost_model.cost(one.counts), cost_model.dense, budget)
    ]
    return max(meeting, key=lambda one: one.value, default=None)


if __name__ == "__main__":
    run_command(main)
