"""Files that survive a crash: atomic writes, tensors without pickle, checkpoints with a checksum.

Everything is safetensors or JSON, so reading a file never runs code from it. `pack` turns nested state (an optimizer's
state dict) into flat tensors and JSON, `unpack` turns it back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from cacp.parsing import LARGEST_JSON, parse_json, read_text
from cacp.schema import UserError

NEWEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
TEMPORARY = r"\..+\.\d+\.\d+\.tmp"  # names of files that are being written
_DAMAGE = (OSError, SafetensorError, ValueError, RuntimeError, OverflowError)
# What taking over a state raises that is whole, but not of this model or agent.
UNFIT = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError)


class SavedState(NamedTuple):
    """A checkpoint: tensors by name, on the CPU, and JSON-able data."""

    tensors: dict[str, Tensor]
    data: Any


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Parent folders are created. A failure leaves the old file as it was and no temporary file behind.

    Raises:
        OSError: when the file system refuses (disk full, no permission).
    """
    path = Path(path)
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data)
    _move(temporary, path)


def save_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically, the names of its columns as the first row."""
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    write_atomically(path, table.getvalue())


def _write_temporary(path: Path, data: bytes) -> Path:
    """Write and flush to disk a file beside `path` (a rename is atomic only within one file system)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the finished file would be as well.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _move(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is on disk only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def dump_json(data: Any) -> str:
    """JSON with a trailing newline; short lists stay on one line."""
    text = json.dumps(data, indent=2, allow_nan=False)
    return _join_number_lists(text) + "\n"


def _join_number_lists(text: str) -> str:
    lines: list[str] = []
    collecting = False
    for line in text.split("\n"):
        stripped = line.strip()
        number = stripped.rstrip(",").lstrip("-").replace(".", "", 1).isdigit()
        if collecting and (number or stripped in ("]", "],")):
            lines[-1] += (" " if number and not lines[-1].endswith("[") else "") + stripped
            collecting = number
            continue
        collecting = stripped.endswith("[")
        lines.append(line)
    return "\n".join(lines)


def save_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically, short number lists on one line.

    Raises:
        UserError: when `data` holds something that JSON does not (a tensor, NaN).
    """
    try:
        text = dump_json(data)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data for {path} must be JSON without NaN or infinity, but got {error}; convert it to numbers and strings"
        ) from error
    write_atomically(path, text)


def load_json(path: str | Path, shape: Any = None) -> Any:
    """Read a JSON file of a `shape` (see `cacp.parsing.check_shape`).

    Raises:
        UserError: naming the file, when it is missing, unreadable, too large, not JSON, or of another shape.
    """
    try:
        return parse_json(read_text(Path(path), LARGEST_JSON), shape)
    except FileNotFoundError as error:
        raise UserError(f"path must be a JSON file, but {path} does not exist; check the name of the folder") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"path must be a JSON file, but {path} cannot be read as one: {error}; "
            "write it again with the command that made it"
        ) from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device, layout and sharing to a safetensors file, atomically."""
    write_atomically(path, serialise(_on_cpu(tensors), None))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies even CPU tensors: safetensors refuses two names for one memory, and strides other than the plain ones.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        UserError: naming the file, when it is missing, truncated or otherwise damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"path must be a safetensors file, but {path} does not exist; check the name of the folder")
    try:
        return _read(Path(path))[0]
    except _DAMAGE as error:
        raise UserError(
            f"path must be a whole safetensors file, but {path} is damaged or truncated: {error!s:.300}; "
            "copy or download it again, or write it again with the command that made it"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        # A copy: what safetensors hands out is mapped memory of the file.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        UserError: naming the file, when it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"path must be a readable file, but got {path}: {error}; check the name") from error
    return digest.hexdigest()


def save_state(folder: str | Path, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Write a checkpoint to `folder`/checkpoint.safetensors and keep the one before it.

    Args:
        folder: is created where it does not exist.
        tensors: by name, any device.
        data: JSON-able; see `pack` for anything that is not.

    Raises:
        UserError: when `data` is not JSON.
    """
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
        text.encode()  # raises for lone surrogates
    except (TypeError, ValueError) as error:
        raise UserError(f"data of a checkpoint must be JSON, but got {error}; pass it through pack() first") from error
    tensors = _on_cpu(tensors)
    content = serialise(tensors, {"data": text, "sha256": _checksum(tensors, text)})
    newest = Path(folder) / NEWEST
    temporary = _write_temporary(newest, content)
    # The new file is whole on disk before the old one moves: a crash in between leaves `PREVIOUS`, which loads.
    try:
        if newest.exists() and not _damage(newest):  # a damaged one must not push out the one that loads
            os.replace(newest, newest.with_name(PREVIOUS))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _move(temporary, newest)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_state(folder: str | Path) -> SavedState | None:
    """Read the newest whole checkpoint of a folder; None where there is none.

    Warns with the file's name when the newest is torn, truncated or altered and the previous one is used.

    Raises:
        UserError: when there are checkpoints but none is whole.
    """
    present = [path for path in (Path(folder) / NEWEST, Path(folder) / PREVIOUS) if path.is_file()]
    damaged: list[str] = []
    for path in present:
        try:
            state = _read_checked(path)
        except _DAMAGE as error:
            damaged.append(f"{path}: {error}")
            continue
        if damaged:
            warnings.warn(f"damaged checkpoint left out, {path.name} used instead: {damaged[0]}", stacklevel=2)
        return state
    if damaged:
        raise UserError(
            "a checkpoint must be whole to resume from it, but these are damaged:\n  "
            + "\n  ".join(damaged)
            + f"\ndelete {folder} to start that part again, or restore it from a copy"
        )
    return None


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint file; empty for a whole one."""
    try:
        _read_checked(path)
    except _DAMAGE as error:
        return f"{path}: {error}"
    return ""


def _read_checked(path: Path) -> SavedState:
    tensors, metadata = _read(path)
    missing = {"data", "sha256"} - metadata.keys()
    if missing:
        raise ValueError(f"no {' and '.join(sorted(missing))} in its header")
    found = _checksum(tensors, metadata["data"])
    if found != metadata["sha256"]:
        raise ValueError(f"its checksum is {found}, but {metadata['sha256']} was written")
    return SavedState(tensors, parse_json(metadata["data"], largest=math.inf))  # generators have numbers of 128 bits


class PackedState(NamedTuple):
    """Nested state as flat tensors and JSON that says where each tensor stands."""

    tensors: dict[str, Tensor]
    data: Any


def pack(value: Any) -> PackedState:
    """Split nested dicts, lists and tuples into tensors and JSON, without loss; `unpack` is the inverse.

    Keeps what JSON would lose: integer keys, tuples, infinities and NaN. Subclasses (OrderedDict) come back as the
    plain type, tensors on the CPU.

    Raises:
        UserError: listing every place that holds something else than tensors, numbers, strings, booleans and None.

    >>> pack({0: (0.9, 0.999)}).data
    {'dict': [[0, {'tuple': [0.9, 0.999]}]]}
    """
    tensors: dict[str, Tensor] = {}
    wrong: list[str] = []
    data = _pack(value, "", tensors, wrong)
    if wrong:
        raise UserError(
            "state must be made of dicts, lists, tuples, tensors, numbers, strings, booleans and None, but got "
            + ", ".join(wrong)
            + "; convert these (torch.from_numpy for arrays)"
        )
    return PackedState(tensors, data)


def _pack(value: Any, path: str, tensors: dict[str, Tensor], wrong: list[str]) -> Any:
    if isinstance(value, Tensor):
        # The keys 0 and "0" spell the same path.
        name = (path or "value") if (path or "value") not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = [[_pack(key, path, tensors, wrong), _pack(item, f"{path}.{key}".lstrip("."), tensors, wrong)]
                 for key, item in value.items()]  # fmt: skip
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{path}.{index}".lstrip("."), tensors, wrong) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if value is not None and not isinstance(value, bool | int | float | str):
        wrong.append(f"{path or 'value'} ({type(value).__name__})")
    return value


def unpack(tensors: Mapping[str, Tensor], data: Any) -> Any:
    """Put together again what `pack` took apart.

    Raises:
        UserError: when `data` is not from `pack` or names a tensor that is not there.
    """
    if isinstance(data, list):
        return [unpack(tensors, item) for item in data]
    if not isinstance(data, dict):
        return data
    kind: str
    content: Any
    kind, content = next(iter(data.items()), ("nothing", None))
    if kind == "dict":
        return {unpack(tensors, key): unpack(tensors, item) for key, item in content}
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in content)
    if kind == "float":
        return float(content)
    if kind == "tensor" and content in tensors:
        return tensors[content]
    raise UserError(
        f"state must come from pack() with all its tensors, but got {kind}: {content!r:.80}; save and load both parts"
    )
