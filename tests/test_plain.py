"""Models as plain source: the same bits, in a process that cannot import this project; readable; what it refuses."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Net, lively
from test_exporting import CLASSES, exported
from test_networks import every_network_that_fits, size
from torch import Tensor, nn

from cacp.checkpoint import load_tensors, save_tensors
from cacp.exporting import load_architecture, load_pruned
from cacp.models import build_model
from cacp.plain import plain_source
from cacp.schema import Normalisation, UserError

NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SHIPPED = (("resnet20", 16), ("resnet56", 16), ("cifar_vgg11_bn", 32), ("resnet18", 32), ("mobilenet_v2", 32))

READER = """
import runpy, sys
from pathlib import Path
for name in ("cacp", "envs", "agents", "torchvision"):
    sys.modules[name] = None  # an import of it fails
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = runpy.run_path(str(folder / "model.py"))
    with torch.inference_mode():
        logits = model["load"]()(model["normalised"](load_file(folder / "images.safetensors")["images"]))
    save_file({"logits": logits}, folder / "logits.safetensors")
"""


def source_of(model: nn.Module) -> str:
    return plain_source(model.eval(), "a test", (3, 8, 8), NORMALISATION, CLASSES)


def written(folder: Path, model: nn.Module) -> str:
    source = source_of(model)
    (folder / "model.py").write_text(source)
    save_tensors(folder / "model.safetensors", model.state_dict())
    return source


def read(folder: Path) -> nn.Module:
    return runpy.run_path(str(folder / "model.py"))["load"]()


def assert_same_bits(folder: Path, model: nn.Module, x: Tensor) -> None:
    plain = read(folder)
    assert not plain.training
    with torch.inference_mode():
        assert torch.equal(plain(x.clone()), model(x.clone()))


def body(source: str) -> list[str]:
    return [line.strip() for line in source.partition("def forward")[2].splitlines()[1:]]


@pytest.mark.parametrize("networks", [SHIPPED[:1], pytest.param(SHIPPED[1:], marks=pytest.mark.slow)])
def test_shipped_networks_are_bit_equal_where_this_project_cannot_be_imported(
    tmp_path: Path, networks: Sequence[tuple[str, int]]
) -> None:
    folders = []
    for (name, pixels), scope in itertools.product(networks, ("inner", "all")):
        folder = tmp_path / f"{name}-{scope}"
        sliced = exported(folder, lively(build_model(name, 10, seed=0)), scope, name, size=pixels)
        one = load_architecture(folder)
        sources = [
            plain_source(model, "a test", one.input_shape, one.normalisation, one.classes)
            for model in (sliced, load_pruned(folder))
        ]
        assert sources[0] == sources[1]
        (folder / "model.py").write_text(sources[0])
        save_tensors(folder / "images.safetensors", {"images": torch.rand(3, *one.input_shape)})
        folders.append(folder)
    reader = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", READER, *map(str, folders)],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert (reader.returncode, reader.stderr) == (0, "")
    for folder in folders:
        images = load_tensors(folder / "images.safetensors")["images"]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in NORMALISATION)
        with torch.inference_mode():
            expected = load_pruned(folder)((images - mean) / std)
        assert torch.equal(load_tensors(folder / "logits.safetensors")["logits"], expected), folder.name


@every_network_that_fits
def test_every_network_is_bit_equal(tmp_path: Path, name: str) -> None:
    sliced = exported(tmp_path, lively(build_model(name, 10, seed=0)), "all", name, size=size(name))
    written(tmp_path, sliced)
    assert_same_bits(tmp_path, sliced, torch.rand(2, 3, size(name), size(name)))


def test_forward_reads_as_if_written_by_hand(tmp_path: Path) -> None:
    source = written(tmp_path, exported(tmp_path, lively(build_model("resnet20", 10, seed=0)), "all"))
    assert body(source)[:2] == [
        "x = F.relu(self.bn1(self.conv1(x)))",
        "x = F.relu(self.layer1[0].bn2(self.layer1[0].conv2(F.relu(self.layer1[0].bn1(self.layer1[0].conv1(x))))) + x)",
    ]
    assert "self.layer2[0].shortcut.index" in source
    assert "nn.Linear(" in source and "import math" not in source
    assert len(body(source)) == 1 + 9 + 2 + 1  # a line a block, two where the shortcut does something
    assert max(map(len, source.splitlines())) <= 120


def test_operators_keep_their_order_and_their_number(tmp_path: Path) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a = m.get_submodule("weird-name")(x)
        b = m.twice(m.twice(a))
        c = (a + b) * (a - -1.5 * b)
        a += c  # in place
        return (c * c / (a.abs() + 2)).mean((2, 3))[:, 1:] ** 2 @ m.out.weight.T[:2]

    model = Net(run, **{"weird-name": nn.Conv2d(3, 3, 1)}, twice=nn.Conv2d(3, 3, 3, padding=1), out=nn.Linear(3, 2))
    source = written(tmp_path, model)
    assert source.count("self.twice(") == 2 and 'self["weird-name"](x)' in source
    assert_same_bits(tmp_path, model.eval(), torch.rand(2, 3, 8, 8))


def test_what_the_forward_does_not_use_is_left_out(tmp_path: Path) -> None:
    model = Net(lambda m, x: m.out(x.flatten(1)), out=nn.Linear(192, 10), auxiliary=nn.Linear(4, 4), drop=nn.Dropout())
    assert "auxiliary" not in written(tmp_path, model)
    assert_same_bits(tmp_path, model, torch.rand(2, 3, 8, 8))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    exported(tmp_path, lively(build_model("resnet20", 10, seed=0)), "inner")
    written(tmp_path, load_pruned(tmp_path))
    save_tensors(
        tmp_path / "model.safetensors", {**load_tensors(tmp_path / "model.safetensors"), "more": torch.ones(1)}
    )
    with pytest.raises(RuntimeError, match="more"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Net(lambda m, x: m.a(x), a=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))), "ParametrizedConv2d"),
        (Net(lambda m, x: x + torch.ones(3, 8, 8)), "_tensor_constant0 are not in it; register them as buffers"),
        (Net(lambda m, x: torch.ops.aten.relu(x)), "calls functions of torch, but the model calls"),
    ],
)
def test_what_plain_source_cannot_say_is_named(model: nn.Module, text: str) -> None:
    with pytest.raises(UserError, match=text):
        source_of(model)
