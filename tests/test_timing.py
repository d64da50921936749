"""Latency as a cost: the table of a network whose times are known, what it says of policies, files by anybody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Net, lively, random_policy, resnet20, tiny_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from cacp import timing
from cacp.budget import BudgetWalk, check_reachable, in_window, keep_count, meets_targets, scaled_ratios, uniform_counts
from cacp.checkpoint import save_json
from cacp.cost import CostModel
from cacp.graph import trace, traced
from cacp.latency_table import COEFFICIENTS, WHOLE, LatencyTable, layer_terms
from cacp.methods.caie import useful_parts
from cacp.methods.sensitivity import threshold_counts
from cacp.methods.threshold import most_important_counts
from cacp.schema import COSTS, Budget, ChannelGroups, Cost, UserError
from cacp.timing import DeviceClock, measure_table, stored_table

DEVICE, SHAPE = "a device", (1, 8, 8)


class FakeClock:
    """Milliseconds by a formula: a convolution takes 1 + 0.01 n_in n_out, other nodes 0.1 an output channel; a network
    `scale` times that and `offset` more. Every count that is no multiple of 8 adds `odd` to a network."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, odd: float = 0.0) -> None:
        self.scale, self.offset, self.odd = scale, offset, odd

    def layers(self, graphs: Sequence[fx.GraphModule], images: Tensor) -> list[dict[str, float]]:
        return [self._nodes(graph) for graph in graphs]

    def _nodes(self, graph: fx.GraphModule) -> dict[str, float]:
        modules, found = dict(graph.named_modules()), {}
        for node in graph.graph.nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                found[node.name] = 1 + 0.01 * module.in_channels * module.out_channels
            elif node.op.startswith("call"):
                found[node.name] = 0.1 * node.meta["tensor_meta"].shape[1]
        return found

    def networks(self, models: Sequence[nn.Module], images: Tensor) -> list[float]:
        return [self._network(model, images) for model in models]

    def _network(self, model: nn.Module, images: Tensor) -> float:
        nodes = self._nodes(traced(model, images[:1]))
        odd = sum(one.out_channels % 8 != 0 for one in model.modules() if isinstance(one, nn.Conv2d))
        return self.scale * sum(nodes.values()) + self.offset + self.odd * odd


def table_of(groups: ChannelGroups, model: nn.Module, clock: FakeClock, size: int = 32) -> LatencyTable:
    channels = next(model.parameters()).shape[1]
    return measure_table(model, groups, (channels, size, size), 2, DEVICE, clock)


def applied(table: LatencyTable, groups: ChannelGroups, model: nn.Module, size: int = 32) -> CostModel:
    channels = next(model.parameters()).shape[1]
    graph = traced(model, torch.zeros(1, channels, size, size)).graph
    return CostModel(table.applied(groups, graph, "latency.json"))


@pytest.fixture(scope="module")
def streams() -> CostModel:
    """ResNet-20 with residual streams, its table by the fake clock."""
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32), "all")
    return applied(table_of(groups, model, FakeClock(0.5, 3.0)), groups, model)


@pytest.fixture(scope="module")
def inner() -> CostModel:
    """ResNet-20 without them."""
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32))
    return applied(table_of(groups, model, FakeClock()), groups, model)


def test_times_that_are_such_combinations_are_found_exactly() -> None:
    model = lively(tiny_cnn())
    groups = trace(model, torch.zeros(1, 1, 8, 8))
    clock = FakeClock(scale=0.5, offset=3.0)
    table = table_of(groups, model, clock, 8)
    assert list(table.layers) == ["0", "3", "9", WHOLE]  # batch norms, ReLUs, pooling and dropout go with the layer
    cost_model = applied(table, groups, model, 8)
    # of conv 0, batch norm and ReLU; of conv 3, the same, pooling, flatten and dropout; of the linear layer
    for counts in ((12, 12), (5, 2), (2, 9)):
        first, second = counts
        node_ms = (1 + 0.01 * first + 0.2 * first) + (1 + 0.01 * first * second + 0.5 * second) + 0.1 * 3
        assert cost_model.cost(counts).latency_ps == pytest.approx(1e9 * (3.0 + 0.5 * node_ms), rel=1e-9)
    assert table.dense_ps == cost_model.dense.latency_ps == pytest.approx(table.measured_dense_ps, rel=1e-9)
    assert table.fit_error < 1e-9 and table.largest_error < 1e-9 and table.note == ""
    assert [one.policy for one in table.checked][::3] == ["uniform 0.3", "random around 0.3"]
    assert (table.device, table.threads, table.batch, table.input_shape) == (DEVICE, 1, 2, (1, 8, 8))


def test_macs_and_params_stay_and_latency_is_monotone_and_exact(streams: CostModel) -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32), "all")
    plain = CostModel(groups)
    assert plain.cost_names == ("macs", "params") and streams.cost_names == ("macs", "params", "latency")
    for seed in range(5):
        policy = random_policy(groups, seed)
        counts = np.array([len(policy.keep[name]) for name in plain.names])
        cost = streams.cost(counts)
        assert cost.counted == plain.cost(counts) == Cost(cost.macs, cost.params)
        for group in range(len(counts)):
            more = counts.copy()
            more[group] = streams.channels[group]
            assert streams.cost(more).latency_ps >= cost.latency_ps
            change = streams.change(counts, group, more[group])
            assert cost.latency_ps + change[2] == streams.cost(more).latency_ps  # to the bit, in another order
    assert np.array_equal(streams.costs(counts)[:2], plain.costs(counts))


def test_the_error_is_stated_and_so_is_what_multiples_of_8_give() -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 32, 32))
    table = table_of(groups, model, FakeClock(odd=10.0))
    assert table.largest_error > 0.05 and table.median_error <= table.largest_error
    assert table.note.startswith(f"the table is up to {100 * table.largest_error:.1f} % of the dense latency off; with")
    assert table.note.endswith("(medians): prune with --channel_multiple 8")
    eights = trace(model, torch.zeros(1, 3, 32, 32), channel_multiple=8)
    assert table_of(eights, model, FakeClock(odd=10.0)).note == ""


def test_branches_of_a_concatenation_are_one_term_of_all_their_channels() -> None:
    model = lively(
        Net(
            lambda m, x: m.d(torch.relu(m.norm(torch.cat([m.a(x), m.b(x)], 1)))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(12), d=nn.Conv2d(12, 5, 1),
        )
    )  # fmt: skip
    groups = trace(model, torch.zeros(1, 3, 9, 9))
    terms = {term.name: term for term in layer_terms(groups, traced(model, torch.zeros(1, 3, 9, 9)).graph)}
    assert list(terms) == ["a", "b", "cat", "d"]
    assert terms["cat"].outputs and terms["cat"].outputs.segments == ("a", "b")
    assert terms["cat"].nodes == ["cat", "norm", "relu"] and terms["d"].nodes == ["d", "mean"]
    cost_model = applied(table_of(groups, model, FakeClock(), 9), groups, model, 9)
    ms = sum(1 + 0.01 * 3 * count + 0.3 * count for count in (4, 3)) + 1 + 0.01 * 7 * 5 + 0.1 * 5
    assert cost_model.cost((4, 3)).latency_ps == pytest.approx(1e9 * ms, rel=1e-9)


@given(
    latency=st.floats(0.6, 0.99),
    macs=st.floats(0.2, 0.99),
    actions=st.lists(st.floats(-1, 1), min_size=9, max_size=9),
)
@settings(max_examples=100, deadline=None)
def test_a_policy_meets_macs_and_latency_and_uses_one_up(
    inner: CostModel, latency: float, macs: float, actions: list[float]
) -> None:
    budget = Budget({"macs": macs, "latency": latency})
    check_reachable(inner, budget)
    walk = BudgetWalk(inner, budget)
    for action in actions:
        walk.choose(keep_count(walk.interval(), action))
    assert walk.finished
    cost = inner.cost(walk.chosen)
    assert cost.macs <= macs * inner.dense.macs and cost.latency_ps <= latency * inner.dense.latency_ps
    assert meets_targets(cost, inner.dense, budget) and in_window(cost, inner.dense, budget)


@pytest.mark.parametrize("budget", [{"latency": 0.5}, {"macs": 0.35, "params": 0.5, "latency": 0.6}], ids=str)
def test_every_way_to_prune_by_a_threshold_takes_latency(streams: CostModel, budget: dict[str, float]) -> None:
    asked, generator = Budget(budget), torch.Generator().manual_seed(0)
    importance = {
        name: torch.rand(channels, generator=generator)
        for name, channels in zip(streams.names, streams.channels.tolist(), strict=True)
    }
    curves = [np.linspace(1, 0, count + 1) for count in streams.channels]
    for curve, least in zip(curves, streams.min_keep, strict=True):
        curve[:least] = np.nan
    for counts in (
        uniform_counts(streams, asked),
        most_important_counts(importance, streams, asked),
        threshold_counts(curves, streams, asked),
    ):
        cost = streams.cost(counts)
        assert meets_targets(cost, streams.dense, asked)
        kept = dict(zip(COSTS, np.array(cost) / np.array(streams.dense), strict=True))
        assert max(kept[name] - target for name, target in budget.items()) > -0.05  # the grain of a stream
    parts = useful_parts(streams, streams.channels.copy(), Budget({"latency": 0.5}))
    slopes = [-streams.change(streams.channels, group, count - 1)[2] for group, count in enumerate(streams.channels)]
    assert parts == pytest.approx(np.array(slopes) / streams.dense.latency_ps)


def test_ratios_are_scaled_to_the_latency(streams: CostModel) -> None:
    ratios = np.random.default_rng(0).uniform(0.2, 1, (4, len(streams.names)))
    scaled = scaled_ratios(streams, Budget({"latency": 0.6}), ratios)
    kept = streams.costs(scaled * streams.channels)[:, 2] / streams.dense.latency_ps
    assert kept == pytest.approx(np.full(4, 0.6), abs=1e-5)


def test_a_latency_that_no_policy_reaches_is_refused_with_what_is_reachable(streams: CostModel) -> None:
    least = streams.cost(streams.min_keep).latency_ps / streams.dense.latency_ps
    with pytest.raises(
        UserError, match=rf"no policy meets latency 0\.01 \(reachable: {least:.3f} to 1\).*latency_batch"
    ):
        check_reachable(streams, Budget({"latency": 0.01}))
    plain = CostModel(trace(resnet20(), torch.zeros(1, 3, 32, 32)))
    with pytest.raises(UserError, match=r"latency of a policy is not known, but the budget is latency-0\.60"):
        check_reachable(plain, Budget({"latency": 0.6}))


def test_the_clock_of_the_device_times_every_node_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacp.latency.SECONDS", 0.0)
    model, images = lively(tiny_cnn()), torch.rand(2, 1, 8, 8)
    graph = traced(model, images[:1])
    called = [node.name for node in graph.graph.nodes if node.op.startswith("call")]
    (nodes,) = DeviceClock().layers([graph], images)
    assert list(nodes) == called and all(ms > 0 for ms in nodes.values())
    slow = nn.Sequential(*(nn.Conv2d(1, 1, 7, padding=3) for _ in range(60)))
    first, second = DeviceClock().networks([model, slow], images)
    assert 0 < first < second


# files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, ChannelGroups, LatencyTable]:
    model = lively(tiny_cnn())
    groups = trace(model, torch.zeros(1, 1, 8, 8))
    return model, groups, table_of(groups, model, FakeClock(0.3, 1.7), 8)


def test_a_stored_table_is_the_same_to_the_bit(tmp_path: Path, tiny: tuple) -> None:
    model, groups, table = tiny
    path = tmp_path / "latency.json"
    assert stored_table(path, 2, SHAPE, DEVICE) is None
    save_json(path, table.to_json())
    again = stored_table(path, 2, SHAPE, DEVICE)
    assert again == table
    assert applied(again, groups, model, 8).dense == applied(table, groups, model, 8).dense


def test_a_table_of_another_device_number_of_threads_or_batch_is_refused(
    tmp_path: Path, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latency.json"
    save_json(path, tiny[2].to_json())
    with pytest.raises(UserError, match="measured on a device with 1 threads, but this is another with 1; go on there"):
        stored_table(path, 2, SHAPE, "another")
    with pytest.raises(
        UserError, match=r"--latency_batch 2 and images of \(1, 8, 8\), but got 64 and \(1, 8, 8\); delete"
    ):
        stored_table(path, 64, SHAPE, DEVICE)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 5)
    with pytest.raises(UserError, match=r"but this is a device with 5; go on there \(--device, OMP_NUM_THREADS=1\)"):
        stored_table(path, 2, SHAPE, DEVICE)
    assert stored_table(path, 2, SHAPE, None) == tiny[2]  # to export


def test_a_table_of_other_groups_is_refused(tiny: tuple) -> None:
    model, _, table = tiny
    for options in ({"min_keep": 0.5}, {"channel_multiple": 4}, {"ignore": ["0"]}):
        groups = trace(model, torch.zeros(1, 1, 8, 8), **options)
        with pytest.raises(UserError, match="another network, or another scope, ignore, min_keep or channel_multiple"):
            applied(table, groups, model, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "it must have format 1"),
        ({"layers": []}, "layers must be an object"),
        ({"layers": {"0": dict.fromkeys(COEFFICIENTS, -1.0)}}, r"lie in \[0, 2\*\*53\], but not in 0: "),
        ({"layers": {"0": dict.fromkeys(COEFFICIENTS, 1e17)}}, "lie in"),
        ({"layers": {"0": {"fixed_ps": 1.0}}}, "0 lacks per_in_ps"),
        ({"dense_ps": "1"}, "dense_ps must be a number"),
        ({"checked": []}, "checked networks"),
        ({"checked": [{"policy": "p", "macs": 1, "predicted": 1}]}, "lacks measured"),
        ({"threads": True}, "threads must be a whole number"),
        ({"groups": {"0": "12"}}, "0 must be a list"),
    ],
)
def test_a_hostile_table_is_refused(tmp_path: Path, tiny: tuple, change: dict, text: str) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({**tiny[2].to_json(), **change}))
    with pytest.raises(UserError, match=text) as caught:
        stored_table(path, 2, SHAPE, DEVICE)
    assert "latency.json is no latency table" in str(caught.value) and len(str(caught.value)) < 1000


def test_a_table_whose_layers_are_not_the_dense_network_is_refused(tmp_path: Path, tiny: tuple) -> None:
    model, groups, table = tiny
    path = tmp_path / "latency.json"
    nothing = {name: dict.fromkeys(one, 0.0) for name, one in table.layers.items()}
    for change in ({"dense_ps": 1.0}, {"layers": nothing}, {"layers": nothing, "dense_ps": 0.0}):
        path.write_text(json.dumps({**table.to_json(), **change}))
        with pytest.raises(UserError, match="ps, but its layers sum up to"):
            applied(stored_table(path, 2, SHAPE, DEVICE), groups, model, 8)
    path.write_text('{"format": NaN}')
    with pytest.raises(UserError, match="NaN"):
        stored_table(path, 2, SHAPE, DEVICE)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested deeper"):
        stored_table(path, 2, SHAPE, DEVICE)
