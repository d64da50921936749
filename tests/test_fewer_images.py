"""Rankings by fewer images: races, correlations, and searches side by side, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import fewer_images
from benchmarks.fewer_images import best_third, images_needed, raced
from cacp.experiment import Experiment
from cacp.schema import Budget, Cost, Policy, PolicyRecord, Score


def test_a_race_drops_what_cannot_win() -> None:
    rival = np.tile([1.0, 1.0, 1.0, 0.0], 500)  # 75 %
    worse = np.tile([1.0, 0.0, 1.0, 0.0], 500)  # 50 %: 0.25 +- 0.0274 below after 250 images
    assert images_needed(worse, rival, 3.0, 250) == 250
    assert images_needed(worse, rival, 10.0, 250) == 500  # 10 * 0.0194 < 0.25 < 10 * 0.0274
    assert images_needed(rival, worse, 3.0, 250) == 2000
    assert images_needed(worse, None, 3.0, 250) == 2000
    result = raced(np.array([0.5, 0.5]), np.stack([rival, worse]), best=1, errors=3.0, step=250)
    assert result["part_of_images"] == (2000 + 250) / 2 / 2000
    assert result["correlations"]["0.5"] == {"spearman": 1.0, "kendall": 1.0}


def test_a_race_gives_a_dropped_policy_the_rivals_score_plus_the_difference_seen() -> None:
    rival = np.repeat([1.0, 0.0], [900, 1100])  # its first 250 images are easy: 100 % of them, 45 % of all
    worse = np.tile([1.0, 0.0], 1000)  # 50 % of the first 250
    result = raced(np.array([0.5, 0.5, 0.5]), np.stack([rival, worse, rival - 0.1 * rival]), 1, 3.0, 250)
    assert result["part_of_images"] == pytest.approx((2000 + 250 + 250) / 3 / 2000)
    assert result["correlations"]["0.5"]["kendall"] == pytest.approx(-1 / 3, abs=1e-3)  # 0.45, -0.05, 0.35


def test_the_interval_of_a_correlation_by_hand() -> None:
    found = fewer_images.with_interval({"spearman": 0.9661, "kendall": 0.9}, 30)
    assert found == {"spearman": 0.966, "kendall": 0.9, "spearman_interval": [0.928, 0.984]}
    assert fewer_images.with_interval({"spearman": None, "kendall": None}, 30) == {"spearman": None, "kendall": None}
    assert fewer_images.with_interval({"spearman": 1.0, "kendall": 1.0}, 30) == {"spearman": 1.0, "kendall": 1.0}


def test_searches_are_compared_policy_by_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    top1 = {"many": (0.5, 0.8), "few": (0.53, 0.79)}

    def records(folder: Path) -> list[PolicyRecord]:
        targets = zip((0.3, 0.5), top1[folder.name], strict=True)
        policy, score = Policy({"a": (0,)}, "l1"), Score(0.0, 0.0, 0.0, Cost(1, 1))
        return [
            PolicyRecord(policy, Budget({"macs": target}), score._replace(top1=value), score, "search cacp", 0, "inner")
            for target, value in targets
        ]

    settings = {"many": 1024, "few": 512}
    monkeypatch.setattr(
        fewer_images, "experiment_of",
        lambda run: Experiment(output=str(run), search_calibration_images=settings[run.name], seed=7),
    )  # fmt: skip
    monkeypatch.setattr(fewer_images, "load_policies", records)
    found = fewer_images.compared(Path("runs/many"), Path("runs/few"))
    assert found["points_few_minus_many"] == pytest.approx(100 * (0.03 - 0.01) / 2)
    assert (found["seed"], found["images"]) == (7, {"many": 1024, "few": 512})
    assert found["top1"]["few"] == {"macs-0.30": 0.53, "macs-0.50": 0.79}


def test_policies_are_spread_evenly_over_the_episodes_of_every_target() -> None:
    targets = np.array([0.3, 0.5, 0.7] * 5)
    assert fewer_images.spread_over(targets, 9).tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]


def test_the_best_third_is_taken_within_every_target() -> None:
    targets = np.array([0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.5, 0.5, 0.5])
    scores = np.array([0.2, 0.9, 0.4, 0.7, 0.3, 0.8, 0.6, 0.5, 0.1])
    assert np.flatnonzero(best_third(targets, scores)).tolist() == [1, 2, 5]
