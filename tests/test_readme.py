"""README's Python runs, its tree is the real one, and its figures of searches are those in results/."""

import re
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from scipy import stats

from benchmarks.quality_table import tables
from cacp.checkpoint import load_json

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_own_network_example_runs() -> None:
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "nn.Sequential" in block)
    assert sum(1 for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))) <= 15
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    pruned, groups = scope["pruned"], scope["groups"]
    assert isinstance(pruned, torch.nn.Module)
    assert pruned(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    kept = scope["best"].score.cost.macs  # type: ignore[attr-defined]
    dense = 30 * 30 * 27 * 32 + 28 * 28 * 9 * 32 * 64 + 64 * 10
    assert 0.45 <= kept / dense <= 0.5
    assert len(groups.prunable) == 2  # type: ignore[attr-defined]


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", README, re.MULTILINE)


def test_the_tree_names_files_that_exist_and_all_of_them() -> None:
    tree = README.partition("## The tree is the pipeline")[2].split("```")[1].strip("\n")
    named: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        words = line.split("  ")[0] if not line.startswith("  ") else line
        if line and not line.startswith(" "):
            folder = line.split()[0] if line.split()[0].endswith("/") else ""
            named.add(line.split()[0].rstrip("/"))
        elif words.strip():
            named.add((folder + line.split()[0]).rstrip("/"))
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cacp").glob("*.py") if path.name != "__init__.py"}
    entries = {path.name for path in ROOT.glob("*.py")}
    assert modules | entries <= named


RESULTS = ROOT / "results"
WORDS = " ".join(README.split())
SEARCHERS = {
    "**ours**, one search for all five": "cacp",
    "the same agent, a search a target (AMC)": "amc",
    "sensitivity and bisection (FastNAS)": "sensitivity",
    "NSGA-II (Optuna)": "nsga2",
    "CMA-ES (Optuna)": "cma",
    "random, fresh batch norm (EagleEye)": "random",
    "uniform": "uniform",
    "CACP as published": "published",
    "one global Taylor threshold": "taylor",
}
SUMMARY = {
    "**CACP, one search for all**": "cacp",
    "the same agent, a search a target (AMC)": "amc",
    "FastNAS's sensitivity": "sensitivity",
    "CMA-ES": "cma",
    "best of 100 random policies a target": "random",
    "uniform": "uniform",
    "CACP as published": "published",
    "one global Taylor threshold": "taylor",
}
TRAINERS = {
    "**ours** (bf16)": "ours",
    "ours in fp32": "ours, fp32",
    "ours, taught by the dense model (the default)": "ours, distilled",
    "ours, two models side by side, together": "ours, 2 at once",
    "ours, two side by side, taught (`--finetune_at_once 2`), together": "ours, distilled, 2 at once",
    "plain PyTorch, DataLoader with two processes, fp32": "plain",
    "the same, without processes": "plain, in this process",
    "the same, with two processes, taught by the dense model": "plain, taught",
    "torchvision's reference recipe, fp32": "torchvision",
}
RECOVERED = {
    "**ours**": "ours",
    "Torch-Pruning, global group norm": "tp-group-norm",
    "Torch-Pruning, global l1": "tp-l1",
    "uniform, repaired alike": "uniform",
    "the architecture of ours, from scratch": "scratch",
    "the dense model, trained further": "dense",
}
SCORES = {
    "top-1, stale batch norm": "stale top1 2000",
    "top-1": "fresh top1 2000",
    "loss": "fresh loss 2000",
    "loss, 1,000 images": "fresh loss 1000",
    "**mean probability of the true class**": "fresh probability 2000",
    "agreement with the dense network's answers": "fresh agreement 2000",
    "top-1, repaired by least squares": "repaired top1 2000",
    "loss, repaired by least squares": "repaired loss 2000",
    "mean probability, repaired by least squares": "repaired probability 2000",
}


def rows_under(header: str) -> list[list[str]]:
    """The cells of the one table whose header begins so."""
    (table,) = re.findall(rf"^\| ?{re.escape(header)}.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.2f} ± {100 * value['standard_error']:.2f}"


@pytest.mark.parametrize(
    ("header", "file", "model"),
    [
        ("ResNet-56 |", "search_quality", "resnet56"),
        ("ResNet-20 |", "search_quality", "resnet20"),
        ("ResNet-20, 43 policies x 3,000 images |", "search_quality_more_images", "resnet20"),
    ],
)
def test_the_tables_of_searchers_follow_from_their_cells(header: str, file: str, model: str) -> None:
    result = load_json(RESULTS / f"{file}.json")
    found = tables(result["cells"], result["targets"])[model]["top1"]
    expected = []
    for name in sorted(
        (name for name in found if "mean" in found[name]), key=lambda name: -found[name]["mean"]["mean"]
    ):
        summary = found[name]
        ours = summary["mean"]["ours_minus_it"]
        ahead = "" if name == "cacp" else f"{'+' * (ours['mean'] > 0)}{percent(ours)}"
        expected.append([name, *(percent(summary[f"{target:.2f}"]) for target in result["targets"])])
        expected[-1] += [percent(summary["mean"]), ahead]
    assert [[SEARCHERS[label], *cells] for label, *cells in rows_under(header)] == expected


def test_the_means_of_five_seeds_follow_from_their_cells() -> None:
    result = load_json(RESULTS / "search_quality_five_seeds.json")
    found = tables(result["cells"], result["targets"])["resnet20"]["top1"]
    ours, rival = (percent(found[name]["mean"]) for name in ("cacp", "amc"))
    ahead = percent(found["amc"]["mean"]["ours_minus_it"])
    assert f"ours has {ours} there, AMC {rival}, ours minus AMC is +{ahead}, and ours is ahead at every target" in WORDS
    assert all(found["amc"][f"{target:.2f}"]["ours_minus_it"]["mean"] > 0 for target in result["targets"])


def test_what_the_networks_add_follows_from_its_cells() -> None:
    result = load_json(RESULTS / "search_quality_without_networks.json")
    found = tables(result["cells"], result["targets"])["resnet20"]["top1"]
    assert result["judged_on"] == "development"
    assert f"without actor and critic is {percent(found['without-networks']['mean']['ours_minus_it'])} behind" in WORDS


def test_the_first_table_is_of_the_same_means() -> None:
    found = load_json(RESULTS / "search_quality.json")["models"]["resnet56"]["top1"]
    *rows, last = rows_under("ResNet-56 on CIFAR-10")
    trained = load_json(RESULTS / "recovery.json")["cells"]
    dense, half, third = (
        f"{100 * mean(cell['after']['top1'] for cell in trained if (cell['model'], cell['target']) == kind):.2f}"
        for kind in (("dense", 1.0), ("ours", 0.5), ("ours", 0.3))
    )
    assert last[1:] == ["", half, third] and f"(the dense model after them: {dense})" in last[0]
    for label, *cells in rows:
        means = [f"{100 * found[SUMMARY[label]][target]['mean']:.2f}" for target in ("0.70", "0.50", "0.30")]
        assert [cell.strip("*") for cell in cells] == means, label


@pytest.mark.parametrize(("model", "label"), [("resnet56", "ResNet-56"), ("resnet20", "ResNet-20")])
def test_what_is_asked_for_is_at_least_as_good_as_a_random_search_there(model: str, label: str) -> None:
    found = load_json(RESULTS / "search_quality.json")["models"][model]["top1"]
    asked, drawn = (
        [100 * found[name][target]["mean"] for target in ("0.35", "0.45", "0.55", "0.65")]
        for name in ("cacp", "random-between")
    )
    assert all(one >= other for one, other in zip(asked, drawn, strict=True))
    figures, others = (", ".join(f"{value:.2f}" for value in values) for values in (asked, drawn))
    assert f"{label} {figures} against {others}" in WORDS


def test_figures_after_fine_tuning_are_the_measured_ones() -> None:
    winners = load_json(RESULTS / "quality_finetuning.json")["models"]["resnet56"]["top1"]
    for label, name in (("ours", "cacp"), ("sensitivity",) * 2, ("CMA-ES", "cma"), ("uniform",) * 2):
        low, high = (100 * winners[name][target]["mean"] for target in ("0.30", "0.50"))
        assert f"{label} {low:.2f} and {high:.2f}" in WORDS
    rewards = load_json(RESULTS / "rewards_finetuned.json")["models"]["resnet20"]["top1"]
    for name in ("cacp", "by-loss", "by-top1"):
        assert f"{percent(rewards[name]['0.30'])} and {percent(rewards[name]['0.50'])}" in WORDS


def test_the_correlations_of_scores_are_the_measured_ones() -> None:
    result = load_json(RESULTS / "score_quality.json")
    for label, *cells in rows_under("| macs 0.3 | macs 0.5 |"):
        way = SCORES[label]
        network = "repaired" if "repaired" in way else "fresh"
        for cell, target in zip(cells, (0.3, 0.5), strict=True):
            rows = [row for row in result["policies"] if row["target"] == target]
            after = [row[f"after_{network}"]["top1"] for row in rows]
            correlation = stats.spearmanr([row["scores"][way] for row in rows], after)[0]
            number, low, high = (float(word) for word in re.findall(r"-?\d\.\d\d", cell))
            assert f"{number:.2f}" == f"{correlation:.2f}", (label, target)
            interval = result["targets"][f"{target:.2f}"]["ways"][way]["spearman_interval"]
            assert [low, high] == pytest.approx(interval, abs=0.0055), (label, target)


def test_the_speed_of_fine_tuning_is_the_measured_one() -> None:
    result = load_json(RESULTS / "finetuning_speed.json")
    speeds, ratios = result["images_per_second"], result["times_as_fast"]
    expected = []
    for name in TRAINERS.values():
        times = [
            "" if name == ours else f"{ratios[ours][name]['median']:.2f} ({ratios[ours][name]['iqr']:.2f})"
            for ours in ("ours", "ours, distilled")
        ]
        expected.append([name, f"{speeds[name]['median']:.0f} ({speeds[name]['iqr']:.0f})", *times])
    found = [
        [TRAINERS[label], *cells] for label, *cells in rows_under("| images/s | ours is x times as fast | ours, taught")
    ]
    assert found == expected
    alone, taught = (
        [f"{ratios[ours][name]['median']:.1f}" for name in ("plain", "plain, in this process", "plain, taught")]
        for ours in ("ours", "ours, distilled")
    )
    assert f"ours is {alone[0]} and {alone[1]} times as fast as the plain loop with and without processes" in WORDS
    assert f"the dense model's answers on top, {taught[2]} times as fast as it is with processes" in WORDS
    default = ratios["ours, distilled"]
    hundredths = [f"{default[name]['median']:.2f}" for name in ("plain", "plain, in this process")]
    assert f"the default, against the plain loop without: {hundredths[0]} and {hundredths[1]} times" in WORDS
    exact, *rivals = (speeds[name]["median"] for name in ("ours, fp32", "plain", "plain, in this process"))
    assert "ours in fp32 is {:.1f} and {:.1f} times as fast".format(*(exact / rival for rival in rivals)) in WORDS
    for one, two in (("ours", "ours, 2 at once"), ("ours, distilled", "ours, distilled, 2 at once")):
        assert f"two of them train {1 / ratios[one][two]['median']:.1f} times the images of one after another" in WORDS


def recovered(cells: list[dict[str, Any]], name: str, target: float) -> list[str]:
    """Top-1 in %: before, after, and after minus that of the dense model of the same seed; of every seed measured."""
    found = sorted(
        (cell for cell in cells if (cell["model"], cell["target"]) == (name, target)), key=itemgetter("seed")
    )
    dense = {cell["seed"]: cell["after"]["top1"] for cell in cells if cell["model"] == "dense"}
    after = [f"{100 * cell['after']['top1']:.2f}" for cell in found]
    gaps = [f"{100 * (cell['after']['top1'] - dense[cell['seed']]):+.2f}" for cell in found if name != "dense"]
    return [f"{100 * found[0]['before']['top1']:.2f}" if found else "", ", ".join(after), ", ".join(gaps)]


def test_what_fine_tuning_recovers_is_the_measured() -> None:
    cells = load_json(RESULTS / "recovery.json")["cells"]
    after: dict[str, dict[tuple[float, int], float]] = {name: {} for name in RECOVERED.values()}
    for cell in cells:
        after[cell["model"]][cell["target"], cell["seed"]] = 100 * cell["after"]["top1"]
    trained = {(0.5, 0), (0.5, 1), (0.3, 0)}
    assert len(cells) == 17 and after.pop("dense").keys() == {(1.0, 0), (1.0, 1)}
    assert all(found.keys() == trained for found in after.values())
    for name in ("tp-l1", "tp-group-norm"):  # "cannot be told apart"
        assert max(abs(after["ours"][kind] - after[name][kind]) for kind in trained) < 0.5
    expected = [
        [label, *recovered(cells, name, 1.0 if name == "dense" else 0.5), *recovered(cells, name, 0.3)]
        for label, name in RECOVERED.items()
    ]
    assert rows_under("| macs 0.5: before |") == expected
