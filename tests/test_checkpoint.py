"""Files that survive a crash: what is written comes back exactly, and damage is noticed."""

import hashlib
import json
import math
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch

from cacp import checkpoint
from cacp.checkpoint import (
    NEWEST,
    PREVIOUS,
    load_json,
    load_state,
    load_tensors,
    pack,
    save_json,
    save_state,
    save_tensors,
    sha256,
    unpack,
    write_atomically,
)
from cacp.schema import UserError


def test_write_atomically_creates_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, "first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_written_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_atomically(tmp_path / "atomic", "x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"macs": 0.5, "keep": [1, 2]})
    assert load_json(path) == {"macs": 0.5, "keep": [1, 2]}
    with pytest.raises(UserError, match=r"other\.json does not exist"):
        load_json(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"x\.json must be JSON without NaN"):
        save_json(path, {"loss": math.nan})
    path.write_text('{"macs": ')
    with pytest.raises(UserError, match=r"x\.json cannot be read.*write it again"):
        load_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.json cannot be read"):
        load_json(path)


def test_tensors_of_any_layout_come_back_equal(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(1, 2, 3, 4)
    tensors = {
        "plain": base,
        "transposed": base[0, 0].t(),
        "shared": base[:, :1],
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_tensor_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"x": torch.arange(100)})
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-8], "garbage": b"\x80\x02" + content[2:], "empty": b""}[damage])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated.*again"):
        load_tensors(path)


def test_a_missing_tensor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        load_tensors(tmp_path / "none.safetensors")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")  # the test vector of FIPS 180-2
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(bytes(3_000_000))
    assert sha256(path) == hashlib.sha256(bytes(3_000_000)).hexdigest()
    with pytest.raises(UserError, match="nothing_here"):
        sha256(tmp_path / "nothing_here")


def test_state_round_trip_keeps_the_one_before(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    save_state(tmp_path / "run", {"x": torch.tensor([1.0])}, {"epoch": 1})
    save_state(tmp_path / "run", {"x": torch.tensor([2.0])}, {"epoch": 2})
    state = load_state(tmp_path / "run")
    assert state is not None
    assert state.data == {"epoch": 2}
    assert torch.equal(state.tensors["x"], torch.tensor([2.0]))
    assert sorted(os.listdir(tmp_path / "run")) == [PREVIOUS, NEWEST]
    with pytest.raises(UserError, match=r"pass it through pack\(\)"):
        save_state(tmp_path / "run", {}, {"loss": math.inf})


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.arange(8), "flag": torch.tensor(True)}, {"epoch": 1})
    save_state(tmp_path, {"x": torch.arange(8) + 1, "flag": torch.tensor(False)}, {"epoch": 2})
    whole = (tmp_path / NEWEST).read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    noticed = 0
    for content in [*flipped, whole[:-1], whole[: len(whole) // 2], whole[:4], b""]:
        (tmp_path / NEWEST).write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = load_state(tmp_path)
        assert state is not None
        # Either the damage is noticed and the previous one comes back, or it changed nothing (padding of the header).
        noticed += len(caught)
        assert state.data == {"epoch": 1 if caught else 2}
        assert torch.equal(state.tensors["x"], torch.arange(8) + (0 if caught else 1))
        assert bool(state.tensors["flag"]) == bool(caught)
    assert noticed >= len(whole) + 4 - 8


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    for data, said in ((math.nan, "not JSON compliant"), ({"\ud800": 1}, "surrogates not allowed")):
        with pytest.raises(UserError, match=f"data of a checkpoint must be JSON, but got .*{said}"):
            save_state(tmp_path / "state", {}, data)
    assert not (tmp_path / "state").exists()


def test_the_warning_names_the_damaged_file_and_two_are_an_error(tmp_path: Path) -> None:
    save_state(tmp_path, {}, {"epoch": 1})
    save_state(tmp_path, {}, {"epoch": 2})
    (tmp_path / NEWEST).write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"checkpoint\.previous\.safetensors used instead: .*/checkpoint\.safetensors"):
        state = load_state(tmp_path)
    assert state is not None
    assert state.data == {"epoch": 1}
    (tmp_path / PREVIOUS).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"(?s)checkpoint\.safetensors.*checkpoint\.previous\.safetensors.*delete"):
        load_state(tmp_path)


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, {}, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_move", lambda *_: (_ for _ in ()).throw(OSError("power")))
        with pytest.raises(OSError, match="power"):
            save_state(tmp_path, {}, {"epoch": 2})
    state = load_state(tmp_path)
    assert state is not None
    assert state.data == {"epoch": 1}


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)  # type: ignore[index,call-overload]
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))  # type: ignore[arg-type]
    return a == b or (a != a and b != b)


def test_pack_is_exact() -> None:
    value = {
        0: torch.tensor([1, 2]),
        "0": torch.tensor([3.0]),  # the same path as the key 0
        "nested": [(), [], {}, (0.9, 0.999), [None, True, False, 1, 1.0, "text"]],
        "odd": {"tensor": "name", "dict": 1, "tuple": [2]},  # looks like the marks of pack
        "limits": [math.inf, -math.inf, math.nan, 0.1 + 0.2, 2**200, 5e-324],
        True: torch.tensor(5),
    }
    packed = pack(value)
    data = json.loads(json.dumps(packed.data, allow_nan=False))
    assert _same(unpack(packed.tensors, data), value)
    assert len(packed.tensors) == 3


@pytest.mark.parametrize("value", [torch.tensor(3), None, 2.5, "text", [], {}])
def test_pack_of_a_bare_value(value: object) -> None:
    packed = pack(value)
    assert _same(unpack(packed.tensors, packed.data), value)


def test_pack_lists_every_place_it_cannot_keep() -> None:
    with pytest.raises(UserError, match=r"a\.b \(set\), c\.1 \(object\).*convert"):
        pack({"a": {"b": {1}}, "c": [0, object()]})
    with pytest.raises(UserError, match=r"tensor: 'gone'"):
        unpack({}, {"tensor": "gone"})


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        if kind == "adam":
            return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.99))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    save_state(tmp_path, *pack({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    step(model, optimizer)

    saved = load_state(tmp_path)
    assert saved is not None
    state = unpack(*saved)
    other, other_optimizer = build()
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    step(other, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    assert not torch.equal(model.weight, torch.full((2, 3), 0.5))
    assert _same(other_optimizer.state_dict(), optimizer.state_dict())
