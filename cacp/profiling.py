"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Profile:
    """Seconds of named phases; of nested phases, each second counts for the innermost one.

    >>> profile = Profile(clock=iter([0.0, 1.0, 4.0, 10.0]).__next__)
    >>> with profile.phase("search"):
    ...     with profile.phase("scoring"): pass
    >>> profile.seconds
    {'search': 7.0, 'scoring': 3.0}
    """

    def __init__(
        self, synchronise: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start at zero.

        Args:
            synchronise: waits for a device that works on its own, before every look at the clock.
            clock: current time in seconds.
        """
        self.seconds: dict[str, float] = {}
        self._synchronise = synchronise
        self._clock = clock
        self._inner: list[float] = []  # of every open phase: seconds of the phases inside of it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block for `name`."""
        self.seconds.setdefault(name, 0.0)
        self._synchronise()
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._synchronise()
            elapsed = self._clock() - start
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def move(self, name: str, seconds: float) -> None:
        """Count seconds of the open phase for `name` instead: something inside of it took its own time."""
        self._inner[-1] += seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
