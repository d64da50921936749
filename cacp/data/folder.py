"""Image folders: data_dir/train/<class>/*, data_dir/test/<class>/* and, where wanted, data_dir/val/<class>/*; ImageNet
as it is unpacked, train/ and val/, of which val/ is the test set.

Files are decoded by threads, in sorted order: all at once where they fit into memory, else as batches ask for them;
random crops of any size and shape are made by worker processes. Orientation tags of cameras are not applied;
transparency is dropped.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from cacp.data.images import ImageData, Share
from cacp.schema import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))
_SHOWN = 20  # faulty files that a message names
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


class Frame(NamedTuple):
    """Pixels: resize the shorter side of an image to `shorter`, then cut out the central square of `side`."""

    side: int
    shorter: int


class FileImages:
    """Images that are decoded when a batch asks for them; all come out as `size` pixels, RGB.

    Args:
        paths: N files.
        size: of the decoded images.
        frame: how images are resized and cropped; None leaves them as they are.
        workers: threads or processes that decode.
    """

    def __init__(self, paths: Sequence[Path], size: Size, frame: Frame | None, workers: int) -> None:
        self._paths = paths
        self._size = size
        self._frame = frame
        self._workers = workers
        self._threads = ThreadPoolExecutor(max(1, workers))

    def __reduce__(self) -> tuple[Any, ...]:
        """Threads stay behind when it is sent to another process."""
        return FileImages, (self._paths, self._size, self._frame, self._workers)

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
                image = _decode(chosen[place], self._frame)
            except _BROKEN as error:
                return f"{chosen[place]}: broken: {error}"
            if image.shape[:2] != (self._size.height, self._size.width):
                return _other_size(chosen[place], Size(image.shape[1], image.shape[0]), self._size)
            pixels[place] = image.transpose(2, 0, 1)
            return ""

        _refuse(self._threads.map(fill, range(len(chosen))))
        return torch.from_numpy(pixels)

    def cropped(
        self, batches: Sequence[Tensor], generator: torch.Generator, flip: bool, share: Share
    ) -> Iterator[Tensor]:
        """Batches of random crops, resized to `size`, mirrored at random with `flip`: uint8 (B, 3, H, W).

        A crop has 8 % to 100 % of the image's area and 3:4 to 4:3 sides (torchvision's RandomResizedCrop). Worker
        processes make them, of the images of each batch that `share` takes; which crop an image gets depends on the
        generator alone.

        Raises:
            UserError: listing the files that are broken.
        """
        seeds = [torch.randint(0, 2**62, (len(batch),), generator=generator) for batch in batches]
        chosen = [
            list(zip(share(batch).tolist(), share(drawn).tolist(), strict=True))
            for batch, drawn in zip(batches, seeds, strict=True)
        ]
        crops = _Crops(self._paths, self._size, flip)
        own = torch.Generator()  # else the loader draws from the global one
        loader = DataLoader(crops, batch_sampler=chosen, num_workers=self._workers, collate_fn=list, generator=own)
        for batch in loader:
            _refuse(fault for _, fault in batch)
            yield torch.stack([pixels for pixels, _ in batch])

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
            return "" if self._frame or found == self._size else _other_size(path, found, self._size)

        _refuse(self._threads.map(check, self._paths))


class _Crops(Dataset[tuple[Tensor, str]]):
    """Random crops of files by (position, seed): uint8 (3, H, W), and what is wrong with the file."""

    def __init__(self, paths: Sequence[Path], size: Size, flip: bool) -> None:
        self._paths, self._size, self._flip = paths, size, flip

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str]:
        position, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image = _opened(self._paths[position])
            except _BROKEN as error:
                return torch.zeros(3, *self._size[::-1], dtype=torch.uint8), f"{self._paths[position]}: broken: {error}"
            top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            box = (left, top, left + width, top + height)
            image = image.resize(self._size, Image.Resampling.BILINEAR, box)
            if self._flip and torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1)), ""


class Layout(NamedTuple):
    """Folders of a data set: which one holds a split, and those that there must be, the training images' first."""

    splits: Mapping[str, str]
    required: tuple[str, ...]


FOLDER = Layout({"train": "train", "test": "test", "val": "val"}, ("train", "test"))
IMAGENET = Layout({"train": "train", "test": "val"}, ("train", "val"))


def load_folder(
    data_dir: Path, split: str, frame: Frame | None, memory_limit_bytes: int, workers: int, layout: Layout = FOLDER
) -> ImageData | None:
    """One split of an image folder; None where it has none.

    Args:
        data_dir: holds the folders of the layout.
        split: train, test or val.
        frame: how images are resized and cropped; None: all must have one size.
        memory_limit_bytes: decoded images above it stay in their files.
        workers: threads or processes that decode.
        layout: which folder holds which split.

    Raises:
        UserError: listing all faults of the folder: missing or empty folders, classes that differ between the splits,
            broken files, files of another size.
    """
    classes = _check_layout(data_dir, layout)
    if split not in layout.splits or not (folder := data_dir / layout.splits[split]).is_dir():
        return None
    files = [(path, label) for label, name in enumerate(classes) for path in _image_files(folder / name)]
    paths = [path for path, _ in files]
    labels = torch.tensor([label for _, label in files])
    size = Size(frame.side, frame.side) if frame else _common_size(data_dir / "train", classes)
    images = FileImages(paths, size, frame, workers)
    if len(paths) * 3 * size.width * size.height <= memory_limit_bytes:
        return ImageData(images.batch(torch.arange(len(paths))), labels, classes)
    if layout is not IMAGENET:  # more than a million files would be opened at every start
        images.check_headers()
    return ImageData(images, labels, classes)


def _check_layout(data_dir: Path, layout: Layout) -> tuple[str, ...]:
    """The class names, sorted, after a look at all folders."""
    classes = _class_names(data_dir / "train")
    wrong = [f"{split}/ is missing" for split in layout.required if not (data_dir / split).is_dir()]
    for split in layout.splits.values():
        folder = data_dir / split
        if not folder.is_dir():
            continue
        found = _class_names(folder)
        if not found:
            flat = "; ImageNet's archive of val/ is flat: sort it into synset folders" if layout is IMAGENET else ""
            wrong.append(f"{split}/ has no class folders{flat}")
        elif classes and found != classes:
            wrong += [f"{split}/{name}/ is missing" for name in sorted(set(classes) - set(found))]
            wrong += [f"{split}/{name}/ is no class of train/" for name in sorted(set(found) - set(classes))]
        wrong += [f"{split}/{name}/ has no images" for name in found if not _image_files(folder / name)]
    if wrong:
        optional = [f"{name}/<class>/*" for name in layout.splits.values() if name not in layout.required]
        raise UserError(
            f"data_dir must hold {' and '.join(f'{name}/<class>/*' for name in layout.required)}"
            f"{f' (and may hold {optional[0]})' if optional else ''}, with the same classes "
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


def _decode(path: Path, frame: Frame | None) -> np.ndarray:
    """uint8 (H, W, 3)."""
    image = _opened(path)
    return np.asarray(image if frame is None else _resize_and_crop(image, frame))


def _opened(path: Path) -> Image.Image:
    """A whole image, RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _resize_and_crop(image: Image.Image, frame: Frame) -> Image.Image:
    """Shorter side first (bilinear, antialiased as always in Pillow), then the central square."""
    width, height = image.size
    shorter = min(width, height)
    width, height = width * frame.shorter // shorter, height * frame.shorter // shorter
    left, top = round((width - frame.side) / 2), round((height - frame.side) / 2)  # as torchvision rounds
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + frame.side, top + frame.side))


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
