"""The real commands on tiny budgets, as processes or in this one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--config=configs/digits_resnet56.yaml",
    "--model=resnet20",
    "--validation_images=100",
    "--calibration_images=128",
    "--pretrain_epochs=7",
    "--episodes=14",
    "--warmup_episodes=5",
    "--finetune_epochs=1",
    "--forms=python",
]

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(command: str, *arguments: object, file_limit: int | None = None, threads: int = 1) -> subprocess.Popen[str]:
    """Start an entry point; no file it writes may grow beyond `file_limit` bytes, which looks like a full disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    line = [sys.executable, f"{command}.py", *map(str, arguments)]
    if file_limit:
        line = [sys.executable, "-c", LIMITED, str(file_limit), *line]
    return subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(command: str, *arguments: object, status: int = 0, file_limit: int | None = None, threads: int = 1) -> str:
    """Run an entry point as a process; its output, or its error text where it must fail."""
    process = start(command, *arguments, file_limit=file_limit, threads=threads)
    out, err = process.communicate(timeout=900)  # only a guard: a busy machine is ten times as slow
    assert process.returncode == status, out + err
    assert "Traceback" not in err, err
    return out if status == 0 else err


class Call(Protocol):
    def __call__(self, command: str, *arguments: object, status: int = 0) -> str: ...


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "search" / "episodes.csv").open(newline="") as file:
        return list(csv.DictReader(file))
