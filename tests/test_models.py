"""The CIFAR ResNets, their shortcuts, and reading weights."""

import hashlib
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from cacp.models import MODEL_NAMES, build_model, weights
from cacp.models.resnet import BasicBlock, ChannelPadShortcut, ResNet
from cacp.models.weights import PUBLISHED, fetch_published, load_weights
from cacp.schema import Normalisation, UserError


def _textbook_cost(depth: int, size: int, classes: int) -> tuple[int, int]:
    """MACs and parameters by hand: n blocks of two 3x3 convolutions in each of three stages."""
    n = (depth - 2) // 6
    macs, params = 9 * 3 * 16 * size**2, 9 * 3 * 16 + 2 * 16
    channels = 16
    for stage, width in enumerate((16, 32, 64)):
        for _ in range(n):
            pairs = 9 * (channels * width + width * width)
            macs += pairs * (size >> stage) ** 2
            params += pairs + 2 * 2 * width
            channels = width
    return macs + 64 * classes, params + 64 * classes + classes


RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


@pytest.mark.parametrize("name", RESNETS)
def test_cost_is_the_textbook_formula(name: str) -> None:
    model = build_model(name, classes=10).to("meta").eval()
    macs, params = _textbook_cost(int(name.removeprefix("resnet")), 32, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * macs
    assert sum(parameter.numel() for parameter in model.parameters()) == params


def test_resnet56_has_the_published_cost() -> None:
    assert _textbook_cost(56, 32, 10) == (125_485_696, 853_018)


def test_names_are_the_published_ones() -> None:
    names = [name for name in build_model("resnet20", 10).state_dict() if "num_batches_tracked" not in name]
    assert names[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean"]
    assert "layer2.0.conv1.weight" in names
    assert "layer3.2.bn2.running_var" in names
    assert names[-2:] == ["linear.weight", "linear.bias"]
    assert len(names) == 97  # as in resnet20-12fca82f.th
    assert not [name for name in names if "shortcut" in name]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (32, 32), (40, 24)])
def test_any_image_size_and_tracing(height: int, width: int) -> None:
    model = build_model("resnet20", classes=7, seed=0).eval()
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 7)
        assert torch.equal(traced(x), out)


def test_a_block_is_its_formula() -> None:
    block = BasicBlock(16, 32, stride=2).eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
        inner = block.bn2(F.conv2d(inner, block.conv2.weight, padding=1))
        padded = torch.zeros(2, 32, 4, 4)
        padded[:, 8:24] = x[:, :, ::2, ::2]
        assert torch.equal(block(x), F.relu(inner + padded))


def test_seed_repeats_and_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (build_model("resnet20", 10, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    build_model("resnet20", 10)
    assert not torch.equal(torch.get_rng_state(), before)


def test_initial_weights_are_kaiming_normal() -> None:
    weight = build_model("resnet56", 10, seed=0).state_dict()["layer3.4.conv2.weight"]  # (64, 64, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


def test_wrong_model_arguments_are_listed_together() -> None:
    with pytest.raises(
        UserError, match=r"(?s)resnet20, .*resnet110, .*, but got 'resnet57'; near: resnet.*classes must be .* got 1"
    ):
        build_model("resnet57", 1)
    with pytest.raises(UserError, match=r"depth must be 6 n \+ 2.*depth=21"):
        ResNet(21, 10)


VGG_PARAMS = {11: 9_231_114, 13: 9_416_010, 16: 14_728_266, 19: 20_040_522}  # with ten classes


@pytest.mark.parametrize("depth", VGG_PARAMS)
def test_cifar_vggs_have_the_published_names_and_numbers_of_parameters(depth: int) -> None:
    model = build_model(f"cifar_vgg{depth}_bn", 10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == VGG_PARAMS[depth]
    assert (
        sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth - 2
    )  # one linear, not 3
    state = model.state_dict()
    assert {"features.0.weight", "features.0.bias", "features.1.running_mean", "classifier.weight"} <= state.keys()
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 40, 33)).shape == (2, 10)


def test_torchvision_models_are_built_by_their_names() -> None:
    assert {"alexnet", "vgg16_bn", "resnet50", "mobilenet_v3_small", "convnext_tiny", "regnet_y_400mf"} <= set(
        MODEL_NAMES
    )
    assert not [name for name in MODEL_NAMES if name.startswith(("vit", "swin", "maxvit"))]
    assert len(MODEL_NAMES) == len(set(MODEL_NAMES))
    first, second, other = (build_model("squeezenet1_1", 7, seed=seed).state_dict() for seed in (5, 5, 6))
    expected = torchvision.models.squeezenet1_1(num_classes=7).state_dict()
    assert {name: tensor.shape for name, tensor in first.items()} == {name: t.shape for name, t in expected.items()}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_are_built_without_them(name: str) -> None:
    model = build_model(name, 7, seed=0).train()
    assert model(torch.zeros(2, 3, 75, 75)).shape == (2, 7)
    assert not [key for key in model.state_dict() if "aux" in key.lower()]


OWN = """
from torch import nn

def build(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def words(classes):
    return "a network"

_hidden = build
number = 5
"""


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with networks of one's own, in a folder where Python finds it."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "broken_networks.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_networks"
    for name in ("own_networks", "broken_networks"):
        sys.modules.pop(name, None)


def test_a_network_of_ones_own_is_imported_only_where_the_user_named_it(own_network: str) -> None:
    first, second = (build_model(f"{own_network}:build", 4, seed=3, importing=True) for _ in range(2))
    assert first(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    assert torch.equal(first[0].weight, second[0].weight)
    sys.modules.pop(own_network)
    with pytest.raises(UserError, match=r"model must be one of .*, but got 'own_networks:build'"):
        build_model(f"{own_network}:build", 4)
    assert own_network not in sys.modules


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_networks:bild", "must have a function bild(classes), but has build, words"),
        ("own_networks:number", "must have a function number(classes), but has build, words"),
        ("own_networks:words", "own_networks:words must return a torch.nn.Module, but got str"),
        ("no_such_networks:build", "no_such_networks cannot be imported (ModuleNotFoundError: No module named"),
        ("broken_networks:build", "No module named 'no_such_package'); put it beside search.py, or name its folder in"),
        ("own_networks.build", "model must be one of"),
        ("own networks:build", "model must be one of"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(own_network: str, name: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(name, 4, importing=True)
    assert text in str(caught.value)


@pytest.mark.parametrize("kept_in", [[0, 3, 7], list(range(8)), [5]])
@pytest.mark.parametrize("kept_out", [[0, 1, 4, 7, 11, 15], list(range(16)), [0], [9]])
def test_a_selected_shortcut_is_a_slice_of_the_dense_one(kept_in: list[int], kept_out: list[int]) -> None:
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros_like(x)
    masked[:, kept_in] = x[:, kept_in]
    dense = ChannelPadShortcut(8, 16, stride=2)(masked)
    shortcut = ChannelPadShortcut(8, 16, stride=2)
    shortcut.select(kept_in, kept_out)
    out = shortcut(x[:, kept_in])
    assert out.shape == (2, len(kept_out), 3, 3)
    assert torch.equal(out, dense[:, kept_out])
    assert torch.equal(fx.symbolic_trace(shortcut)(x[:, kept_in]), out)


def test_index_by_hand_and_in_the_state_dict() -> None:
    shortcut = ChannelPadShortcut(4, 8, stride=1)  # outputs 2..5 are the inputs 0..3
    assert not shortcut.state_dict()
    shortcut.select([0, 2, 3], [1, 2, 3, 4, 7])
    assert shortcut.state_dict()["index"].tolist() == [3, 0, 3, 1, 3]
    assert shortcut.index is not None
    assert shortcut.index.dtype == torch.int64
    shortcut.select([1], [3])
    assert shortcut.state_dict()["index"].tolist() == [0]


def test_wrong_channel_sets_are_refused() -> None:
    shortcut = ChannelPadShortcut(4, 8, stride=2)
    with pytest.raises(UserError, match=r"kept_in=\[2, 1\] of 4 channels, kept_out=\[8\] of 8 channels"):
        shortcut.select([2, 1], [8])
    with pytest.raises(UserError, match=r"in_channels=8, out_channels=4"):
        ChannelPadShortcut(8, 4, stride=2)


def _tiny(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


def _save(path: Path, state: dict[str, Tensor], wrap: bool) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif wrap:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_prec1": 92.1}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(("file", "wrap"), [("a.safetensors", False), ("a.pt", False), ("a.pth", True), ("a.th", True)])
def test_weights_come_back_from_every_format(tmp_path: Path, file: str, wrap: bool) -> None:
    source, model = _tiny(1), _tiny(2)
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    _save(tmp_path / file, state, wrap)
    load_weights(model, tmp_path / file)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_every_mismatch_is_listed_and_the_model_untouched(tmp_path: Path) -> None:
    model = _tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(_tiny(1).state_dict())
    del state["1.weight"], state["1.bias"]
    state |= {"0.weight": torch.ones(5, 3, 3, 3), "fc.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "a.pt")
    text = str(caught.value)
    for line in (
        "missing: 1.weight (4,)",
        "missing: 1.bias (4,)",
        "unexpected: fc.weight (2, 2)",
        "wrong shape: 0.weight (5, 3, 3, 3), the model has (4, 3, 3, 3)",
        "number of classes",
        "a.pt",
    ):
        assert line in text
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = _tiny().state_dict()
    state["1.bias"][0] = torch.nan
    state["1.running_var"][1] = torch.inf
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"NaN or infinity in 1\.bias, 1\.running_var;"):
        load_weights(_tiny(), tmp_path / "a.pt")


@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights_are_refused(tmp_path: Path, file: str, damage: str) -> None:
    path = tmp_path / file
    _save(path, dict(_tiny().state_dict()), wrap=False)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"<html>" * 50, "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"{file} is damaged.*again"):
        load_weights(_tiny(), path)


def test_weights_files_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pt does not exist"):
        load_weights(_tiny(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"ending in \.safetensors, \.pt, \.pth, \.th, but got .*a\.h5"):
        load_weights(_tiny(), tmp_path / "a.h5")
    torch.save({"epoch": 3, "x": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds epoch \(int\); write it with"):
        load_weights(_tiny(), tmp_path / "a.pt")
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds nothing"):
        load_weights(_tiny(), tmp_path / "a.pt")


def test_a_pickled_module_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(_tiny(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds Python objects.*state_dict\(\)"):
        load_weights(_tiny(), tmp_path / "a.pt")


def test_the_published_table() -> None:
    assert {model for model, _ in PUBLISHED} == set(RESNETS)
    for (model, dataset), entry in PUBLISHED.items():
        assert dataset == "cifar10"
        assert entry.file.startswith(f"{model}-{entry.sha256[:8]}")  # the name carries the head of the sum
        assert entry.url.endswith("/pytorch_resnet_cifar10/raw/master/pretrained_models/" + entry.file)
        assert entry.normalisation == Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert [entry.top1 for entry in PUBLISHED.values()] == [0.9173, 0.9263, 0.9310, 0.9339, 0.9368]


class _Response:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def __enter__(self) -> "_Response":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> bytes:
        return self.content


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)


def _publish(monkeypatch: pytest.MonkeyPatch, checksum: str) -> None:
    entry = PUBLISHED["resnet20", "cifar10"]._replace(sha256=checksum)
    monkeypatch.setitem(PUBLISHED, ("resnet20", "cifar10"), entry)


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_in_the_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None, digits: int
) -> None:
    _publish(monkeypatch, hashlib.sha256(b"abc").hexdigest()[:digits])
    path = tmp_path / "resnet20-12fca82f.th"
    path.write_bytes(b"abc")
    assert fetch_published("resnet20", "cifar10", tmp_path) == path


def test_a_file_with_a_wrong_sum_is_neither_used_nor_deleted(tmp_path: Path, offline: None) -> None:
    path = tmp_path / "resnet20-12fca82f.th"
    path.write_bytes(b"abc")
    with pytest.raises(UserError) as caught:
        fetch_published("resnet20", "cifar10", tmp_path)
    assert PUBLISHED["resnet20", "cifar10"].sha256 in str(caught.value)
    assert hashlib.sha256(b"abc").hexdigest() in str(caught.value)
    assert path.read_bytes() == b"abc"


def test_download_is_verified_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urlopen(url: str, timeout: float) -> _Response:
        asked.append((url, timeout))
        return _Response(b"abc")

    monkeypatch.setattr(weights.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="the download of https://"):
        fetch_published("resnet20", "cifar10", tmp_path / "new")
    assert not list(tmp_path.rglob("*.th"))
    _publish(monkeypatch, hashlib.sha256(b"abc").hexdigest())
    path = fetch_published("resnet20", "cifar10", tmp_path / "new")
    assert path.read_bytes() == b"abc"
    assert asked[-1] == (PUBLISHED["resnet20", "cifar10"].url, 30)
    assert fetch_published("resnet20", "cifar10", tmp_path / "new") == path
    assert len(asked) == 2


def test_without_network_the_error_says_what_to_do(tmp_path: Path, offline: None) -> None:
    with pytest.raises(UserError) as caught:
        fetch_published("resnet56", "cifar10", tmp_path)
    entry = PUBLISHED["resnet56", "cifar10"]
    for part in (entry.url, str(tmp_path / entry.file), "no network", "bash scripts/search_export.sh", "digits"):
        assert part in str(caught.value)


def test_weights_that_nobody_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resnet20 on cifar10.*'resnet20' on dataset='cifar100'.*weights: train"):
        fetch_published("resnet20", "cifar100", tmp_path)
