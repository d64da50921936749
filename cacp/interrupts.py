"""Ctrl-C and SIGTERM: what is under way may end first, and the command says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the command; the message says what was saved."""

    def __init__(self, message: str = "interrupted", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Request:
    """Whether the user wants the work to end: `number` is the signal, 0 for none."""

    number = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Both signals raise `Interrupted`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number=number)

    with _handling(end):
        yield


@contextmanager
def finishing_first(step: str) -> Iterator[Request]:
    """The first signal is only noted, and the user told that the `step` under way ends first; the next one raises."""
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        if request.number:
            raise Interrupted(number=number)
        request.number = number
        # No print: the signal may have come in the middle of one.
        os.write(2, f"\nending after this {step}; once more to stop at once\n".encode())

    with _handling(note):
        yield request


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    """Handle the signals in this process; a process that is forked from it dies of them as ever."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles none
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
