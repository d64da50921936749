"""Measures a latency table (`cacp.latency_table`), and how far it is off.

Networks are sliced to counts from all over their range, and timed in turn, operator by operator inside of each: a layer
meets the memory and caches that it has in the network. What layers alone cannot see, calls and caches, is a scale and
an offset, neither negative, fitted to the times of the same networks as a whole. Networks that the fit has not seen say
how far predicted and measured parts of the dense network's latency differ.

Letters: K fitted networks, G prunable groups, L layers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, fx, nn

from cacp.budget import check_prunable
from cacp.checkpoint import load_json
from cacp.cost import CostModel
from cacp.evaluation import device_of, synchroniser
from cacp.graph import traced
from cacp.latency import MULTIPLE, NOTABLE, in_eights, measure_latencies, rounds_within, torch_runner
from cacp.latency_table import COEFFICIENTS, REMEDY, WHOLE, Checked, LatencyTable, Term, layer_terms, ranges, with_times
from cacp.parsing import shortened
from cacp.schema import PS_PER_MS, Axis, ChannelGroups, Policy, UserError
from cacp.slicing import slice_model

LEVELS = 10  # mean keep ratios of the networks that the table is fitted to, from the least to 1
SPREAD = 0.3  # their groups differ from the mean by at most this, so that inputs and outputs are told apart
CHECKED = (0.3, 0.5, 0.7)  # keep ratios of the networks that check it: uniform, and at random around these


class Clock(Protocol):
    """Times networks on images (B, C, H, W), in turn: milliseconds, medians."""

    def layers(self, graphs: Sequence[fx.GraphModule], images: Tensor) -> list[dict[str, float]]:
        """Of every node of each network."""
        ...

    def networks(self, models: Sequence[nn.Module], images: Tensor) -> list[float]:
        """Of each network as a whole."""
        ...


class DeviceClock:
    """The clock of the device that the networks are on."""

    def layers(self, graphs: Sequence[fx.GraphModule], images: Tensor) -> list[dict[str, float]]:
        samples = _in_turn([_NodeTimes(graph).measured(images) for graph in graphs])
        return [
            {node: statistics.median(sample[node] for sample in series) for node in series[0]}
            for series in zip(*samples, strict=True)
        ]

    def networks(self, models: Sequence[nn.Module], images: Tensor) -> list[float]:
        runners = {"torch": {str(number): torch_runner(model) for number, model in enumerate(models)}}
        times = measure_latencies(runners, images.shape[1:], len(images))["torch"]
        return [one.median_ms for one in times.values()]


def _in_turn(runs: Sequence[Callable[[], dict[str, float]]]) -> list[list[dict[str, float]]]:
    """Samples of all, round by round; the first two rounds, which warm up, are left out."""
    for _ in range(2):
        start = time.perf_counter()
        for run in runs:
            run()
    rounds = rounds_within(time.perf_counter() - start)
    return [[run() for run in runs] for _ in range(rounds)]


class _NodeTimes(fx.Interpreter):
    """Runs a graph, and times the call of every node, without the interpreter's own."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._synchronise = synchroniser(device_of(graph))
        self._node = ""
        self._ms: dict[str, float] = {}

    def measured(self, images: Tensor) -> Callable[[], dict[str, float]]:
        there = images.to(device_of(self.module), memory_format=torch.channels_last)

        @torch.inference_mode()
        def run() -> dict[str, float]:
            self._ms = {}
            self.run(there)
            return self._ms

        return run

    def run_node(self, n: fx.Node) -> Any:
        self._node = n.name
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_method, target, args, kwargs)

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self._synchronise()
        self._ms[self._node] = 1000 * (time.perf_counter() - start)
        return result


def measure_table(
    model: nn.Module,
    groups: ChannelGroups,
    input_shape: tuple[int, int, int],
    batch: int,
    device: str,
    clock: Clock | None = None,
) -> LatencyTable:
    """Time the layers of a network, fit the table, and check it.

    Args:
        model: dense, on its device.
        groups: of this model.
        input_shape: (C, H, W) of an image.
        batch: images.
        device: its name, for the table.
        clock: of the device by default.

    Raises:
        UserError: for a model without a prunable group.
    """
    bench = _Bench(model, groups, input_shape, batch, clock or DeviceClock())
    channels = bench.cost_model.channels
    check_prunable(bench.cost_model)
    generator = np.random.default_rng(0)
    levels = np.linspace(np.mean(bench.cost_model.min_keep / channels), 1, LEVELS)
    fitted = [channels, *(bench.around(level, generator) for level in levels)]  # K of (G,)
    unseen = {f"uniform {level}": bench.near(np.full(len(channels), level)) for level in CHECKED}
    unseen |= {f"random around {level}": bench.around(level, generator) for level in CHECKED}
    networks_ps = bench.networks_ps([*fitted, *unseen.values()])
    dense_ps, unseen_ps = float(networks_ps[0]), networks_ps[len(fitted) :]
    terms = layer_terms(groups, bench.graph(channels).graph)
    layers, fit_error = _fitted(bench, terms, fitted, networks_ps[: len(fitted)])
    cost_model = CostModel(with_times(groups, terms, layers))
    checked = _checked(cost_model, unseen, (unseen_ps / dense_ps).tolist())
    return LatencyTable(
        device=device,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        batch=batch,
        input_shape=input_shape,
        groups=ranges(groups),
        dense_ps=cost_model.dense.latency_ps,
        measured_dense_ps=dense_ps,
        layers=layers,
        fit_error=fit_error,
        checked=checked,
        note=_note(bench, cost_model, unseen, checked),
    )


def stored_table(path: Path, batch: int, input_shape: tuple[int, ...], device: str | None) -> LatencyTable | None:
    """The latency table of a run; None where there is none.

    Args:
        path: of its file.
        batch: images that it must be for.
        input_shape: (C, H, W) of these.
        device: name of the one that it must have been measured on, by as many threads as there are; None for any.

    Raises:
        UserError: for a damaged table, or one of other images, another device or number of threads.
    """
    if not path.is_file():
        return None
    table = LatencyTable.from_json(load_json(path), str(path))
    if (table.batch, table.input_shape) != (batch, tuple(input_shape)):
        raise UserError(
            f"{path} is for --latency_batch {table.batch} and images of {shortened(table.input_shape)}, but got "
            f"{batch} and {input_shape}; {REMEDY}"
        )
    threads = torch.get_num_threads()
    if device is not None and (device, threads) != (table.device, table.threads):
        raise UserError(
            f"{path} was measured on {table.device:.80} with {table.threads} threads, but this is {device} with "
            f"{threads}; go on there (--device, OMP_NUM_THREADS={table.threads}), or {REMEDY}"
        )
    return table


class _Bench:
    """Networks of a dense model by keep counts, and their times; which channels they keep does not change these."""

    def __init__(
        self, model: nn.Module, groups: ChannelGroups, input_shape: tuple[int, int, int], batch: int, clock: Clock
    ) -> None:
        self.groups, self.cost_model = groups, CostModel(groups)
        self._model, self._clock = model, clock
        self._example = torch.zeros(1, *input_shape, device=device_of(model))
        self._images = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0))

    def network(self, counts: np.ndarray) -> nn.Module:
        keep = {name: tuple(range(count)) for name, count in zip(self.cost_model.names, counts.tolist(), strict=True)}
        model = slice_model(self._model, self.groups, Policy(keep, "none")).eval()
        return model.to(memory_format=torch.channels_last)

    def graph(self, counts: np.ndarray) -> fx.GraphModule:
        return traced(self.network(counts), self._example)

    def near(self, ratios: np.ndarray) -> np.ndarray:
        """Feasible counts (G,) near keep ratios (G,)."""
        model = self.cost_model
        counts = np.clip(np.rint(ratios * model.channels), model.min_keep, model.channels)
        return model.rounded_down(counts.astype(np.int64))

    def around(self, level: float, generator: np.random.Generator) -> np.ndarray:
        """Feasible counts (G,) at random around a keep ratio."""
        return self.near(level + SPREAD * generator.uniform(-1, 1, len(self.cost_model.names)))

    def layers_ps(self, terms: Sequence[Term], policies: Sequence[np.ndarray]) -> np.ndarray:
        """(K, L) picoseconds of the terms inside of the networks of these counts."""
        by_node = self._clock.layers([self.graph(counts) for counts in policies], self._images)
        return PS_PER_MS * np.array([[sum(ms[node] for node in term.nodes) for term in terms] for ms in by_node])

    def networks_ps(self, policies: Sequence[np.ndarray]) -> np.ndarray:
        """(K,) picoseconds of the networks of these counts."""
        return PS_PER_MS * np.array(self._clock.networks([self.network(counts) for counts in policies], self._images))

    def features(self, term: Term, policies: Sequence[np.ndarray]) -> np.ndarray:
        """(K, 4): 1, n_in, n_out, n_in * n_out of a term under these counts."""
        n_in, n_out = (np.array([self._entries(axis, counts) for counts in policies]) for axis in term[1:3])
        return np.stack([np.ones(len(policies)), n_in, n_out, n_in * n_out], axis=1)

    def _entries(self, axis: Axis | None, counts: np.ndarray) -> int:
        if axis is None:
            return 1
        kept = dict(zip(self.cost_model.names, counts.tolist(), strict=True))
        return axis.repeat * sum(kept.get(name, self.groups[name].channels) for name in axis.segments)


def _fitted(
    bench: _Bench, terms: Sequence[Term], policies: Sequence[np.ndarray], networks_ps: np.ndarray
) -> tuple[dict[str, dict[str, float]], float]:
    """Coefficients of every term and of the whole network, and what the terms differ from their fit.

    Args:
        bench: times the terms.
        terms: of the network.
        policies: K of (G,) counts, the dense ones first.
        networks_ps: (K,) picoseconds of the networks as a whole.
    """
    measured = bench.layers_ps(terms, policies)  # (K, L)
    features = [bench.features(term, policies) for term in terms]  # L of (K, 4)
    fits = [_non_negative(one, times) for one, times in zip(features, measured.T, strict=True)]  # L of (4,)
    fitted = np.stack([one @ fit for one, fit in zip(features, fits, strict=True)], axis=1)  # (K, L)
    scale, offset = _non_negative(np.stack([fitted.sum(1), np.ones(len(fitted))], axis=1), networks_ps)
    layers = {term.name: _exact(scale * fit, networks_ps[0]) for term, fit in zip(terms, fits, strict=True)}
    layers[WHOLE] = _exact(np.array([offset, 0, 0, 0]), networks_ps[0])
    return layers, float(np.median(np.abs(fitted - measured).sum(1)) / measured[0].sum())


def _non_negative(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The coefficients (F,), none negative, of features (K, F) that are nearest to values (K,)."""
    sizes, size = features.max(axis=0), values.max()
    return size * nnls(features / sizes, values / size)[0] / sizes


def _exact(coefficients: np.ndarray, dense_ps: float) -> dict[str, float]:
    """Coefficients rounded so that all sums of them, up to some times the dense network's time, are exact: a policy
    costs the same to the bit, in whatever order its layers are added up.
    """
    quantum = 2.0 ** (math.ceil(math.log2(dense_ps)) - 48)
    return dict(zip(COEFFICIENTS, (np.rint(coefficients / quantum) * quantum).tolist(), strict=True))


def _checked(
    cost_model: CostModel, policies: Mapping[str, np.ndarray], measured: Sequence[float]
) -> tuple[Checked, ...]:
    """Predicted beside measured parts of the dense latency."""
    dense, costs = cost_model.dense, [cost_model.cost(counts) for counts in policies.values()]
    return tuple(
        Checked(name, cost.macs / dense.macs, cost.latency_ps / dense.latency_ps, float(part))
        for name, cost, part in zip(policies, costs, measured, strict=True)
    )


def _note(bench: _Bench, cost_model: CostModel, policies: Mapping[str, np.ndarray], checked: Sequence[Checked]) -> str:
    """What counts in eights give, where the table is notably off; else empty."""
    largest = max(one.error for one in checked)
    if largest <= NOTABLE or all(group.multiple % MULTIPLE == 0 for group in bench.groups.prunable):
        return ""
    eights = {
        name: np.array([in_eights(int(one), group) for one, group in zip(counts, bench.groups.prunable, strict=True)])
        for name, counts in policies.items()
    }
    times = bench.networks_ps([cost_model.channels, *eights.values()])
    dense_ps, eights_ps = times[0], times[1:]
    rounded = _checked(cost_model, eights, (eights_ps / dense_ps).tolist())
    macs, took = (
        [statistics.median(getattr(one, what) for one in kind) for kind in (checked, rounded)]
        for what in ("macs", "measured")
    )
    quicker = took[1] < (1 - NOTABLE) * took[0]
    advice = f"prune with --channel_multiple {MULTIPLE}" if quicker else "odd channel counts are not the reason"
    return (
        f"the table is up to {100 * largest:.1f} % of the dense latency off; with keep counts rounded up to multiples "
        f"of {MULTIPLE} the same networks take {100 * took[1]:.0f} instead of {100 * took[0]:.0f} % of the dense "
        f"latency, with {100 * macs[1]:.0f} instead of {100 * macs[0]:.0f} % of the MACs (medians): {advice}"
    )
