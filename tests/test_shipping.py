"""The forms of a pruned model: equal outputs for any batch, metadata, what happens where one cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from conftest import lively
from test_exporting import CLASSES, exported
from torch import Tensor, nn

from cacp import shipping
from cacp.checkpoint import load_tensors, save_tensors
from cacp.exporting import load_pruned
from cacp.models import build_model
from cacp.reporting import show_files
from cacp.shipping import FORMS, ship, unshipped

NETWORKS = (("resnet20", 16), ("resnet56", 16), ("cifar_vgg11_bn", 32), ("resnet18", 32), ("mobilenet_v2", 32))

READER = """
import sys
for name in ("cacp", "envs", "agents", "torchvision"):
    sys.modules[name] = None  # an import of it fails
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
images = load_file(sys.argv[2])["images"]
save_file({"logits": torch.export.load(sys.argv[1]).module()(images)}, sys.argv[2])
"""


def shipped(folder: Path, name: str, scope: str, pixels: int, forms: tuple[str, ...] = FORMS) -> dict[str, Any]:
    exported(folder, lively(build_model(name, 10, seed=0)), scope, name, size=pixels)
    return ship(folder, load_pruned(folder), forms, {})


def images(count: int, pixels: int) -> Tensor:
    """Normalised, as `exported` says."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    return (torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(7)) - mean) / std


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("scope", ["all", pytest.param("inner", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "pixels"), [NETWORKS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in NETWORKS[1:])]
)
def test_every_form_gives_the_models_outputs_for_any_batch(
    tmp_path: Path, name: str, pixels: int, scope: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        forms = shipped(tmp_path, name, scope, pixels)
    assert (capfd.readouterr(), warned) == (("", ""), [])
    assert [record.get("file") for record in forms.values()] == ["model.py", "model.onnx", "model.pt2"]
    assert forms["python"]["largest_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [  # no weights beside model.onnx, no __pycache__
        "architecture.json", "model.onnx", "model.pt2", "model.py", "model.safetensors",
    ]  # fmt: skip
    model = load_pruned(tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 17):
        x = images(batch, pixels)
        expected = logits(model, x)
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        allowed = 1e-4 * max(1.0, expected.abs().max().item())  # weights drawn at random give logits of hundreds
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
        torch.testing.assert_close(logits(program, x), expected, rtol=0, atol=allowed)
    here = str(Path(shipping.__file__).resolve().parents[1]).encode()
    for file in ("model.onnx", "model.pt2", "model.py"):
        content = (tmp_path / file).read_bytes()
        assert here not in content and b"site-packages" not in content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet as ONNX and .pt2."""
    made = tmp_path_factory.mktemp("shipped")
    shipped(made, "resnet20", "all", 16, ("onnx", "pt2"))
    return made


def test_metadata_says_how_to_use_a_model(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    said = {item.key: json.loads(item.value) for item in model.metadata_props}
    files: dict[str, str] = {"architecture.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=files)
    assert said == json.loads(files["architecture.json"])
    assert {key: said[key] for key in said if key != "input"} == json.loads((folder / "architecture.json").read_text())
    assert said["normalisation"] == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    assert said["classes"] == list(CLASSES) and said["input"].startswith("(images - mean) / std")
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert sizes == [["batch", 3, 16, 16]]
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.output]
    assert sizes == [["batch", 10]]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]


def test_a_program_of_torch_export_needs_nothing_of_this_project(folder: Path, tmp_path: Path) -> None:
    x = images(3, 16)
    save_tensors(tmp_path / "images.safetensors", {"images": x})
    files = [str(folder / "model.pt2"), str(tmp_path / "images.safetensors")]
    subprocess.run([sys.executable, "-I", "-c", READER, *files], check=True, timeout=900)
    found = load_tensors(tmp_path / "images.safetensors")["logits"]
    torch.testing.assert_close(found, logits(load_pruned(folder), x), rtol=0, atol=1e-4)


def test_a_form_that_cannot_be_made_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("conversion failed\nat length") from ValueError("no ONNX function for aten.chunk\nsee there")

    (tmp_path / "model.onnx").write_bytes(b"of an older export")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", refused)
        forms = shipped(tmp_path, "resnet20", "inner", 16, ("python", "onnx"))
    reason = "ValueError: no ONNX function for aten.chunk"
    assert forms["onnx"] == {"missing": reason, "versions": shipping.versions()}
    assert not (tmp_path / "model.onnx").exists()
    capsys.readouterr()
    show_files("exported", Path("here"), forms, "report.json")
    assert capsys.readouterr().out.splitlines() == [
        "exported here: model.safetensors, architecture.json, model.py, report.json",
        f"  no model.onnx: {reason}",
    ]
    assert unshipped(tmp_path, ("python", "onnx"), forms) == []  # the same packages would fail again
    monkeypatch.setattr(shipping, "versions", lambda: {"torch": "another"})
    assert unshipped(tmp_path, ("python", "onnx"), forms) == ["onnx"]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(shipping, "exported", lambda model, shape: None)
    forms = shipped(tmp_path, "resnet20", "inner", 16, ("onnx",))
    assert forms["onnx"]["missing"] == "onnx is not installed; pip install -r requirements.txt"


def test_a_form_with_other_outputs_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shipping.plain_source
    monkeypatch.setattr(
        shipping, "plain_source", lambda *given: source(*given).replace("return self", "return 2 * self")
    )
    forms = shipped(tmp_path, "resnet20", "inner", 16, ("python",))
    assert "from the model's, of which at most 0 is allowed" in forms["python"]["missing"]
    assert not (tmp_path / "model.py").exists()


def test_a_full_disk_is_no_form_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shipping, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        shipped(tmp_path, "resnet20", "inner", 16, ("python",))


def test_only_what_is_lacking_is_written(tmp_path: Path) -> None:
    forms = shipped(tmp_path, "resnet20", "inner", 16, ("python",))
    before = (tmp_path / "model.py").stat().st_mtime_ns
    assert unshipped(tmp_path, ("python",), forms) == []
    assert ship(tmp_path, load_pruned(tmp_path), ("python",), forms) == forms
    assert (tmp_path / "model.py").stat().st_mtime_ns == before
    assert unshipped(tmp_path, FORMS, forms) == ["onnx", "pt2"]
    whole = (tmp_path / "model.py").read_bytes()
    (tmp_path / "model.py").write_bytes(whole[:-1])
    assert unshipped(tmp_path, ("python",), forms) == ["python"]
    older = {"python": {key: value for key, value in forms["python"].items() if key != "sha256"}}
    assert unshipped(tmp_path, ("python",), older) == []
    (tmp_path / "model.py").unlink()
    assert unshipped(tmp_path, ("python",), forms) == ["python"]
