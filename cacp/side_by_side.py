"""Pieces of work side by side, each in a process with its share of the CPU's threads."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue

import torch

from cacp.schema import UserError

_count, _place = 1, 0


def beside() -> int:
    """How many processes work side by side, this one included; 1 elsewhere."""
    return _count


def place() -> int:
    """The number of this one among them, from 0; 0 elsewhere."""
    return _place


@contextmanager
def side_by_side(count: int) -> Iterator[Executor]:
    """So many processes for the work that is submitted; its errors come back from `result()`. Whatever they are at,
    they end with the block, and with this process.

    Raises:
        UserError: where one of them was killed.
    """
    context = get_context("spawn")  # a forked process could not use the GPU
    ending, held = context.Pipe(duplex=False)
    places = context.SimpleQueue()
    for number in range(count):
        places.put(number)
    threads = max(1, torch.get_num_threads() // count)
    pool = ProcessPoolExecutor(count, context, _begin, (ending, places, count, threads))
    try:
        _start(pool, count)
        yield pool
        pool.shutdown()  # all is done: they end by themselves
    except BrokenProcessPool as error:
        raise UserError(
            "a process that worked here was killed, perhaps for want of memory; what is done is kept, and the same "
            "command goes on: with fewer side by side where memory is short (other threads may round differently)"
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)


def _start(pool: Executor, count: int) -> None:
    """Start the processes, deaf to Ctrl-C, which reaches all: the first process ends the others."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(count):  # a pool starts one when it is given work and none is idle
            pool.submit(beside)
    finally:
        signal.signal(signal.SIGINT, former)


def _begin(ending: Connection, places: SimpleQueue[int], count: int, threads: int) -> None:
    global _count, _place
    _count, _place = count, places.get()
    threading.Thread(target=_end_with, args=(ending,), daemon=True).start()
    torch.set_num_threads(threads)


def _end_with(ending: Connection) -> None:
    """Nobody writes: the pipe is at its end as soon as the first process closes it, or is killed."""
    ending.poll(None)
    os._exit(0)
