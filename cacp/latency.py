"""How long models take, in PyTorch and in ONNX Runtime, and why a pruned one may take longer than its MACs promise.

Models of one runtime are timed in turn, so that all see the same machine, and the runtimes block by block: threads of
one that still wait for work would slow the other down.

What keeps a pruned model from gaining is found by timing it beside two others: the `narrowest` (one channel in every
prunable group; one group's worth in grouped convolutions) shows what no pruning of these groups takes away, `in eights`
(keep counts rounded up to multiples of 8) whether odd channel counts cost time. What does not grow with the batch is
what a straight line through both batch sizes leaves at 0 images.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cacp.cost import CostModel
from cacp.evaluation import device_of, synchroniser
from cacp.schema import ChannelGroup, ChannelGroups, Policy
from cacp.shipping import exported, onnx_model, onnx_session, quiet, reason, versions
from cacp.slicing import slice_model

BATCHES = (1, 64)  # images
REPEATS = 30
SECONDS = 20.0  # for all models of a runtime and a batch; there are fewer repeats where they would take longer
LEAST_REPEATS = 6
MULTIPLE = 8  # channels: floats of an AVX register, and half of one of AVX-512
PROMISED = 0.8  # the part of what MACs promise below which a pruned model's time is looked into
NOTABLE = 0.05  # of a time: less is not worth a word
_BLOCKS = 3

Run = Callable[[], object]  # runs a model on its images, to the end
Runner = Callable[[Tensor], Run]  # takes the images (B, C, H, W), on the CPU


class Latency(NamedTuple):
    """Milliseconds for a batch, repeat by repeat."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def spread_ms(self) -> float:
        """The interquartile range."""
        quartiles = statistics.quantiles(self.samples_ms, n=4)
        return quartiles[2] - quartiles[0]

    def to_json(self) -> dict[str, float]:
        return {"median": self.median_ms, "interquartile_range": self.spread_ms, "repeats": len(self.samples_ms)}


def torch_runner(model: nn.Module) -> Runner:
    """Runs a model, put in eval mode, on its device; images are moved there before."""
    model.eval()

    def bound(images: Tensor) -> Run:
        device = device_of(model)
        synchronise, there = synchroniser(device), images.to(device)

        @torch.inference_mode()
        def run() -> None:
            model(there)
            synchronise()

        return run

    return bound


def onnx_runner(model: bytes) -> Runner:
    """Runs an ONNX model of `cacp.shipping.onnx_model`."""
    session = onnx_session(model)
    return lambda images: lambda: session.run(None, {"images": images.numpy()})


def measure_latencies(
    runners: Mapping[str, Mapping[str, Runner]], input_shape: Sequence[int], batch: int
) -> dict[str, dict[str, Latency]]:
    """Time models in turn, runtime by runtime, in three blocks.

    Args:
        runners: by runtime and name of the model.
        input_shape: (C, H, W) of an image.
        batch: images.
    """
    images = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    runs = {runtime: {name: one(images) for name, one in models.items()} for runtime, models in runners.items()}
    samples: dict[str, dict[str, list[float]]] = {
        runtime: {name: [] for name in models} for runtime, models in runs.items()
    }
    rounds: dict[str, int] = {}
    for _ in range(_BLOCKS):
        for runtime, models in runs.items():
            warm = [_round(models) for _ in range(2)]  # not kept: caches, and threads of the other runtime
            if runtime not in rounds:
                rounds[runtime] = rounds_within(sum(warm[-1].values())) // _BLOCKS
            for _ in range(rounds[runtime]):
                for name, seconds in _round(models).items():
                    samples[runtime][name].append(1000 * seconds)
    return {
        runtime: {name: Latency(tuple(times)) for name, times in models.items()} for runtime, models in samples.items()
    }


def rounds_within(seconds: float) -> int:
    """How many rounds of so many seconds are affordable; at least LEAST_REPEATS."""
    return max(LEAST_REPEATS, min(REPEATS, int(SECONDS / max(seconds, 1e-9))))


def _round(models: Mapping[str, Run]) -> dict[str, float]:
    """Seconds of each model, one after another."""
    seconds = {}
    for name, run in models.items():
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return seconds


class LatencyBench:
    """Times the pruned models of one dense model beside it.

    Args:
        dense: model, in eval mode, channels last.
        groups: of this model.
        input_shape: (C, H, W) of an image.
    """

    def __init__(self, dense: nn.Module, groups: ChannelGroups, input_shape: tuple[int, int, int]) -> None:
        self._dense, self._groups, self._input_shape = dense, groups, input_shape
        self._cost_model = CostModel(groups)
        self._onnx: dict[tuple[int, ...], bytes] = {}  # by keep counts; the weights do not change the time

    def report(
        self, pruned: nn.Module, keep_counts: Mapping[str, int], onnx: bytes | str, batches: Sequence[int] = BATCHES
    ) -> dict[str, Any]:
        """Milliseconds a batch of both models in both runtimes, and what keeps the pruned one from its MACs' promise.

        Args:
            pruned: model, in eval mode, channels last, on the device of the dense one.
            keep_counts: of its groups.
            onnx: the same as an ONNX model, or why there is none.
            batches: images; two or more.
        """
        models = {"dense": self._dense, "pruned": pruned}
        counts = {
            "dense": self._counts(lambda group: group.channels),
            "pruned": self._counts(lambda group: keep_counts[group.name]),
        }
        runners = {"torch": {name: torch_runner(model) for name, model in models.items()}}
        missing = onnx if isinstance(onnx, str) else ""
        if isinstance(onnx, bytes):
            self._onnx[counts["pruned"]] = onnx
            try:
                runners["onnxruntime"] = self._runners("onnxruntime", models, counts)
            except Exception as error:  # whatever an exporter raises
                missing = reason(error)
        measured = {batch: measure_latencies(runners, self._input_shape, batch) for batch in batches}
        reasons = self._reasons(models, counts, measured)
        by_runtime = {
            runtime: {
                f"batch {batch}": {name: latency.to_json() for name, latency in latencies[runtime].items()}
                for batch, latencies in measured.items()
            }
            for runtime in runners
        }
        return {
            "latency_ms": by_runtime["torch"],
            "latency_ms_onnxruntime": {"missing": missing} if missing else by_runtime["onnxruntime"],
            "latency_conditions": {
                "threads": torch.get_num_threads(),
                "torch": f"{versions()['torch']} on {device_of(self._dense)}, channels last",
                "onnxruntime": f"{versions()['onnxruntime']} on cpu",
            },
            "latency_why": reasons,
        }

    def _counts(self, count: Callable[[ChannelGroup], int]) -> tuple[int, ...]:
        return tuple(count(group) for group in self._groups.prunable)

    def _runners(
        self, runtime: str, models: Mapping[str, nn.Module], counts: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Runner]:
        if runtime == "torch":
            return {name: torch_runner(model) for name, model in models.items()}
        for name, model in models.items():
            if counts[name] not in self._onnx:
                with quiet():
                    program = exported(copy.deepcopy(model).cpu().eval(), self._input_shape)
                    self._onnx[counts[name]] = onnx_model(program, {})
        return {name: onnx_runner(self._onnx[counts[name]]) for name in models}

    def _reasons(
        self,
        models: Mapping[str, nn.Module],
        counts: Mapping[str, tuple[int, ...]],
        measured: dict[int, dict[str, dict[str, Latency]]],
    ) -> dict[str, Any]:
        """For every runtime and batch at which the pruned model falls short, and does so at a second look: what was
        measured, and what that says. The times of the second look take the place of those in `measured`.
        """
        promised = self._macs(counts["dense"]) / self._macs(counts["pruned"])
        short: dict[str, list[int]] = {}
        for batch, latencies in measured.items():
            for runtime, both in latencies.items():
                if _falls_short(both, promised):
                    short.setdefault(runtime, []).append(batch)
        if not short:
            return {}
        kept = dict(zip((group.name for group in self._groups.prunable), counts["pruned"], strict=True))
        all_counts = {
            **counts,
            "narrowest": self._counts(lambda group: group.block),
            "in eights": self._counts(lambda group: in_eights(kept[group.name], group)),
        }
        all_models = {**models, **{name: self._sliced(all_counts[name]) for name in ("narrowest", "in eights")}}
        shares = {name: self._macs(one) / self._macs(counts["dense"]) for name, one in all_counts.items()}
        reasons: dict[str, Any] = {}
        for runtime, batches in short.items():
            try:
                runners = {runtime: self._runners(runtime, all_models, all_counts)}
            except Exception as error:  # whatever an exporter raises
                reasons[runtime] = {"why": f"not looked into: {reason(error)}"}
                continue
            pruned_ms = {batch: latencies[runtime]["pruned"].median_ms for batch, latencies in measured.items()}
            for batch in batches:
                times = measure_latencies(runners, self._input_shape, batch)[runtime]
                measured[batch][runtime] = {name: times[name] for name in models}
                pruned_ms[batch] = times["pruned"].median_ms
                if not _falls_short(times, promised):
                    continue
                fixed = fixed_ms(pruned_ms) if batch == min(pruned_ms) else None
                reasons[f"{runtime}, batch {batch}"] = {
                    "ms": {name: latency.to_json() for name, latency in times.items()},
                    "of_dense_macs": shares,
                    "why": explanation(times, shares, fixed),
                }
        return reasons

    def _macs(self, counts: tuple[int, ...]) -> int:
        return self._cost_model.cost(counts).macs

    def _sliced(self, counts: tuple[int, ...]) -> nn.Module:
        """A model of these keep counts; which channels they are does not change the time."""
        keep = {group.name: tuple(range(count)) for group, count in zip(self._groups.prunable, counts, strict=True)}
        model = slice_model(self._dense, self._groups, Policy(keep, "none")).eval()
        return model.to(memory_format=torch.channels_last)  # as the others


def _falls_short(times: Mapping[str, Latency], promised: float) -> bool:
    """Whether the pruned model gains less than PROMISED of what its MACs promise."""
    return times["dense"].median_ms < PROMISED * promised * times["pruned"].median_ms


def in_eights(count: int, group: ChannelGroup) -> int:
    """A keep count of a group, rounded up to a multiple of 8, at most all channels."""
    multiple = math.lcm(MULTIPLE, group.block)
    return min(-(-count // multiple) * multiple, group.channels)


def fixed_ms(batch_ms: Mapping[int, float]) -> float:
    """What a straight line through the times of the smallest and largest batch leaves at 0 images; at least 0.

    >>> fixed_ms({1: 3.0, 64: 66.0})
    2.0
    """
    (small, small_ms), (large, large_ms) = min(batch_ms.items()), max(batch_ms.items())
    return max(0.0, small_ms - small * (large_ms - small_ms) / (large - small))


def explanation(latencies: Mapping[str, Latency], shares: Mapping[str, float], fixed: float | None) -> str:
    """What the times of dense, pruned, narrowest and in eights say, in a sentence; no more than that.

    Args:
        latencies: of the four, measured in turn.
        shares: of the dense MACs, likewise.
        fixed: milliseconds of the pruned model that do not grow with the batch, where that is known.
    """
    ms = {name: latency.median_ms for name, latency in latencies.items()}
    parts = []
    if fixed is not None and fixed > NOTABLE * ms["pruned"]:
        parts.append(f"{fixed:.1f} of its {ms['pruned']:.1f} ms do not grow with the batch, as calls of layers do not")
    if ms["narrowest"] > (shares["narrowest"] + NOTABLE) * ms["dense"]:
        parts.append(
            f"with every group at its narrowest ({100 * shares['narrowest']:.0f} % of the MACs) {ms['narrowest']:.1f} "
            f"of the dense model's {ms['dense']:.1f} ms are left, which no pruning of these groups takes away"
        )
    if shares["in eights"] > shares["pruned"]:
        faster = _quicker(latencies["in eights"], latencies["pruned"])
        rounded = f"keep counts rounded up to multiples of {MULTIPLE} ({100 * shares['in eights']:.0f} instead of "
        rounded += f"{100 * shares['pruned']:.0f} % of the MACs)"
        times = f"{ms['in eights']:.1f} instead of {ms['pruned']:.1f} ms"
        if faster:
            parts.append(f"{rounded} take {times}: prune with --channel_multiple {MULTIPLE}")
        elif not _quicker(latencies["pruned"], latencies["in eights"]):
            parts.append(f"{rounded} make no difference that can be told from the spread, {times}")
    gained, promised = ms["dense"] / ms["pruned"], 1 / shares["pruned"]
    found = "; ".join(parts) or "none of what was tried explains it"
    return f"{gained:.2f} x as fast as the dense model, where its MACs promise {promised:.2f} x: {found}"


def _quicker(one: Latency, other: Latency) -> bool:
    """Whether one model took notably less time than another, in the median and in three of four rounds."""
    rounds = list(zip(one.samples_ms, other.samples_ms, strict=True))
    often = sum(first < second for first, second in rounds) >= 0.75 * len(rounds)
    return often and one.median_ms < (1 - NOTABLE) * other.median_ms
