"""The speed benchmark: its peers compute what the sliced network computes, and its figures follow from the raw ones."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import keep_all, random_policy, resnet20
from test_scoring import NORMALISATION, random_images
from torch import Tensor, nn

from benchmarks import scaling, search_speed, speed_subject, whole_search
from benchmarks.peers import (
    PlainImages,
    Shape,
    TorchPruned,
    ZeroedChannels,
    best_of,
    best_seconds,
    convolution_rates,
    convolution_shapes,
    dropped_entries,
    layer_times,
)
from benchmarks.search_speed import check_peers, in_turn
from benchmarks.speed_subject import Subject, draw_policies
from benchmarks.speed_summary import agreement, floor_seconds, spread
from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.cost import counted_cost
from cacp.evaluation import recalibrate_batchnorm, resolve_precision
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.schema import Axis, ChannelGroup, ChannelGroups, Policy, UserError
from cacp.scoring import PolicyScorer
from cacp.slicing import slice_model

CPU = torch.device("cpu")
SHAPES = [Shape(torch.float32, 16, 8, 2), Shape(torch.float32, 8, 8, 2)]


def make_subject() -> Subject:
    model = resnet20().to(memory_format=torch.channels_last)  # as the dense model of a run is
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    orders = channel_orders(channel_importance(model, groups, "l1"))
    precision = resolve_precision("auto", CPU)
    return Subject(model, groups, orders, "l1", random_images(120, 0), random_images(150, 1), NORMALISATION, precision)


def plain_images(subject: Subject) -> PlainImages:
    return PlainImages(subject.validation, subject.calibration, subject.normalisation, CPU)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# peers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ZeroedChannels, TorchPruned])
def test_a_peer_computes_what_the_sliced_network_computes(kind: type) -> None:
    if kind is TorchPruned:
        pytest.importorskip("torch_pruning")
    subject = make_subject()
    images = plain_images(subject)
    peer = kind(subject.model, subject.groups, images)
    calibration = search_speed.PlainImages(subject.calibration, subject.calibration, NORMALISATION, CPU).validation
    for seed in range(3):  # the second policy shows that nothing is left of the first
        policy = random_policy(subject.groups, seed)
        model, sliced = peer.prepare(policy), slice_model(subject.model, subject.groups, policy)
        expected = outputs(sliced, images.validation)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(outputs(model, images.validation), expected, rtol=0, atol=tolerance)
        peer.recalibrate(model)
        recalibrate_batchnorm(sliced, calibration, 128)
        fresh = outputs(sliced, images.validation)
        torch.testing.assert_close(outputs(model, images.validation), fresh, rtol=0, atol=tolerance)
        assert not torch.allclose(fresh, expected, rtol=0, atol=0.1)  # recalibration does something
        assert peer.evaluate(model) == (fresh.argmax(1) == subject.validation.labels).double().mean().item()


def test_zeroed_channels_keep_the_size_and_torch_pruned_ones_do_not() -> None:
    pytest.importorskip("torch_pruning")
    subject = make_subject()
    images, policy = plain_images(subject), random_policy(subject.groups, 0)
    zeroed = ZeroedChannels(subject.model, subject.groups, images).prepare(policy)
    pruned = TorchPruned(subject.model, subject.groups, images).prepare(policy)
    name = subject.groups.prunable[0].name
    kept, weight = list(policy.keep[name]), zeroed.get_submodule(name).weight
    assert len(kept) < 16
    assert torch.nonzero(weight.flatten(1).abs().sum(1)).flatten().tolist() == kept
    assert pruned.get_submodule(name).weight.shape == (len(kept), 16, 3, 3)
    assert counted_cost(zeroed, (3, 8, 8)) == counted_cost(subject.model, (3, 8, 8))
    assert counted_cost(pruned, (3, 8, 8)) == counted_cost(
        slice_model(subject.model, subject.groups, policy), (3, 8, 8)
    )


def test_peers_run_in_the_default_memory_format_and_leave_the_dense_model_alone() -> None:
    subject = make_subject()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    model = ZeroedChannels(subject.model, subject.groups, plain_images(subject)).prepare(
        random_policy(subject.groups, 0)
    )
    assert model.get_submodule("layer1.0.conv1").weight.is_contiguous()
    assert not subject.model.get_submodule("layer1.0.conv1").weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_amcs_loader_has_amcs_batches() -> None:
    assert [len(labels) for _, labels in plain_images(make_subject()).loader()] == [50, 50, 20]


def test_ours_runs_in_the_precision_of_a_search_and_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[torch.dtype, bool]] = []

    class Noted(PolicyScorer):
        def __init__(self, *arguments: Any, repair: bool) -> None:
            super().__init__(*arguments, repair=repair)
            built.append((arguments[5], repair))

    monkeypatch.setattr(speed_subject, "PolicyScorer", Noted)
    subject = make_subject()._replace(precision=torch.bfloat16)
    assert [system.name for system in search_speed.build_systems(subject, {})] == ["ours", "ours fp32"]
    assert built == [(torch.bfloat16, False), (torch.float32, False)]


def test_dropped_entries_follow_segments_and_repeats() -> None:
    groups = ChannelGroups(
        (ChannelGroup("a", 3, ("a",), ()), ChannelGroup("b", 2, ("b",), ()), ChannelGroup("c", 2, ("c",), ())),
        axes=(), layers=(), fixed_macs=0, fixed_params=0,
    )  # fmt: skip
    policy = Policy({"a": (1,), "b": (0,)}, "hand")
    axis = Axis("linear", "in", ("b", "c", "a"), repeat=2)
    assert dropped_entries(axis, groups, policy) == [2, 3, 8, 9, 12, 13]  # b's 1, a's 0 and 2; c is whole


def test_a_peer_that_does_other_work_is_refused() -> None:
    subject = make_subject()
    images = plain_images(subject)

    class Dense(ZeroedChannels):
        def prepare(self, policy: Policy) -> nn.Module:
            return super().prepare(keep_all(subject.groups))

    drawn = draw_policies(subject, (0.5,), 1, seed=0)
    right = check_peers(subject, images, {"A": ZeroedChannels(subject.model, subject.groups, images)}, drawn)
    assert 0 <= max(right["A"].values()) < 1e-5
    with pytest.raises(RuntimeError, match=r"logits must differ .* at most 0.005 of the largest, but got {'A'"):
        check_peers(subject, images, {"A": Dense(subject.model, subject.groups, images)}, drawn)


# the machine ----------------------------------------------------------------------------------------------------------


def test_floor_is_work_divided_by_rate() -> None:
    assert floor_seconds(64e6, 3000, 400e9) == pytest.approx(0.48)
    assert Shape(torch.float32, 64, 8, 2).macs == 9 * 64 * 64 * 8 * 8 * 2 == 4_718_592
    assert max(shape.macs for shape in convolution_shapes(CPU)) == 4_831_838_208  # 256 channels, 32 px, batch 8
    assert {shape.channels for shape in convolution_shapes(CPU)} == {64, 128, 256, 512}


def test_rates_are_positive_and_the_best_of_two_moments_stays() -> None:
    assert all(rate > 1e6 for rate in convolution_rates(CPU, SHAPES).values())
    first, second = dict(zip(SHAPES, (3.0, 5.0), strict=True)), dict(zip(SHAPES, (4.0, 2.0), strict=True))
    assert list(best_of(first, second).values()) == [4.0, 5.0]


def test_best_seconds_runs_pieces_of_work_at_the_same_time() -> None:
    torch.set_num_threads(2)
    try:
        one = best_seconds([lambda: time.sleep(0.01)], CPU)
        two = best_seconds([lambda: time.sleep(0.01)] * 2, CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert one >= 0.01
    assert 0.01 <= two < 0.02  # one after the other they would take 0.02


def test_layer_times_count_the_macs_of_the_convolutions() -> None:
    subject = make_subject()
    sliced = slice_model(subject.model, subject.groups, random_policy(subject.groups, 0))
    layers = layer_times(sliced, torch.zeros(1, 3, 8, 8), torch.float32, 2, threads=1)
    assert len(layers) == 19
    assert sum(layer.macs for layer in layers) == counted_cost(sliced, (3, 8, 8)).macs - 64 * 10
    assert [layer.padded for layer in layers[:2]] == [16, 16]
    assert layers[0]._replace(outputs=17).padded == 32
    assert all(layer.seconds > 0 for layer in layers)


# policies and figures -------------------------------------------------------------------------------------------------


def test_policies_are_different_in_turn_and_the_same_for_a_seed() -> None:
    subject = make_subject()
    drawn = draw_policies(subject, (0.3, 0.5, 0.7), 7, seed=0)
    dense = counted_cost(subject.model, (3, 8, 8)).macs
    assert [one.target for one in drawn] == [0.3, 0.5, 0.7, 0.3, 0.5, 0.7, 0.3]
    assert len({tuple(one.policy.counts.values()) for one in drawn}) == 7
    assert all(one.target - 0.02 < one.cost.macs / dense <= one.target for one in drawn)
    assert drawn == draw_policies(subject, (0.3, 0.5, 0.7), 7, seed=0)
    assert drawn != draw_policies(subject, (0.3, 0.5, 0.7), 7, seed=1)


def test_more_policies_than_there_are_is_refused() -> None:
    subject, model = make_subject(), nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 10))
    few = subject._replace(model=model, groups=trace(model, torch.zeros(1, 3, 8, 8)), orders={"0": torch.arange(4)})
    assert [one.policy.keep for one in draw_policies(few, (0.5,), 1, seed=0)] == [{"0": (0, 1)}]
    with pytest.raises(UserError, match="but got 2 with the warm-up's; found 1; lower --policies"):
        draw_policies(few, (0.5,), 2, seed=0)


def test_the_order_of_systems_turns_and_then_runs_backwards() -> None:
    assert ["".join(in_turn("abc", position)) for position in range(6)] == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_agreement_by_hand() -> None:
    first, second = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.3, 0.2, 0.4])
    found = agreement(first, second, (0.3, 0.5, 0.3, 0.5, 0.3))
    assert found["mean_difference"] == pytest.approx(0.05)
    assert found["largest_difference"] == pytest.approx(0.1)
    assert found["kendall"] == pytest.approx(4 / 6)  # 5 of 6 pairs in order, 1 against it
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found["within_target"]["0.3"] == {"kendall": pytest.approx(1.0), "spearman": pytest.approx(1.0)}
    constant = agreement(first, np.full(4, 0.5), (0.3,) * 4)
    assert (constant["kendall"], constant["spearman"]) == (None, None)


def test_spread_by_hand() -> None:
    assert spread([4.0, 1.0, 10.0, 2.0, 3.0]) == {"median": 3.0, "iqr": 2.0}


# the command ----------------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> dict:
    """The command on a network of random weights, which the pipeline would refuse, and on small convolutions."""
    monkeypatch.setattr(search_speed, "subject_of", lambda experiment: make_subject())
    monkeypatch.setattr(search_speed, "convolution_shapes", lambda device: SHAPES)
    monkeypatch.setattr(search_speed, "PAUSE", 0.0)
    words = ["--config=configs/digits_resnet56.yaml", "--model=resnet20", f"--data_dir={path.parent}", *more]
    monkeypatch.setattr(sys, "argv", ["/somewhere/search_speed.py", *words, "--result", str(path)])
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    search_speed.main()
    return json.loads(path.read_text())


def test_the_figures_of_a_run_follow_from_its_raw_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_pruning")
    result = run_command(monkeypatch, tmp_path / "speed.json", "--policies=3", "--repeats=2")
    assert list(result) == [
        "settings", "systems", "times_as_fast", "slicing_ms", "slicing_times_as_fast", "floor", "convolutions_only",
        "agreement", "equality", "left_out", "raw", "environment",
    ]  # fmt: skip
    assert list(result["systems"]) == ["ours", "ours fp32", "A", "A stale", "B", "B stale"]
    seconds = {name: np.median(np.reshape(rows, (2, 3)), axis=0) for name, rows in result["raw"]["seconds"].items()}
    for name, row in result["systems"].items():
        assert row["seconds_a_policy"]["median"] == pytest.approx(np.median(seconds[name]), abs=2e-6)
        assert row["seconds_a_policy"]["total"] == pytest.approx(seconds[name].sum(), abs=1e-5)
        assert row["images_a_policy"] == (120 if "stale" in name else 270)
        floor = np.array(result["raw"]["macs"]) * row["images_a_policy"] / result["floor"]["gmacs_per_second"] / 1e9
        assert row["part_of_floor"]["median"] == pytest.approx(np.median(floor / seconds[name]), rel=1e-2)
    pairs = result["times_as_fast"]["ours"]["A"]["of_pairs"]
    assert pairs["median"] == pytest.approx(np.median(seconds["A"] / seconds["ours"]), rel=1e-2)
    assert result["floor"]["gmacs_per_second"] == pytest.approx(
        max(result["raw"]["gmacs_per_second"].values()), abs=0.06
    )
    assert result["agreement"]["ours fp32 and plain fp32"]["largest_difference"] <= 1 / 120 + 1e-9
    assert result["raw"]["top1"]["A"] == pytest.approx(result["raw"]["top1"]["plain fp32"], abs=1 / 120 + 1e-9)
    assert max(max(found.values()) for found in result["equality"].values()) < 1e-5
    assert list(result["slicing_ms"]) == ["ours", "A", "B", "ours, and loaded into the fused network"]
    assert result["convolutions_only"]["policies"] == 3
    shown = capsys.readouterr().out
    assert "3 policies, 270 images each on cpu" in shown
    assert "agreement of scores" in shown


def test_a_result_holds_no_absolute_path_and_says_why_b_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    result = run_command(monkeypatch, tmp_path / "speed.json", "--policies=1")
    assert result["left_out"] == {"B": "torch_pruning is not installed on this machine"}
    assert list(result["systems"]) == ["ours", "ours fp32", "A", "A stale"]
    command = result["environment"]["command"]
    assert command[:4] == ["search_speed.py", "--config=configs/digits_resnet56.yaml", "--model=resnet20", "--data_dir"]
    assert '"/' not in (tmp_path / "speed.json").read_text()
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()


def test_what_the_peers_cannot_prune_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"scope must be inner, .* but got 'all'"):
        run_command(monkeypatch, tmp_path / "speed.json", "--scope=all")


def test_no_policies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="policies and repeats must be at least 1, but got policies=0, repeats=1"):
        run_command(monkeypatch, tmp_path / "speed.json", "--policies=0")


# a search -------------------------------------------------------------------------------------------------------------


def test_exponents_by_hand() -> None:
    def row(images: int, seconds: float, memory: int) -> dict:
        return {
            "images": images, "episode_seconds": seconds, "preparation_seconds": 3.0, "largest_memory_bytes": memory,
            "largest_gpu_memory_bytes": None, "phase_seconds": {"evaluation": seconds - 1},
        }  # fmt: skip

    found = scaling.exponents("images", [row(1, 1.5, 5), row(2, 2, 10), row(4, 5, 20)])  # from the middle to the last
    expected = {"episode_seconds": 1.32, "preparation_seconds": 0, "largest_memory_bytes": 1, "evaluation": 2}
    assert found == expected


def test_a_point_of_the_scaling_is_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = {"depth": 20, "images": 125, "calibration": 150, "targets": 2, "episodes": 4, "scored": True}
    row = point | scaling.measured(**point, device="cpu")
    assert (row["groups"], row["macs"], row["largest_gpu_memory_bytes"]) == (9, 40_551_040, None)
    assert set(scaling.PHASES) <= set(row["phase_seconds"])
    total = sum(seconds for seconds in row["phase_seconds"].values())
    assert 0 < row["phase_seconds"]["slicing"] < row["episode_seconds"] < 10 * total
    monkeypatch.setattr(scaling, "AXES", {"images": [{}, {"images": 250}]})
    monkeypatch.setattr(scaling, "in_a_process", lambda change, device: row | {"images": change["images"]})
    files = ["--result", str(tmp_path / "scaling.json"), "--figure", str(tmp_path / "scaling.svg")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--axes", "images", *files])
    scaling.main()
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["images"] for point in result["axes"]["images"]] == [2000, 250]
    assert result["exponents"]["images"]["evaluation"] == 0
    assert (tmp_path / "scaling.svg").read_text().count("<svg") == 1
    assert "images 250" in capsys.readouterr().out


def test_a_whole_search_is_timed_and_never_a_resumed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config=configs/digits_resnet56.yaml", "--output", str(tmp_path / "run"), "--seed=3", "--episodes=80"]
    seen: list[list[str]] = []

    def search(command: list[str], check: bool) -> None:
        seen.append(command)
        save_json(tmp_path / "run" / "search" / "profile.json", {"evaluation": 2.0})
        save_json(tmp_path / "run" / "dense" / "result.json", {"validation_top1": 0.5})

    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    monkeypatch.setattr(whole_search, "subprocess", SimpleNamespace(run=search))
    monkeypatch.setattr(whole_search, "load_policies", lambda folder: [])
    monkeypatch.setattr(sys, "argv", ["whole_search.py", "--result", str(tmp_path / "whole.json"), *words])
    whole_search.main()
    assert seen == [[sys.executable, "search.py", *words, "--profile"]]
    result = json.loads((tmp_path / "whole.json").read_text())
    assert result["seconds_an_episode"] == pytest.approx(result["wall_seconds"] / 80)
    assert (result["phase_seconds"], result["policies"]) == ({"evaluation": 2.0}, {})
    assert result["settings"]["episodes"] == 80
    with pytest.raises(UserError, match="is there already; move it away, or use another --output"):
        whole_search.main()


def test_results_name_no_folder_of_this_machine() -> None:
    words = ["x.py", "--work", "/tmp/cells", "resnet20=/a/b.th", "/a=b/c.pt", "lr=0.1", "a/b", 3, None]
    assert portable({"command": words}) == {
        "command": ["x.py", "--work", "cells", "resnet20=b.th", "c.pt", "lr=0.1", "a/b", 3, None]
    }
    results = Path(__file__).resolve().parent.parent / "results"
    files = list(results.rglob("*.json"))
    assert len(files) > 10
    for file in files:
        assert portable(data := json.loads(file.read_text())) == data, file.name
