"""Spaces: sets of channels that are pruned together; those of tensors that meet are joined (union-find)."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Where the channels of a tensor come from: the spaces in channel order, each channel `repeat` entries wide."""

    spaces: tuple[int, ...]
    repeat: int = 1


class ChannelSpaces:
    """Spaces of a network's tensors, numbered in the order of their making.

    Attributes:
        channels: of every space.
        producer: the module that makes it; empty where there is none.
        fixed: space -> why it stays whole.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.channels: list[int] = []
        self.producer: list[str] = []
        self.fixed: dict[int, str] = {}

    def new(self, channels: int, producer: str, fixed_reason: str = "") -> Layout:
        """The layout of a tensor with channels of its own; a reason fixes them."""
        space = len(self._parent)
        self._parent.append(space)
        self.channels.append(channels)
        self.producer.append(producer)
        if fixed_reason:
            self.fixed[space] = fixed_reason
        return Layout((space,))

    def root(self, space: int) -> int:
        """The space that stands for all that it is joined with."""
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def join(self, first: Layout, second: Layout) -> bool:
        """Make two layouts one; False where their channels do not line up."""
        sizes = [[self.channels[space] for space in layout.spaces] for layout in (first, second)]
        if sizes[0] != sizes[1] or first.repeat != second.repeat:
            return False
        for a, b in zip(first.spaces, second.spaces, strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self._parent[high] = low
        return True

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
