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

import torch

from cacp.schema import UserError


@contextmanager
def side_by_side(count: int) -> Iterator[Executor]:
    """So many processes for the work that is submitted; its errors come back from `result()`. Whatever they are at,
    they end with the block, and with this process.

    Raises:
        UserError: where one of them was killed.
    """
    context = get_context("spawn")  # a forked process could not use the GPU
    ending, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, _begin, (ending, max(1, torch.get_num_threads() // count)))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a process that worked here was killed, perhaps for want of memory; what is done is kept: "
            "the same command goes on, with fewer processes where memory is short"
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)


def _begin(ending: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_end_with, args=(ending,), daemon=True).start()
    torch.set_num_threads(threads)


def _end_with(ending: Connection) -> None:
    """Nobody writes: the pipe is at its end as soon as the first process closes it, or is killed."""
    ending.poll(None)
    os._exit(0)
