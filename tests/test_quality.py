"""What the quality benchmarks conclude: tables by hand, least squares against torch's, numbers of known logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_agents import ToyEnv, play

from benchmarks.quality_searchers import WithoutActor, WithoutImagination, WithoutPlanner
from benchmarks.quality_table import summed_up
from benchmarks.score_quality import correlated, numbers


def row(searcher: str, seed: int, **tops: float) -> dict:
    measured = {name.replace("at", "0."): {"top1": top1} for name, top1 in tops.items()}
    return {"searcher": searcher, "seed": seed, "measured": measured}


def test_the_table_by_hand() -> None:
    rows = [row("cacp", 0, at30=0.5, at50=0.8), row("cacp", 1, at30=0.6, at50=0.8)]
    rows += [row("random", 0, at30=0.4, at50=0.7), row("random", 1, at30=0.3, at50=0.8), row("cma", 0, at30=0.4)]
    table = summed_up(rows, [0.3, 0.5])
    assert table["cacp"]["0.30"]["mean"] == pytest.approx(0.55)
    assert table["cacp"]["0.30"]["standard_error"] == pytest.approx(0.05)  # standard deviation 0.0707 over sqrt(2)
    assert table["cacp"]["mean"]["mean"] == pytest.approx(0.675)
    assert table["random"]["0.30"]["ours_minus_it"]["mean"] == pytest.approx(0.2)
    assert table["random"]["0.30"]["ours_minus_it"]["standard_error"] == pytest.approx(0.1)
    assert table["cma"].keys() == {"0.30"} and table["cma"]["0.30"]["standard_error"] is None


def test_numbers_of_known_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    dense = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = numbers(logits, torch.tensor([1, 1, 0]), dense)
    assert found["top1"] == pytest.approx(2 / 3) and found["agreement"] == pytest.approx(2 / 3)
    assert found["probability"] == pytest.approx((0.75 + 0.25 + 0.75) / 3)
    assert found["loss"] == pytest.approx((2 * math.log(0.75) + math.log(0.25)) / 3)
    assert numbers(dense, torch.tensor([1, 1, 0]), dense)["divergence"] == pytest.approx(0.0, abs=1e-7)


def test_correlations_of_equal_and_reversed_ranks() -> None:
    values = np.arange(24.0)
    assert correlated(values, values**3)["kendall"] == 1 and correlated(values, -values)["spearman"] == -1
    wide = correlated(values, np.random.default_rng(0).random(24))["spearman_interval"]
    assert wide[0] < 0 < wide[1]


def test_ours_without_a_part_lacks_that_part_alone() -> None:
    plain = WithoutPlanner(ToyEnv(), warmup_episodes=3)
    assert {end.source for end in play(plain, 9)[3:]} == {"actor"}
    assert plain.replay_buffer.size() == 9 * 6  # steps of the episodes that were played

    without = WithoutActor(ToyEnv(), warmup_episodes=3)
    play(without, 9)
    assert without._greedy(0.5) == pytest.approx(without._rehearsal.roll_out(0.5, lambda _: 0.0).ratios)
    assert without.replay_buffer.size() == (9 + 4 * 7) * 6  # imagined ones from the end of warm-up on

    play(without_imagination := WithoutImagination(ToyEnv(), warmup_episodes=3), 9)
    assert without_imagination.replay_buffer.size() == 9 * 6
