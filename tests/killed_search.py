"""A search once whole, and again and again killed at random moments, typed again after each.

python tests/killed_search.py FOLDER KILLS SEED SEARCH'S ARGUMENTS

Writes FOLDER/whole, and FOLDER/broken-N for every one that was killed and came to its end. Each search is a process of
its own, forked from this one, so that the imports take their time once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import search
from cacp.command import run_command


def main() -> None:
    torch.set_num_threads(1)
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    start = time.monotonic()
    finish(begin(folder / "whole"))
    seconds, moments, ended = time.monotonic() - start, random.Random(seed), 0
    while kills:
        child = begin(folder / f"broken-{ended}")
        if killed(child, moments.uniform(0, seconds)):
            kills -= 1
        else:
            ended += 1  # it was faster than the next kill
    finish(begin(folder / f"broken-{ended}"))


def begin(folder: Path) -> int:
    """Start a search; its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sys.argv = ["search.py", *sys.argv[4:], "--output", str(folder)]
        run_command(search.main)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def killed(child: int, after_seconds: float) -> bool:
    """Kill a search after some time; False if it had ended by then, as it should."""
    deadline = time.monotonic() + after_seconds
    while time.monotonic() < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            assert status == 0, f"a search ended with {status}"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def finish(child: int) -> None:
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"a search ended with {status}"


if __name__ == "__main__":
    main()
