"""Pruned models on disk: round trip, damage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Net, policy_counts, random_policy, resnet20
from torch import nn

from cacp import exporting
from cacp.checkpoint import save_json
from cacp.cost import CostModel
from cacp.evaluation import device_of
from cacp.exporting import Architecture, checksums, finished, load_architecture, load_pruned, save_pruned
from cacp.graph import trace
from cacp.schema import Normalisation, UserError
from cacp.slicing import slice_model

CLASSES = tuple("abcdefghij")


def exported(
    folder: Path,
    model: nn.Module,
    scope: str,
    name: str = "resnet20",
    seed: int = 0,
    ignore: Sequence[str] = (),
    size: int = 16,
) -> nn.Module:
    """Slice at random, save, and return the sliced model."""
    groups = trace(model, torch.zeros(1, 3, size, size, device=device_of(model)), scope, ignore)
    policy, cost_model = random_policy(groups, seed), CostModel(groups)
    sliced = slice_model(model, groups, policy).eval()
    architecture = Architecture(
        model=name,
        classes=CLASSES,
        input_shape=(3, size, size),
        normalisation=Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        scope=scope,
        keep_counts=policy.counts,
        cost=cost_model.cost(policy_counts(groups, policy)),
        dense_cost=cost_model.dense,
    )
    save_pruned(folder, sliced, architecture)
    assert load_architecture(folder) == architecture
    return sliced


def edit(folder: Path, **changes: object) -> None:
    path = folder / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_round_trip_is_bit_equal(tmp_path: Path, scope: str, seed: int) -> None:
    sliced = exported(tmp_path, resnet20(seed), scope, seed=seed)
    loaded = load_pruned(tmp_path)
    state = sliced.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), sliced(x))
    assert not loaded.training


def test_a_network_of_ones_own_is_built_by_its_function(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Net(
            lambda m, x: m.out(torch.flatten(m.norm(m.a(x)), 1)),
            a=nn.Conv2d(3, 7, 3, stride=4), norm=nn.BatchNorm2d(7), out=nn.Linear(7 * 16, 10),
        )  # fmt: skip

    sliced = exported(tmp_path, build().eval(), "inner", name="my_net")
    with pytest.raises(UserError, match=r"model must be one of resnet20.*but got 'my_net'"):
        load_pruned(tmp_path)
    x = torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path, build=build)(x), sliced(x))


@pytest.mark.parametrize(("constant", "devices"), [(False, ["meta"]), (True, ["meta", "cpu"])])
def test_a_network_of_ones_own_is_run_only_where_it_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: bool, devices: list[str]
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(
            lambda m, x: m.out((m.a(x) * (torch.ones(1) if constant else 1)).flatten(1)),
            a=nn.Conv2d(3, 7, 3, stride=4), out=nn.Linear(7 * 16, 10),
        )  # fmt: skip

    def noted(model: nn.Module, example: torch.Tensor, scope: str) -> object:
        traced_on.append(example.device.type)
        return trace(model, example, scope)

    traced_on: list[str] = []
    sliced = exported(tmp_path, build().eval(), "inner", name="my_net")
    monkeypatch.setattr(exporting, "trace", noted)
    loaded = load_pruned(tmp_path, build=build)
    assert traced_on == devices
    with torch.no_grad():
        assert torch.equal(loaded(torch.ones(1, 3, 16, 16)), sliced(torch.ones(1, 3, 16, 16)))


def test_a_network_of_ones_own_is_never_imported_by_its_name_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    sliced = exported(tmp_path / "export", resnet20(), "inner", name="trap:build")
    with pytest.raises(UserError, match=r"trap:build, and nothing that a file names is imported; give load_pruned"):
        load_pruned(tmp_path / "export")
    loaded = load_pruned(tmp_path / "export", build=resnet20)
    assert all(torch.equal(tensor, sliced.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_groups_that_were_ignored_are_loaded_whole(tmp_path: Path) -> None:
    sliced = exported(tmp_path, resnet20(), "inner", ignore=["layer1.*", "layer2.0.conv1"])
    assert len(load_architecture(tmp_path).keep_counts) == 9 - 4
    loaded = load_pruned(tmp_path)
    assert loaded.get_submodule("layer1.0.conv1").out_channels == 16
    assert all(torch.equal(tensor, sliced.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format must be 1, but got 2"),
        ({"keep_counts": None}, "does not describe a pruned model: keep_counts must be an object, but got None"),
        ({"keep_counts": {"a": "many"}}, "a must be a whole number, but got 'many'"),
        ({"keep_counts": {"a" * 10**6: 3}}, "aaa: 3 (of no such group)"),
        ({"keep_counts": {str(index): 1 for index in range(10**5)}}, "and 99700 more; export it again"),
        ({"input_shape": [3, 16]}, "input_shape must be channels, height and width"),
        (
            {"input_shape": [3, 10**9, 10**9]},
            "each from 1 to 16384, and 33554432 numbers at most in all, but got [3, 1",
        ),
        ({"input_shape": [3, 16384, 16384]}, "numbers at most in all, but got [3, 16384, 16384]"),
        ({"input_shape": [3, 16, 16.5]}, "an entry of input_shape must be a whole number, but got 16.5"),
        ({"input_shape": [4, 16, 16]}, "must have a mean and a std above 0 for each of 4 channels"),
        ({"normalisation": {"mean": [0.5]}}, "normalisation lacks std"),
        ({"normalisation": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}}, "must have a mean and a std above 0"),
        ({"normalisation": {"mean": [10**400] * 3, "std": [1] * 3}}, "a number is too large"),
        ({"cost": 7}, "does not describe a pruned model: cost must be an object, but got 7"),
        ({"cost": {"macs": True, "params": 1}}, "macs must be a whole number, but got True"),
        ({"classes": ["a"] * 50_001}, "classes must be at most 50000, but got 50001"),
        ({"classes": "abc"}, "classes must be a list, but got 'abc'"),
        ({"model": "resnet" + "9" * 10**6}, "model must be one of resnet20"),
        ({"model": "../../weights"}, "but got '../../weights'"),
        ({"model": "a" * 10**6 + ":b"}, "nothing that a file names is imported"),
        ({"scope": "outer"}, "scope must be one of inner, all, but got 'outer'"),
        ({"keep_counts": {"layer1.0.conv1": 3}}, "wrong shape: layer1.1.conv1.weight"),
        ({"model": "resnet1001"}, "but got 'resnet1001'"),
        ({"classes": ["a"]}, "classes must be a whole number from 2 up, but got 1"),
        ({"classes": ["a", "b"]}, "wrong shape: linear.weight"),
    ],
)
def test_a_damaged_architecture_is_refused(tmp_path: Path, changes: dict, text: str) -> None:
    exported(tmp_path, resnet20(), "inner")
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_pruned(tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "layer1.0.conv1: 0 (of 16)"), (17, "17 (of 16)"), (-1, "-1 (of 16)"), (10**12, "(of 16)"), (1, "wrong shape")],
)
def test_wrong_keep_counts_are_refused(tmp_path: Path, count: int, text: str) -> None:
    exported(tmp_path, resnet20(), "inner")
    counts = {**load_architecture(tmp_path).keep_counts, "layer1.0.conv1": count}
    edit(tmp_path, keep_counts=counts)
    with pytest.raises(UserError) as caught:
        load_pruned(tmp_path)
    assert text in str(caught.value)
    assert "layer1.0" in str(caught.value)


@pytest.mark.parametrize(("file", "bytes_"), [("architecture.json", b"{"), ("model.safetensors", b"\x08")])
def test_damaged_and_missing_files_are_named(tmp_path: Path, file: str, bytes_: bytes) -> None:
    exported(tmp_path, resnet20(), "inner")
    (tmp_path / file).write_bytes(bytes_)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_pruned(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=file.replace(".", r"\.") + ".* does not exist"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("file", ["architecture.json", "model.safetensors", "report.json"])
def test_what_is_no_longer_the_model_of_its_report_is_to_be_made_again(tmp_path: Path, file: str) -> None:
    exported(tmp_path, resnet20(), "inner")
    older: dict[str, object] = {"policy": {}}
    report = {**older, "sha256": checksums(tmp_path)}
    for said in (older, report):
        save_json(tmp_path / "report.json", said)
        assert finished(tmp_path, "report.json") == said
    whole = (tmp_path / file).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        (tmp_path / file).write_bytes(content)
        assert finished(tmp_path, "report.json") == {}
    (tmp_path / file).unlink()
    assert finished(tmp_path, "report.json") == {}


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_a_model_sliced_on_the_gpu_is_the_one_that_is_loaded(tmp_path: Path, scope: str) -> None:
    model = resnet20().cuda()
    exported(tmp_path, model, scope)
    assert {tensor.device.type for tensor in load_pruned(tmp_path).state_dict().values()} == {"cpu"}
