"""How a command ends: its exit status, and the one message that says why and what to do."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from cacp.interrupts import Interrupted, interruptible
from cacp.parallel import following_processes, launched
from cacp.schema import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(main: Callable[[], None]) -> None:
    """Run an entry point: a mistake of the user's or a full disk ends in one message and exit status 2, Ctrl-C and
    SIGTERM in the command that goes on and 128 + the signal's number. Warnings are one line each.

    Of the processes that torchrun starts the first one runs it, the others train with it (`cacp.parallel`).
    """
    threading.excepthook = _quiet_about_files
    warnings.formatwarning = _one_line
    try:
        with interruptible(), following_processes() as first:
            if first:
                main()
    except UserError as error:
        sys.exit(_failed(str(error)))
    except Interrupted as error:
        again = f": {shlex.join(_line())}" if launched() == 1 else ""
        sys.exit(_failed(f"{error}; the same command goes on{again}", status=128 + error.number))
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "lower --batch_size, --validation_images or --finetune_at_once, or use --device cpu"
        sys.exit(_failed(f"out of memory: {error}; {remedy}"))
    except OSError as error:
        place, reason = error.filename or "a file of the run", error.strerror or str(error)
        remedy = "free some space" if error.errno in _FULL else "choose another path (--output, --data_dir, --weights)"
        sys.exit(_failed(f"{place}: {reason}; {remedy}, then run the same command again: what is done is kept"))


def _line() -> list[str]:
    """The command as it was typed: of a file, or of a module (python -m)."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", *([sys.argv[0]] if module is None else ["-m", module.name]), *sys.argv[1:]]


def _one_line(message: Warning | str, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning without the line of code that gave it."""
    return f"warning: {message}\n"


def _quiet_about_files(arguments: threading.ExceptHookArgs) -> None:
    """A full disk stops TensorBoard's writer thread first; the main thread meets the same error and reports it."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def _failed(message: str, status: int = 2) -> int:
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun has started only the first one speaks
        sys.stderr.write(f"{'' if status > 128 else 'error: '}{message}\n")
    return status
