"""ResNet-20/32/44/56/110 for small images, after He et al. 2015 (arXiv:1512.03385), section 4.2.

The shortcuts are option A (subsampling and zero channels, no parameters). Module names follow
github.com/akamaster/pytorch_resnet_cifar10, so its published weights load key by key.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacp.schema import UserError

WIDTHS = (16, 32, 64)  # channels of the three stages


class ChannelPadShortcut(nn.Module):
    """Option A shortcut: subsample the image, put zero channels half before and half after the input's.

    After `select` it connects pruned channel sets instead, through the buffer `index`; a dense shortcut has no entry
    in the state dict. `in_channels` and `out_channels` are always the dense numbers.
    """

    index: Tensor | None

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if not 0 < in_channels <= out_channels or stride < 1:
            raise UserError(
                "a zero-padding shortcut needs 0 < in_channels <= out_channels and stride >= 1, "
                f"but got {in_channels=}, {out_channels=}, {stride=}; use a convolution as shortcut"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.before = (out_channels - in_channels) // 2  # zero channels in front
        self.register_buffer("index", None)

    def select(self, kept_in: Sequence[int], kept_out: Sequence[int], device: torch.device | str | None = None) -> None:
        """Connect only the kept channels, numbered as in the dense shortcut; a later call replaces an earlier one.

        An output whose input channel is not kept is zero, as the padding is.

        Args:
            kept_in: sorted input channels that arrive.
            kept_out: sorted output channels to return.
            device: where the model lives.

        Raises:
            UserError: when a set is empty, unsorted or out of range.
        """
        wrong = [
            f"{name}={list(kept)!r:.80} of {channels} channels"
            for name, kept, channels in (
                ("kept_in", kept_in, self.in_channels),
                ("kept_out", kept_out, self.out_channels),
            )
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= channels
        ]
        if wrong:
            raise UserError(
                f"kept channels must be sorted, different and in range, but got {', '.join(wrong)}; "
                "take them from a policy that was validated against this model"
            )
        position = {channel: place for place, channel in enumerate(kept_in)}
        zero = len(kept_in)
        places = [position.get(channel - self.before, zero) for channel in kept_out]
        self.index = torch.tensor(places, dtype=torch.int64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]  # (B, C, ceil(H / stride), ceil(W / stride))
        if self.index is None:
            after = self.out_channels - self.in_channels - self.before
            return F.pad(x, (0, 0, 0, 0, self.before, after))  # (B, out_channels, ...)
        # One zero channel behind the kept ones, which `index` points at.
        return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)  # (B, kept_out, ...)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut: nn.Module = nn.Sequential() if same else ChannelPadShortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6 n + 2: three stages of n blocks, 16, 32 and 64 channels, each stage half the size.

    Takes images (B, 3, H, W) of any H, W >= 8 and returns logits (B, classes).

    Raises:
        UserError: for a depth that is not 6 n + 2.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth must be 6 n + 2 with n >= 1, but got {depth=}; take 20, 32, 44, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))  # (B, 16, H, W)
        out = self.layer1(out)  # (B, 16, H, W)
        out = self.layer2(out)  # (B, 32, H/2, W/2)
        out = self.layer3(out)  # (B, 64, H/4, W/4)
        out = torch.flatten(self.pool(out), 1)  # (B, 64)
        return self.linear(out)  # (B, classes)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
