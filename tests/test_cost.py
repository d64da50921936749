"""The closed form against hand formulas, golden values, and what is counted on sliced models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import Net, keep_all, policy_counts, random_policy, resnet20
from torch import nn

from cacp.checkpoint import save_json
from cacp.cost import CostModel, counted_cost, layer_costs
from cacp.cost import __main__ as command
from cacp.graph import trace
from cacp.models import build_model
from cacp.schema import Budget, Cost, Policy, PolicyRecord, Score
from cacp.slicing import slice_model


def two_layers() -> nn.Module:
    return Net(
        lambda m, x: m.b(torch.relu(m.norm(m.a(x)))),
        a=nn.Conv2d(3, 10, 3, padding=1),
        norm=nn.BatchNorm2d(10),
        b=nn.Conv2d(10, 5, 5, stride=2, padding=2, bias=False),
    )


def branches() -> nn.Module:
    """Concatenation of a group with itself and another, a depthwise convolution, a flattened map."""
    return Net(
        lambda m, x: m.out(torch.flatten(m.depthwise(torch.cat([m.a(x), m.b(x), m.a(x)], 1)), 1)),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        depthwise=nn.Conv2d(16, 16, 3, groups=16, stride=2, padding=1),
        out=nn.Linear(16 * 16, 5),
    )


def shared() -> nn.Module:
    return Net(
        lambda m, x: m.c(m.b(m.b(m.a(x)))),
        a=nn.Conv2d(3, 9, 3, padding=1), b=nn.Conv2d(9, 9, 3, padding=1), c=nn.Conv2d(9, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, 10])
def test_two_layers_by_hand(count: int) -> None:
    cost_model = CostModel(trace(two_layers(), torch.zeros(1, 3, 8, 8)))
    macs = 8 * 8 * 9 * 3 * count + 4 * 4 * 25 * count * 5
    params = 9 * 3 * count + count + 2 * count + 25 * count * 5
    assert cost_model.names == ("a",)
    assert cost_model.cost([count]) == Cost(macs, params)
    assert cost_model.dense == cost_model.cost([10])


def test_resnet56_has_the_published_cost() -> None:
    for scope, number in (("inner", 27), ("all", 30)):
        cost_model = CostModel(trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32), scope))
        assert cost_model.dense == Cost(125_485_696, 853_018)
        assert len(cost_model.names) == number


def test_one_channel_less_of_a_resnet56_block_costs_two_layers_of_pairs() -> None:
    cost_model = CostModel(trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32)))
    counts = cost_model.channels.copy()
    counts[-1] -= 1
    pairs = 9 * (64 + 64)
    assert cost_model.cost(counts) == Cost(125_485_696 - pairs * 8 * 8, 853_018 - pairs - 2)


def test_many_policies_at_once_equal_one_by_one() -> None:
    cost_model = CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32), "all"))
    counts = np.random.default_rng(0).integers(1, cost_model.channels + 1, (7, len(cost_model.names)))
    assert [Cost(*map(int, row)) for row in cost_model.costs(counts)] == [cost_model.cost(row) for row in counts]


@pytest.mark.parametrize("build", [branches, shared, two_layers])
def test_a_change_is_the_difference_of_two_costs(build: Callable[[], nn.Module]) -> None:
    cost_model = CostModel(trace(build(), torch.zeros(1, 3, 8, 8), "all"))
    counts = np.random.default_rng(0).integers(1, cost_model.channels + 1, (6, len(cost_model.names)))
    for group, channels in enumerate(cost_model.channels):
        after = np.repeat(counts[:, None], channels, axis=1)  # (6, K, G)
        after[..., group] = np.arange(1, channels + 1)
        change = cost_model.change(counts[:, None], group, np.arange(1, channels + 1))  # (6, K, 2)
        np.testing.assert_array_equal(change, cost_model.costs(after) - cost_model.costs(counts)[:, None])


def test_costs_never_fall_when_a_count_grows() -> None:
    cost_model = CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32), "all"))
    counts = np.random.default_rng(1).integers(1, cost_model.channels, (20, len(cost_model.names)))
    base = cost_model.costs(counts)
    for group in range(len(cost_model.names)):
        more = counts.copy()
        more[:, group] += 1
        assert (cost_model.costs(more) > base).all()


def test_counting_leaves_the_mode_as_it_was() -> None:
    model = two_layers().train()
    assert counted_cost(model, (3, 8, 8)) == CostModel(trace(model, torch.zeros(1, 3, 8, 8))).dense
    assert model.training


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize(
    ("build", "size", "policies"),
    [
        (two_layers, 8, 4),
        (branches, 8, 8),
        (shared, 8, 4),
        (resnet20, 32, 5),
        (lambda: torchvision.models.resnet18(weights=None, num_classes=10), 64, 2),
        (lambda: torchvision.models.mobilenet_v2(weights=None, num_classes=10), 64, 2),
        (lambda: torchvision.models.densenet121(weights=None, num_classes=10), 64, 1),
    ],
    ids=["two_layers", "branches", "shared", "resnet20", "resnet18", "mobilenet_v2", "densenet121"],
)
def test_closed_form_equals_what_is_counted_on_the_sliced_model(
    build: object, size: int, policies: int, scope: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    groups = trace(model, torch.zeros(1, 3, size, size), scope)
    cost_model = CostModel(groups)
    assert groups.unknown == ()
    assert cost_model.dense == counted_cost(model, (3, size, size))
    for seed in range(policies):
        policy = random_policy(groups, seed)
        sliced = slice_model(model, groups, policy)
        assert cost_model.cost(policy_counts(groups, policy)) == counted_cost(sliced, (3, size, size))


def test_layers_that_tracing_does_not_know_are_counted_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Conv2d(6, 4, 1),
    ).eval()
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    assert groups.unknown == ("ConvTranspose2d at 2",)
    assert groups.fixed_macs == 8 * 8 * 8 * 8 * 2 * 2  # pixels of the input, channels in and out, kernel
    cost_model = CostModel(groups)
    assert cost_model.dense == counted_cost(model, (3, 8, 8))
    assert [group.name for group in groups.prunable] == ["3"]


def test_layers_add_up_to_the_cost_of_a_policy() -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32), "all")
    for policy in (keep_all(groups), random_policy(groups, 3)):
        layers = layer_costs(groups, policy.counts)
        macs, params = (sum(one.cost[column] for one in layers) for column in (0, 1))
        assert Cost(macs + groups.fixed_macs, params + groups.fixed_params) == counted_cost(
            slice_model(model, groups, policy), (3, 32, 32)
        )
    first = next(one for one in layer_costs(groups, {"conv1": 4}) if one.layer.module == "layer1.0.conv1")
    assert (first.inputs, first.outputs, first.cost) == (4, 16, Cost(32 * 32 * 9 * 4 * 16, 9 * 4 * 16))


def test_the_command_takes_a_policy_of_a_run_that_left_groups_whole(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups = trace(resnet20(), torch.zeros(1, 3, 32, 32), ignore=["layer1.*"])
    policy = Policy({group.name: tuple(range(8)) for group in groups.prunable}, "l1")
    assert 0 < len(policy.keep) < len(trace(resnet20(), torch.zeros(1, 3, 32, 32)).prunable)
    score = Score(0.5, 1.0, 0.5, CostModel(groups).cost([8] * len(policy.keep)))
    record = PolicyRecord(policy, Budget({"macs": 0.9}), score, score, "uniform", 0)
    save_json(tmp_path / "policy.json", record.to_json())
    monkeypatch.setattr(sys, "argv", ["cost", "--model=resnet20", f"--policy={tmp_path / 'policy.json'}"])
    command.main()
    shown = capsys.readouterr().out
    assert f"{score.cost.params:,}" in shown
    assert [line for line in shown.splitlines() if "layer1.0.conv1" in line and "16 of 16" in line and "100.00" in line]


def test_the_command_prints_layer_by_layer(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cost", "--model=resnet32"])
    command.main()
    shown = capsys.readouterr().out
    assert "68.86 M" in shown and "464,154" in shown  # by hand; He et al. 2015: 0.46 M parameters
    assert [line for line in shown.splitlines() if "layer3.4.conv2" in line and "64 of 64" in line and "100.00" in line]
