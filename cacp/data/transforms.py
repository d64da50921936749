"""Normalisation and augmentation of whole batches: pure functions of uint8 images, on the device of the images.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cacp.data.images import ImageData
from cacp.schema import Normalisation, UserError

_CHUNK = 512  # images read at a time


def normalise(images: Tensor, normalisation: Normalisation, device: torch.device | str | None = None) -> Tensor:
    """(images / 255 - mean) / std.

    Args:
        images: uint8 (B, C, H, W).
        normalisation: mean and std of each of the C channels, of images in [0, 1].
        device: where the result goes; None keeps it with the images. The uint8 images travel, not the floats.

    Returns:
        float32 (B, C, H, W).

    Raises:
        UserError: when the images are not uint8, or the normalisation is not for C channels, or a std is not above 0.
    """
    mean, std = normalisation
    channels = images.shape[1]
    if images.dtype != torch.uint8 or not len(mean) == len(std) == channels or not all(value > 0 for value in std):
        raise UserError(
            "normalise takes uint8 images and, for each of their channels, a mean and a std above 0, "
            f"but got {images.dtype} images of {channels} channels, {mean=}, {std=}; give mean and std of the weights"
        )
    factors = [1 / (255 * value) for value in std], [-m / s for m, s in zip(mean, std, strict=True)]
    floats = images.to(device or images.device).to(torch.float32)  # (B, C, H, W)
    scale, shift = torch.tensor(factors).to(floats.device, non_blocking=True).view(2, 1, -1, 1, 1)
    return floats.mul_(scale).add_(shift)


def channel_statistics(data: ImageData) -> Normalisation:
    """Mean and population standard deviation of each channel, of the images in [0, 1], exact to float64 rounding.

    A channel that is constant over the whole set gets std 1, so that it normalises to 0.

    Raises:
        UserError: for an empty set.
    """
    if not len(data):
        raise UserError("channel statistics need at least 1 image, but got 0; check the data folder")
    channels = data.image_shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.int64)  # a histogram of pixel values for each channel
    for start in range(0, len(data), _CHUNK):
        images = data.batch(torch.arange(start, min(start + _CHUNK, len(data))))
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].reshape(-1), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values  # (C,)
    variance = (share * (values - mean[:, None]) ** 2).sum(1)  # (C,)
    constant = (counts > 0).sum(1) == 1
    std = [1.0 if same else math.sqrt(value) for same, value in zip(constant.tolist(), variance.tolist(), strict=True)]
    return Normalisation(tuple(mean.tolist()), tuple(std))


def augment(images: Tensor, generator: torch.Generator, padding: int, flip: bool, erased: int = 0) -> Tensor:
    """A random crop of every zero-padded image, a horizontal flip of every second one on average, and a black square.

    Args:
        images: uint8 (B, C, H, W).
        generator: the only source of randomness; may be on another device than the images.
        padding: pixels on each side; shifts are uniform in [-padding, padding], the same for all channels of an image.
        flip: False where left and right differ in meaning (digits).
        erased: pixels a side of the square, centred anywhere (cutout; DeVries & Taylor, 2017); 0 for none.

    Returns:
        uint8 (B, C, H, W), new memory.

    Raises:
        UserError: for a negative padding.
    """
    if padding < 0:
        raise UserError(f"padding must be a whole number from 0 up, but got {padding=}; 4 is usual for 32 x 32 pixels")
    batch, channels, height, width = images.shape
    device = generator.device
    shift = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + shift[0]  # (B, H), in the padded image
    columns = torch.arange(width, device=device)
    if flip:
        flipped = torch.randint(0, 2, (batch, 1), generator=generator, device=device, dtype=torch.bool)
        columns = torch.where(flipped, width - 1 - columns, columns)  # (B, W)
    columns = columns + shift[1]  # (B, W)
    padded = F.pad(images, (padding,) * 4)  # (B, C, H + 2 padding, W + 2 padding)
    rows, columns = (  # small, before they are made large
        one.to(images.device, non_blocking=True) for one in (rows, columns)
    )
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W), places in a flattened channel
    pixels = pixels.view(batch, 1, -1).expand(batch, channels, -1)
    cropped = padded.reshape(batch, channels, -1).gather(2, pixels).view(batch, channels, height, width)
    if not erased:
        return cropped
    centres = torch.rand((2, batch, 1), generator=generator, device=device)
    below, across = (
        ((torch.arange(size, device=device) + 0.5 - centre * size).abs() < erased / 2).to(images.device)
        for size, centre in zip((height, width), centres, strict=True)
    )  # (B, H), (B, W)
    return cropped.masked_fill(below[:, None, :, None] & across[:, None, None, :], 0)
