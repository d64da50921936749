"""One command at a time writes to a run folder; a second one is told who is at work.

The lock is the operating system's (package filelock), so it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cacp.checkpoint import TEMPORARY, load_json, save_json
from cacp.schema import UserError

LOCK = ".lock"
HOLDER = ".lock.json"  # who holds it; a file of its own, since a locked one cannot be read everywhere
PAGES = "report"  # where report.py writes, at any time: it reads while others write, and holds nothing


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is created where it does not exist; whoever only reads needs no lock.

    What killed commands left half written is cleared away.

    Raises:
        UserError: if another process holds it, with its number and its command; or on a file system without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_holder(folder)}; wait until it ends, or use another --output"
        ) from error
    except NotImplementedError as error:
        raise UserError(f"{folder} is on a file system without locks ({error}); use another --output") from error
    try:
        save_json(folder / HOLDER, {"pid": os.getpid(), "host": platform.node(), "command": sys.argv})
        _clear(folder)
        yield
    finally:
        lock.release()


def is_fresh(folder: Path) -> bool:
    """Whether a folder holds nothing but what a command leaves behind that was killed as it began."""
    return all(path.name in (LOCK, HOLDER) or _is_temporary(path) for path in folder.iterdir())


def _holder(folder: Path) -> str:
    try:
        found = load_json(folder / HOLDER, {"pid": int, "host": str, "command": [str]})
        return f"process {found['pid']} on {found['host']}: {' '.join(found['command'])}"
    except UserError:  # it has not written the file yet
        return "another process"


def _clear(folder: Path) -> None:
    """Delete the temporary files of processes that were killed: nobody else writes here now, but a report's page."""
    for path in folder.rglob(".*.tmp"):
        if _is_temporary(path) and path.parent != folder / PAGES:
            path.unlink()


def _is_temporary(path: Path) -> bool:
    return re.fullmatch(TEMPORARY, path.name) is not None and path.is_file()
