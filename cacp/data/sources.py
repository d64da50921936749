"""The data sets by name: digits (needs no download), CIFAR-10/100 through torchvision, image folders, ImageNet."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Literal, overload

import torch
import torch.nn.functional as F
import torchvision

from cacp.data.folder import IMAGENET, Frame, load_folder
from cacp.data.images import ImageData
from cacp.parallel import launched
from cacp.schema import UserError
from cacp.side_by_side import beside

DATASETS = ("digits", "cifar10", "cifar100", "imagefolder", "imagenet")
SPLITS = ("train", "val", "test")
MEMORY_LIMIT_BYTES = 4 * 1024**3  # decoded images above it are read on demand
DOWNLOAD_TIMEOUT_S = 30
_SIZE = 32  # pixels, of digits and CIFAR
_IMAGENET_SIZE = 224  # pixels
_IMAGENET_MARGIN = 256 / 224  # the shorter side before the centre is cropped, by the side of the square


@overload
def load_dataset(
    name: str,
    split: Literal["train", "test"],
    data_dir: str | Path,
    image_size: int | None = None,
    memory_limit_bytes: int = ...,
    workers: int | None = None,
) -> ImageData: ...
@overload
def load_dataset(
    name: str,
    split: str,
    data_dir: str | Path,
    image_size: int | None = None,
    memory_limit_bytes: int = ...,
    workers: int | None = None,
) -> ImageData | None: ...
def load_dataset(
    name: str,
    split: str,
    data_dir: str | Path,
    image_size: int | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    workers: int | None = None,
) -> ImageData | None:
    """One split of a data set; None for a "val" split that the data set does not have.

    Args:
        name: digits (1797 scans from scikit-learn, 359 of them for testing, as 32 x 32 RGB), cifar10, cifar100,
            imagefolder or imagenet.
        split: train, test or val. Only an image folder can have val.
        data_dir: where CIFAR lies or is downloaded to; for imagefolder the folder with train/<class>/*,
            test/<class>/* and perhaps val/<class>/*; for imagenet with train/<class>/* and val/<class>/*, which is the
            test set; not used by digits.
        image_size: pixels of the central square. imagefolder: the shorter side is resized to it; imagenet (224 if it is
            None): to 8/7 of it, 256 for 224.
        memory_limit_bytes: image folders that are larger when decoded are read on demand.
        workers: threads or processes that decode images; None is one for each core, at most 16, divided by the
            processes of torchrun, or by those side by side.

    Raises:
        UserError: for an unknown name or split, a wrong image_size, missing data, or a folder with faults (all listed).
    """
    wrong = []
    if name not in DATASETS:
        wrong.append(f"dataset must be one of {', '.join(DATASETS)}, but got {name!r}; choose a name from the list")
    if split not in SPLITS:
        wrong.append(f"split must be one of {', '.join(SPLITS)}, but got {split!r}")
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8):
        wrong.append(f"image_size must be a whole number of pixels from 8 up, but got {image_size!r}")
    elif image_size not in (None, _SIZE) and name in DATASETS[:3]:
        wrong.append(f"image_size of {name} is {_SIZE}, but got {image_size!r}; leave it out, it is for image folders")
    if wrong:
        raise UserError("\n".join(wrong))
    if workers is None:
        workers = max(1, min(16, (os.cpu_count() or 1) // (launched() * beside())))
    if name == "imagefolder":
        frame = Frame(image_size, image_size) if image_size else None
        return load_folder(Path(data_dir), split, frame, memory_limit_bytes, workers)
    if name == "imagenet":
        side = image_size or _IMAGENET_SIZE
        frame = Frame(side, round(side * _IMAGENET_MARGIN))
        return load_folder(Path(data_dir), split, frame, memory_limit_bytes, workers, IMAGENET)
    if split == "val":
        return None
    return _load_digits(split) if name == "digits" else _load_cifar(name, split, Path(data_dir))


def _load_digits(split: str) -> ImageData:
    """8 x 8 pixels of 0..16, bilinearly enlarged to 32 x 32; images 3, 8, 13, ... of every class are for testing."""
    from sklearn.datasets import load_digits  # here: a second of import time that no other data set needs

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    small = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8)
    large = F.interpolate(small, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()  # (N, 3, 32, 32)
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        testing[(labels == label).nonzero().view(-1)[2::5]] = True
    chosen = testing if split == "test" else ~testing
    return ImageData(pixels[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))


def _load_cifar(name: str, split: str, data_dir: Path) -> ImageData:
    dataset = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            source = dataset(str(data_dir), train=split == "train", download=True)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        raise UserError(
            f"dataset {name} must lie in data_dir or be downloadable, but {data_dir / dataset.base_folder} is missing "
            f"or incomplete and {dataset.url} could not be fetched ({error}); put the folder {dataset.base_folder} or "
            f"the archive {dataset.filename} into {data_dir.resolve()}. "
            "dataset: digits needs no download: bash scripts/search_export.sh"
        ) from error
    pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return ImageData(pixels, torch.tensor(source.targets), tuple(source.classes))


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision's download has no timeout of its own: a network that drops packets would hang it for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
