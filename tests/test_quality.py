"""What the quality benchmarks conclude: tables by hand, least squares against torch's, numbers of known logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import resnet20
from test_agents import ToyEnv, play

from benchmarks.quality_searchers import WithoutActor, WithoutImagination, WithoutPlanner
from benchmarks.quality_table import summed_up
from benchmarks.repair import Repair
from benchmarks.score_quality import correlated, numbers
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.slicing import counts_policy, slice_model


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


def test_repair_is_the_least_squares_fit_and_keeps_a_whole_network() -> None:
    model = resnet20().eval()
    groups = trace(model, torch.zeros(1, 3, 32, 32), "inner")
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    repair, orders = Repair(model, groups, images), channel_orders(channel_importance(model, groups, "l1"))
    whole = counts_policy(groups, [group.channels for group in groups.prunable], orders, "l1")
    same = repair(slice_model(model, groups, whole), whole.keep)
    name = groups.prunable[0].consumers[0]
    weight = model.get_submodule(name).weight
    torch.testing.assert_close(same.get_submodule(name).weight, weight, atol=1e-2, rtol=0)

    half = counts_policy(groups, [group.channels // 2 for group in groups.prunable], orders, "l1")
    sliced = repair(slice_model(model, groups, half), half.keep)
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    patches = torch.nn.functional.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)  # (N H W, C 9)
    kept = [channel * 9 + entry for channel in half.keep[groups.prunable[0].name] for entry in range(9)]
    outputs = patches @ weight.detach().flatten(1).T
    expected = torch.linalg.lstsq(patches[:, kept].double(), outputs.double()).solution.T.float()
    torch.testing.assert_close(sliced.get_submodule(name).weight.flatten(1), expected, atol=1e-2, rtol=0)


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
