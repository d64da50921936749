"""The benchmarks of fine-tuning, on the tiny run: what they train, what they skip, what they read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import finetuning_speed, recipes, recovery
from benchmarks.exported_run import finetune, load_run
from cacp.checkpoint import load_json, save_json
from cacp.data import load_dataset
from cacp.evaluation import resolve_precision
from cacp.pipeline import load_exported
from cacp.recipe import Recipe
from cacp.schema import UserError


def result_of(benchmark: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, words), "--result", str(path)])
    benchmark.main()
    assert '"/' not in path.read_text()
    return load_json(path)


def test_recipes_are_judged_on_held_out_images_and_never_trained_twice(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = ["base", "distillation-0.5+nesterov", "ema-0.99"]
    words = [finished, "--work", tmp_path, "--policies", "macs-0.50", "--epochs", 2, "--lrs", 0.02]
    words += ["--variants", *variants]
    monkeypatch.setattr("cacp.pipeline.load_images", only_training_images)
    result = result_of(recipes, tmp_path / "recipes.json", monkeypatch, *words)
    assert [cell["variant"] for cell in result["cells"]] == variants
    assert len({cell["loss"] for cell in result["cells"]}) == 3
    made_by = [cell["recipe"] for cell in result["cells"]]
    assert [(recipe["distillation"], recipe["nesterov"]) for recipe in made_by] == [(0, False), (0.5, True), (0, False)]
    assert all((recipe["epochs"], recipe["lr"], recipe["flip"]) == (2, 0.02, False) for recipe in made_by)
    assert all(0.1 < cell["before"]["top1"] < 1 and 0.1 < cell["top1"] < 1 for cell in result["cells"])
    monkeypatch.setattr(recipes, "trained", None)
    again = result_of(recipes, tmp_path / "again.json", monkeypatch, *words)
    assert again["cells"] == result["cells"]
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        result_of(recipes, tmp_path / "unknown.json", monkeypatch, *words, "nesterov+unknown")


def test_recipes_train_the_dense_model_too(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [finished, "--work", tmp_path, "--policies", "dense", "--epochs", 1, "--variants", "base"]
    result = result_of(recipes, tmp_path / "dense.json", monkeypatch, *words)
    (cell,) = result["cells"]
    assert cell["before"] == result["dense"] and cell["loss"] != cell["before"]["loss"]


def only_training_images(experiment: Any, split: str) -> Any:
    assert split != "test"
    return load_dataset("digits", split, "unused")


def test_recovery_compares_models_of_equal_cost_and_the_dense_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    words = [finished, "--uniform", finished, "--work", tmp_path, "--epochs", 1, "--seeds", 0]
    result = result_of(recovery, tmp_path / "recovery.json", monkeypatch, *words)
    cells = {(cell["model"], cell["target"]): cell for cell in result["cells"]}
    assert len(cells) == 5 * 2 + 1  # the dense model once
    dense = cells["dense", 1.0]
    assert dense["before"] == result["dense"]
    for (name, target), cell in cells.items():
        if name != "dense":
            assert 0.9 * target < cell["cost"]["macs"] / dense["cost"]["macs"] <= target, name
    assert cells["scratch", 0.5]["cost"] == cells["ours", 0.5]["cost"]
    assert cells["scratch", 0.5]["before"]["top1"] < 0.3 < cells["ours", 0.5]["before"]["top1"]
    assert cells["tp-l1", 0.3]["cost"] != cells["tp-group-norm", 0.3]["cost"]
    monkeypatch.setattr(recovery, "recovered", None)  # all are there
    again = result_of(recovery, tmp_path / "again.json", monkeypatch, *words, "--models", "ours", "--targets", 0.3)
    assert again["cells"] == result["cells"]
    path = tmp_path / "cells" / "ours_0.30_1_0.json"
    cell = load_json(path)
    cell["source"]["recipe"]["lr"] = 0.07
    save_json(path, cell)
    with pytest.raises(UserError, match=r"ours_0.30_1_0\.json was made from other models or by another recipe"):
        result_of(recovery, tmp_path / "other.json", monkeypatch, *words, "--models", "ours", "--targets", 0.3)


def test_what_the_dense_model_said_is_kept_for_other_models(finished: Path, tmp_path: Path) -> None:
    experiment, splits, dense = load_run(finished)
    recipe, asked = Recipe(epochs=2, batch_size=128, distillation=0.9), []
    dense.model.register_forward_hook(lambda *_: asked.append(0))

    def losses(name: str, answers: Path | None) -> list[tuple[float, float]]:
        model = load_exported(experiment, finished / "export" / name)
        checkpoint = tmp_path / f"{name}_{answers is None}_{recipe.precision}"
        records = finetune(model, recipe, 0, splits, dense, checkpoint, answers)
        return [(record.train_loss, record.train_top1) for record in records]

    calls, path = 2 * recipe.steps(len(splits.train)), tmp_path / "answers.sqlite"
    told = losses("macs-0.50", path)
    assert len(asked) == calls
    other = losses("macs-0.30", path)
    assert len(asked) == calls and other != told
    assert losses("macs-0.50", None) == told and losses("macs-0.30", None) == other
    assert len(asked) == 3 * calls
    if resolve_precision("auto", torch.device("cpu")) != torch.float32:
        recipe = replace(recipe, precision="fp32")
        exact = losses("macs-0.50", path)
        assert len(asked) == 4 * calls and exact != told


def test_speed_is_of_the_same_images_for_all(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [finished, "--images", 300, "--rounds", 1]
    result = result_of(finetuning_speed, tmp_path / "speed.json", monkeypatch, *words)
    speeds = result["images_per_second"]
    assert list(speeds) == [
        "ours",
        "ours, fp32",
        "ours, distilled",
        "ours, 2 at once",
        "ours, distilled, 2 at once",
        "plain",
        "plain, in this process",
        "plain, taught",
        "torchvision",
    ]
    for ours, ratios in result["times_as_fast"].items():
        assert {name: one["median"] for name, one in ratios.items()} == pytest.approx(
            {name: speeds[ours]["median"] / speed["median"] for name, speed in speeds.items()}, rel=1e-6
        )
    assert list(result["times_as_fast"]) == ["ours", "ours, distilled"]
    assert (result["images"], result["batch_size"]) == (300, 64)
    assert result["precision"] in ("bfloat16", "float32")


@pytest.mark.slow
def test_compiled_training_is_timed_too(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [finished, "--images", 100, "--rounds", 1, "--compiled"]
    result = result_of(finetuning_speed, tmp_path / "speed.json", monkeypatch, *words)
    assert list(result["images_per_second"])[-1] == "ours, compiled"
    assert result["images_per_second"]["ours, compiled"]["median"] > 0
