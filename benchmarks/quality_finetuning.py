"""The winners of `benchmarks.search_quality` after fine-tuning: does what a search prefers stay better?

    python -m benchmarks.quality_finetuning --dataset imagefolder --data_dir DIR --work FOLDER --weights resnet56=FILE \
        --searchers cacp uniform [--seeds 0] --judge development --result FILE

FOLDER holds the cells. The policy that a searcher picked for a target is sliced, repaired, recalibrated, trained on
the training images that neither score nor judge, and judged in fp32. Networks are kept in FOLDER/finetuned: judging
again trains nothing, and a run that was broken off goes on after its last epoch.
"""

import itertools
from pathlib import Path
from typing import Any

from benchmarks.quality_cell import NORMALISATION, Cell, cell_arguments, cell_of, load_inputs, policy_hash
from benchmarks.quality_searchers import SEARCHERS
from benchmarks.quality_table import conclude
from benchmarks.score_quality import RECIPE
from cacp.checkpoint import load_json
from cacp.command import run_command
from cacp.data import ImageData
from cacp.evaluation import evaluate_data
from cacp.recipe import Recipe
from cacp.training import fit


def main() -> None:
    parser = cell_arguments(__doc__)
    parser.add_argument("--searchers", nargs="+", required=True, choices=SEARCHERS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.judge is None or arguments.result is None:
        parser.error("--judge and --result are required")
    inputs = load_inputs(arguments)
    settings = {**RECIPE, "epochs": arguments.epochs}
    rows = []
    for seed, model, searcher in itertools.product(arguments.seeds, inputs.weights, arguments.searchers):
        path = arguments.work / f"{model}_{searcher}_{seed}.json"
        if path.is_file():
            found = load_json(path)
            cell = cell_of(found, inputs)
            rows.append(finetuned(path, found, cell, arguments.targets, Recipe(**settings), inputs.test))
            print(path.stem, *(f"{name} {100 * row['top1']:.2f}" for name, row in rows[-1]["measured"].items()))
    if not rows:
        parser.error(f"{arguments.work} holds no such cells; make them with benchmarks.search_quality")
    conclude(arguments, rows, arguments.targets, {"recipe": {**settings, "images": len(cell.splits.train)}})


def finetuned(
    path: Path, found: dict[str, Any], cell: Cell, targets: list[float], recipe: Recipe, test: ImageData | None
) -> dict[str, Any]:
    """The evaluation after fine-tuning of what a cell picked; on the development split without test images."""
    cell.criterion = found["criterion"]
    measured = {}
    for name in (f"{target:.2f}" for target in targets):
        if found["picked"].get(name) is None:
            continue
        policy = cell.policy(tuple(found["picked"][name]["counts"]))
        model = cell.scorer_of_policies.sliced(policy)
        folder = path.parent / "finetuned" / f"{path.stem}_{name}_{recipe.epochs}_{policy_hash(policy)}"
        for _ in fit(model, cell.splits.train, None, NORMALISATION, recipe, cell.seed, folder):
            pass
        images = cell.development if test is None else test
        measured[name] = evaluate_data(model.eval(), images, NORMALISATION)._asdict()
    return {**{key: found[key] for key in ("searcher", "model", "seed")}, "measured": measured}


if __name__ == "__main__":
    run_command(main)
