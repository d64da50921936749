"""Spaces: sets of channels that are pruned together; those of tensors that meet are joined (union-find)."""

from __future__ import annotations

import math
from typing import NamedTuple


class Layout(NamedTuple):
    """Where the channels of a tensor come from: the spaces in channel order, each channel `repeat` entries wide, along
    the tensor's dimension `axis`."""

    spaces: tuple[int, ...]
    repeat: int = 1
    axis: int = 1


class ChannelSpaces:
    """Spaces of a network's tensors, numbered in the order of their making.

    Attributes:
        channels: of every space.
        producer: the module that makes it; empty where there is none.
        fixed: space -> why it stays whole.
        block: of every space, how many channels in a row stay or go together.
        streams: spaces that were joined by more than a product: residual streams.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.channels: list[int] = []
        self.producer: list[str] = []
        self.fixed: dict[int, str] = {}
        self.block: list[int] = []
        self.streams: set[int] = set()

    def new(self, channels: int, producer: str, fixed_reason: str = "") -> Layout:
        """The layout of a tensor with channels of its own; a reason fixes them."""
        space = len(self._parent)
        self._parent.append(space)
        self.channels.append(channels)
        self.producer.append(producer)
        self.block.append(1)
        if fixed_reason:
            self.fixed[space] = fixed_reason
        return Layout((space,))

    def root(self, space: int) -> int:
        """The space that stands for all that it is joined with."""
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def join(self, first: Layout, second: Layout, product: bool = False) -> bool:
        """Make two layouts one; False where their channels do not line up.

        Args:
            first: the one.
            second: the other.
            product: whether one only scales the other, as the gate of a squeeze-and-excitation does.
        """
        sizes = [[self.channels[space] for space in layout.spaces] for layout in (first, second)]
        if sizes[0] != sizes[1] or first[1:] != second[1:]:
            return False
        for a, b in zip(first.spaces, second.spaces, strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            if low != high and not product:
                self.streams.add(low)
            self._parent[high] = low
        return True

    def grouped(self, layout: Layout, inputs: int, outputs: int) -> Layout | None:
        """The layout behind a convolution whose groups read `inputs` entries each and make `outputs`: the channels of
        one group stay or go together. None where groups and channels do not line up.
        """
        repeat, rest = divmod(layout.repeat * outputs, inputs)
        block = max(1, inputs // layout.repeat)
        uneven = max(inputs, layout.repeat) % min(inputs, layout.repeat)
        if rest or uneven or any(self.channels[space] % block for space in layout.spaces):
            return None
        for space in layout.spaces:
            self.block[space] = math.lcm(self.block[space], block)
        return layout._replace(repeat=repeat)

    def fix(self, layout: Layout, reason: str) -> None:
        """Keep its channels whole; the first reason stays."""
        for space in layout.spaces:
            self.fixed.setdefault(space, reason)

    def width(self, layout: Layout) -> int:
        """Entries of a tensor's channel axis."""
        return layout.repeat * sum(self.channels[space] for space in layout.spaces)

    def joined(self) -> dict[int, list[int]]:
        """Root -> all spaces that are one with it, in their order."""
        members: dict[int, list[int]] = {}
        for space in range(len(self._parent)):
            members.setdefault(self.root(space), []).append(space)
        return members
