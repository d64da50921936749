"""Image folders: data_dir/train/<class>/*, data_dir/test/<class>/* and, where wanted, data_dir/val/<class>/*.

Files are decoded by threads, in sorted order: all at once where they fit into memory, else as batches ask for them.
Orientation tags of cameras are not applied; transparency is dropped.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cacp.data.images import ImageData
from cacp.schema import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))
_SHOWN = 20  # faulty files that a message names
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


class FileImages:
    """Images that are decoded when a batch asks for them; all come out as `size` pixels, RGB.

    Args:
        paths: N files.
        size: of the decoded images.
        image_size: resize the shorter side to it and crop the centre; None leaves the images as they are.
    """

    def __init__(self, paths: Sequence[Path], size: Size, image_size: int | None) -> None:
        self._paths = paths
        self._size = size
        self._image_size = image_size
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self._size.height, self._size.width

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, positions: Tensor) -> Tensor:
        """Decode (B,) files to uint8 (B, 3, H, W).

        Raises:
            UserError: listing the files that are broken or of another size.
        """
        chosen = [self._paths[position] for position in positions.tolist()]
        pixels = np.empty((len(chosen), *self.image_shape), dtype=np.uint8)

        def fill(place: int) -> str:
            try:
                image = _decode(chosen[place], self._image_size)
            except _BROKEN as error:
                return f"{chosen[place]}: broken: {error}"
            if image.shape[:2] != (self._size.height, self._size.width):
                return _other_size(chosen[place], Size(image.shape[1], image.shape[0]), self._size)
            pixels[place] = image.transpose(2, 0, 1)
            return ""

        _refuse(self._threads.map(fill, range(len(chosen))))
        return torch.from_numpy(pixels)

    def check_headers(self) -> None:
        """Open every file without decoding it.

        Raises:
            UserError: listing the files that are no images, or of another size where no image_size is set.
        """

        def check(path: Path) -> str:
            try:
                found = _header_size(path)
            except _BROKEN as error:
                return f"{path}: broken: {error}"
            return "" if self._image_size or found == self._size else _other_size(path, found, self._size)

        _refuse(self._threads.map(check, self._paths))


def load_folder(data_dir: Path, split: str, image_size: int | None, memory_limit_bytes: int) -> ImageData | None:
    """One split of an image folder; None where it has no val/.

    Args:
        data_dir: holds train/, test/ and perhaps val/.
        split: train, test or val.
        image_size: pixels of the square that images are resized and cropped to; None: all must have one size.
        memory_limit_bytes: decoded images above it stay in their files.

    Raises:
        UserError: listing all faults of the folder: missing or empty folders, classes that differ between the splits,
            broken files, files of another size.
    """
    classes = _check_layout(data_dir)
    if not (data_dir / split).is_dir():
        return None
    files = [(path, label) for label, name in enumerate(classes) for path in _image_files(data_dir / split / name)]
    paths = [path for path, _ in files]
    labels = torch.tensor([label for _, label in files])
    size = Size(image_size, image_size) if image_size else _common_size(data_dir / "train", classes)
    images = FileImages(paths, size, image_size)
    if len(paths) * 3 * size.width * size.height <= memory_limit_bytes:
        return ImageData(images.batch(torch.arange(len(paths))), labels, classes)
    images.check_headers()
    return ImageData(images, labels, classes)


def _check_layout(data_dir: Path) -> tuple[str, ...]:
    """The class names, sorted, after a look at all folders."""
    classes = _class_names(data_dir / "train")
    wrong = [f"{split}/ is missing" for split in ("train", "test") if not (data_dir / split).is_dir()]
    for split in ("train", "test", "val"):
        folder = data_dir / split
        if not folder.is_dir():
            continue
        found = _class_names(folder)
        if not found:
            wrong.append(f"{split}/ has no class folders")
        elif classes and found != classes:
            wrong += [f"{split}/{name}/ is missing" for name in sorted(set(classes) - set(found))]
            wrong += [f"{split}/{name}/ is no class of train/" for name in sorted(set(found) - set(classes))]
        wrong += [f"{split}/{name}/ has no images" for name in found if not _image_files(folder / name)]
    if wrong:
        raise UserError(
            "data_dir must hold train/<class>/* and test/<class>/* (and may hold val/<class>/*), with the same classes "
            f"and at least one image ({' '.join(sorted(SUFFIXES))}) in each, but in {data_dir}:\n  "
            + "\n  ".join(wrong)
            + "\nadd what is missing, or set data_dir to another folder"
        )
    return classes


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _image_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.name.startswith(".")
        ]
    return [folder / name for name in sorted(names)]


def _common_size(train: Path, classes: Sequence[str]) -> Size:
    """Pixels of the first training image that opens: what images of all splits must have."""
    faults = []
    for name in classes:
        for path in _image_files(train / name):
            try:
                return _header_size(path)
            except _BROKEN as error:
                faults.append(f"{path}: broken: {error}")
    _refuse(faults)
    raise AssertionError("a checked folder has images")


def _header_size(path: Path) -> Size:
    with Image.open(path) as image:
        return Size(*image.size)


def _decode(path: Path, image_size: int | None) -> np.ndarray:
    """uint8 (H, W, 3)."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image_size is not None:
        image = _resize_and_crop(image, image_size)
    return np.asarray(image)


def _resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Shorter side to `image_size` (bilinear, antialiased as always in Pillow), then the central square."""
    width, height = image.size
    shorter = min(width, height)
    width, height = width * image_size // shorter, height * image_size // shorter
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)  # as torchvision rounds
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + image_size, top + image_size))


def _other_size(path: Path, found: Size, expected: Size) -> str:
    return f"{path}: {found.width} x {found.height} pixels, not {expected.width} x {expected.height}"


def _refuse(faults: Iterable[str]) -> None:
    listed = [fault for fault in faults if fault]
    if listed:
        more = f"\n  and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise UserError(
            f"images must be readable and of one size (width x height), but {len(listed)} are not:\n  "
            + "\n  ".join(listed[:_SHOWN])
            + more
            + "\nreplace or delete broken files; where sizes differ, set image_size to resize and crop all images"
        )
