"""Processes side by side: their errors come back, and none outlives the block or the process that wanted it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ROOT

from cacp.pipeline import select_device
from cacp.schema import UserError
from cacp.side_by_side import place, side_by_side

FIRST_PROCESS = """
import sys
from cacp.side_by_side import side_by_side
from test_side_by_side import say_who_and_sleep
if __name__ == "__main__":
    with side_by_side(2) as pool:
        for name in sys.argv[1:]:
            pool.submit(say_who_and_sleep, name)
        input()
"""


def say_who_and_sleep(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}\n")
    time.sleep(900)


def threads() -> int:
    return torch.get_num_threads()


def who_hears_ctrl_c(folder: Path, count: int) -> tuple[int, bool]:
    """This process's place, and whether it would end with Ctrl-C; answers once `count` processes are asked."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)
    return place(), signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def refuse() -> None:
    raise UserError("not here")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def running(path: Path) -> bool:
    """Whether the process that a file names runs; one whose parent has not asked how it ended does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{int(path.read_text())}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 900
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_are_shared_and_errors_come_back() -> None:
    torch.set_num_threads(6)
    try:
        with pytest.raises(UserError, match="not here"), side_by_side(2) as pool:
            assert pool.submit(threads).result() == 3
            pool.submit(refuse).result()
    finally:
        torch.set_num_threads(1)


def test_each_has_a_place_and_ctrl_c_is_for_the_first_process_alone(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may be deaf from its start
    try:
        with side_by_side(3) as pool:
            asked = [pool.submit(who_hears_ctrl_c, tmp_path, 3) for _ in range(3)]
            answers = sorted(one.result(timeout=900) for one in asked)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)
    assert answers == [(0, False), (1, False), (2, False)]


def test_processes_side_by_side_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(select_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    monkeypatch.setattr("cacp.side_by_side._count", 3)
    for number, gpu in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setattr("cacp.side_by_side._place", number)
        assert [str(select_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [gpu, gpu, "cuda:1", "cpu"]


def test_a_killed_process_is_told_of() -> None:
    with pytest.raises(UserError, match="was killed, perhaps for want of memory"), side_by_side(1) as pool:
        pool.submit(die).result()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what runs")
def test_no_process_outlives_the_block(tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    with pytest.raises(KeyboardInterrupt), side_by_side(1) as pool:  # one more waits, and never begins
        for path in (busy, tmp_path / "second", tmp_path / "third", tmp_path / "fourth"):
            pool.submit(say_who_and_sleep, str(path))
        wait_for(busy)
        raise KeyboardInterrupt
    assert not running(busy)
    assert not (tmp_path / "fourth").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what runs")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_first_one(tmp_path: Path, number: int) -> None:
    (tmp_path / "first.py").write_text(FIRST_PROCESS)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    files = [tmp_path / "one", tmp_path / "two"]
    first = subprocess.Popen(
        [sys.executable, "first.py", *map(str, files)], cwd=tmp_path, stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    for file in files:
        wait_for(file)
    assert all(map(running, files))
    first.send_signal(number)
    first.communicate()
    deadline = time.monotonic() + 60
    while any(map(running, files)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
