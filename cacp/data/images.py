"""Labelled uint8 images behind one interface, whether they lie in memory or in files.

Letters: N images of a set, B of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cacp.schema import UserError

Share = Callable[[Tensor], Tensor]  # the part (b,) of a batch (B,) that is wanted


class ImageStore(Protocol):
    """Where the pixels come from."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for every image."""

    def __len__(self) -> int: ...

    def batch(self, positions: Tensor) -> Tensor:
        """The images at `positions` (B,) int64, as uint8 (B, C, H, W)."""


@runtime_checkable
class CroppingStore(Protocol):
    """A store that can cut random crops out of the whole images."""

    def cropped(
        self, batches: Sequence[Tensor], generator: torch.Generator, flip: bool, share: Share
    ) -> Iterator[Tensor]:
        """Batches of crops, uint8 (B, C, H, W), of the images at the positions (B,) int64 of each."""


class MemoryImages:
    """Images as one tensor: `pixels` uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise UserError(
                f"pixels must be uint8 (N, C, H, W), but got {pixels.dtype} {tuple(pixels.shape)}; "
                "scale to 0..255 and convert"
            )
        self.pixels = pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, positions: Tensor) -> Tensor:
        return self.pixels.index_select(0, positions.to(self.pixels.device, non_blocking=True))


class ImageData:
    """A set of labelled images of one shape; `subset` shares the pixels.

    Attributes:
        labels: (N,) int64, positions in `classes`.
        classes: names, in label order.
        image_shape: (C, H, W).

    Args:
        images: a tensor uint8 (N, C, H, W), or a store that reads on demand.
        labels: (N,) whole numbers.
        classes: names, in label order.

    Raises:
        UserError: when the numbers of images and labels differ or a label is not in [0, number of classes).
    """

    def __init__(self, images: Tensor | ImageStore, labels: Tensor, classes: tuple[str, ...]) -> None:
        self._store: ImageStore = MemoryImages(images) if isinstance(images, Tensor) else images
        self._positions: Tensor | None = None  # (N,) int64 in the store; None is all of them, in order
        self.labels = labels.to("cpu", torch.int64)
        self.classes = classes
        wrong = []
        if self.labels.shape != (len(self._store),):
            wrong.append(f"labels of shape {tuple(labels.shape)} for {len(self._store)} images")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(classes):
            wrong.append(f"labels from {int(labels.min())} to {int(labels.max())} for {len(classes)} classes")
        if wrong:
            raise UserError(
                f"labels must be one for each image, in [0, number of classes), but got {' and '.join(wrong)}; "
                "count classes from 0"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._store.image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        """The images at `indices` (B,) int64, as uint8 (B, C, H, W), on the CPU but for a set made by `on`.

        Raises:
            UserError: listing files that cannot be decoded, where images are read on demand.
        """
        indices = indices.to("cpu", torch.int64)
        return self._store.batch(indices if self._positions is None else self._positions[indices])

    def on(self, device: torch.device) -> ImageData:
        """The same set with images that lie in memory copied to a GPU, if they take at most a quarter of what is free
        there; else, and for images in files, this set.
        """
        if device.type == "cpu" or not isinstance(self._store, MemoryImages):
            return self
        if device.type == "cuda" and 4 * len(self) * math.prod(self.image_shape) > torch.cuda.mem_get_info(device)[0]:
            return self
        return ImageData(self.batch(torch.arange(len(self))).to(device), self.labels, self.classes)

    def cropped(
        self, batches: Sequence[Tensor], generator: torch.Generator, flip: bool, share: Share = lambda batch: batch
    ) -> Iterator[Tensor]:
        """Random crops of the images at the indices (B,) of each batch, see `FileImages.cropped`.

        Raises:
            UserError: for images in memory, which have been cropped already.
        """
        store, places = self._store, self._positions
        if not isinstance(store, CroppingStore):
            raise UserError("random crops of any size need images in files: dataset imagefolder or imagenet")
        return store.cropped([batch if places is None else places[batch] for batch in batches], generator, flip, share)

    def subset(self, indices: Tensor) -> ImageData:
        """The images at `indices` (B,) int64, in that order, as a set of its own."""
        indices = indices.to("cpu", torch.int64)
        part = ImageData.__new__(ImageData)
        part._store = self._store
        part._positions = indices.clone() if self._positions is None else self._positions[indices]
        part.labels = self.labels[indices]
        part.classes = self.classes
        return part
