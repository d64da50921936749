"""Latency: who is slower, what is said of a model that gains less than its MACs promise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import keep_all, tiny_cnn
from torch import nn

from cacp import latency
from cacp.graph import trace
from cacp.latency import Latency, LatencyBench, explanation, fixed_ms, measure_latencies, onnx_runner, torch_runner
from cacp.shipping import exported, onnx_model, quiet
from cacp.slicing import slice_model


def around(median: float) -> Latency:
    return Latency((median * 0.99, median, median * 1.01, median))


def explained(ms: tuple[float, ...], shares: tuple[float, ...], fixed: float | None = None) -> str:
    names = ("dense", "pruned", "narrowest", "in eights")
    times = {name: around(one) for name, one in zip(names, ms, strict=True)}
    return explanation(times, dict(zip(names, shares, strict=True)), fixed)


def test_every_model_of_every_runtime_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    small, large = nn.Conv2d(3, 4, 1), nn.Sequential(*(nn.Conv2d(3, 3, 7, padding=3) for _ in range(30))).train()
    with quiet():
        onnx = onnx_model(exported(small, (3, 32, 32)), {})
    runners = {
        "torch": {"small": torch_runner(small), "large": torch_runner(large)},
        "onnxruntime": {"small": onnx_runner(onnx)},
    }
    times = measure_latencies(runners, (3, 32, 32), 2)
    assert [list(models) for models in times.values()] == [["small", "large"], ["small"]]
    assert 0 < times["torch"]["small"].median_ms < times["torch"]["large"].median_ms
    assert all(len(one.samples_ms) == 6 for models in times.values() for one in models.values())
    assert not large.training


def test_median_and_spread() -> None:
    one = Latency((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (one.median_ms, one.spread_ms) == (3.0, 52.0 - 1.5)
    assert one.to_json() == {"median": 3.0, "interquartile_range": 50.5, "repeats": 5}


def test_what_does_not_grow_with_the_batch() -> None:
    assert fixed_ms({1: 2.0 + 0.5, 64: 2.0 + 32.0}) == pytest.approx(2.0)
    assert fixed_ms({1: 1.0, 64: 80.0}) == 0


def test_only_what_was_measured_is_said() -> None:
    overhead = explained((10, 9.8, 9.5, 9.9), (1, 0.5, 0.05, 0.6), 9.0)
    assert overhead.startswith(
        "1.02 x as fast as the dense model, where its MACs promise 2.00 x: 9.0 of its 9.8 ms do not"
    )
    assert "at its narrowest (5 % of the MACs) 9.5 of the dense model's 10.0 ms are left" in overhead
    assert "no difference that can be told" in overhead and "--channel_multiple" not in overhead
    odd = explained((10, 9, 0.5, 6), (1, 0.5, 0.05, 0.6))
    assert odd.endswith(
        "keep counts rounded up to multiples of 8 (60 instead of 50 % of the MACs) take 6.0 instead of 9.0 ms: "
        "prune with --channel_multiple 8"
    )
    assert "narrowest" not in odd and "do not grow" not in odd
    assert explained((10, 9, 0.5, 9.9), (1, 0.5, 0.05, 0.6)).endswith(": none of what was tried explains it")
    assert explained((10, 9, 0.5, 2), (1, 0.5, 0.05, 0.5)).endswith("explains it")  # in eights already


def reported(monkeypatch: pytest.MonkeyPatch, dense_ms: Iterator[float]) -> tuple[dict[str, Any], list[list[str]]]:
    """The report on a model of 1.5 ms, with the dense one's times one after another, and what was timed each time."""
    timed = []

    def measured(runners: dict, shape: object, batch: int) -> dict[str, dict[str, Latency]]:
        timed.append(list(runners["torch"]))
        slow = next(dense_ms)
        return {"torch": {name: around(slow if name == "dense" else 1.5) for name in runners["torch"]}}

    monkeypatch.setattr(latency, "measure_latencies", measured)
    model = tiny_cnn().eval()
    groups = trace(model, torch.zeros(1, 1, 8, 8))
    counts = {group.name: group.channels // 2 for group in groups.prunable}
    return LatencyBench(model, groups, (1, 8, 8)).report(model, counts, "not among --forms"), timed


@pytest.mark.parametrize(("dense_ms", "looked_into"), [(2.0, ["torch, batch 1", "torch, batch 64"]), (9.0, [])])
def test_a_model_that_gains_what_its_macs_promise_is_not_looked_into(
    monkeypatch: pytest.MonkeyPatch, dense_ms: float, looked_into: list[str]
) -> None:
    report, timed = reported(monkeypatch, itertools.repeat(dense_ms))
    assert list(report["latency_why"]) == looked_into
    assert timed[2:] == [["dense", "pruned", "narrowest", "in eights"]] * len(looked_into)
    assert report["latency_ms"]["batch 64"]["dense"]["median"] == dense_ms
    assert report["latency_ms_onnxruntime"] == {"missing": "not among --forms"}
    assert report["latency_conditions"]["threads"] == torch.get_num_threads()
    assert report["latency_conditions"]["torch"].endswith("on cpu, channels last")


def test_a_model_that_is_fast_at_the_second_look_needs_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = reported(monkeypatch, iter([2.0, 2.0, 9.0, 2.0]))  # batches 1 and 64, then both again
    assert list(report["latency_why"]) == ["torch, batch 64"]
    assert [report["latency_ms"][f"batch {batch}"]["dense"]["median"] for batch in (1, 64)] == [9.0, 2.0]


def test_both_runtimes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "PROMISED", 0.0)  # nothing to look into
    model = tiny_cnn().eval()
    groups = trace(model, torch.zeros(1, 1, 8, 8))
    same = slice_model(model, groups, keep_all(groups)).eval()
    with quiet():
        onnx = onnx_model(exported(same, (1, 8, 8)), {})
    counts = {group.name: group.channels for group in groups.prunable}
    report = LatencyBench(model, groups, (1, 8, 8)).report(same, counts, onnx)
    for key in ("latency_ms", "latency_ms_onnxruntime"):
        assert list(report[key]) == ["batch 1", "batch 64"]
        assert all(one["median"] > 0 for times in report[key].values() for one in times.values())
    assert report["latency_why"] == {}
