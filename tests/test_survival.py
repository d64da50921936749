"""What a command has done survives: kill -9 at random moments, and a file system that is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cacp import checkpoint
from cacp.checkpoint import load_state, save_state
from cacp.locking import HOLDER

EPISODES = 33
SEARCHES = {
    "cacp": [],
    "cacp on a range": ["--targets=0.35:0.6"],
    "cacp with two costs": ["--macs=0.6", "--params=0.5"],
    "random": ["--agent=random"],
    "cma": ["--agent=cma"],
    "nsga2": ["--agent=nsga2"],
}
KILLS = 4  # of each of them


# a search killed ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_killed_at_random_moments_ends_in_the_same_bits(finished: Path, tmp_path: Path, name: str) -> None:
    arguments = [*TINY, f"--episodes={EPISODES}", f"--weights={finished}", *SEARCHES[name]]
    line = [sys.executable, "tests/killed_search.py", tmp_path, KILLS, name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(list(map(str, line)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    broken = sorted(tmp_path.glob("broken-*"))
    assert len(broken) >= 1
    for folder in broken:
        assert_same_search(tmp_path / "whole", folder)


def begun(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """A search that has imported all and now works on the folder."""
    process = start("search", *arguments, folder)
    deadline = time.monotonic() + 900
    while not (folder / HOLDER).exists() or json.loads((folder / HOLDER).read_text())["pid"] != process.pid:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return process


def assert_same_search(one: Path, other: Path) -> None:
    """All that two searches wrote is equal to the bit, but the time that it took."""
    files = [sorted(path.relative_to(run) for path in run.rglob("*") if kept(path)) for run in (one, other)]
    assert files[0] == files[1] and len(files[0]) > 5
    assert [path for path in files[0] if (one / path).read_bytes() != (other / path).read_bytes()] == []
    assert episodes(one) == episodes(other) and len(episodes(one)) == EPISODES
    ours, theirs = (load_state(run / "search" / "checkpoint") for run in (one, other))
    assert ours is not None and theirs is not None
    assert ours.data == theirs.data and ours.data["episode"] == EPISODES
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [name for name in ours.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])] == []
    assert scalars(one) == scalars(other)


def kept(path: Path) -> bool:
    """Whether two runs of one search must have a file in common, byte for byte."""
    return path.suffix in (".json", ".safetensors", ".csv", ".svg") and path.name not in (
        HOLDER, "environment.json", "episodes.csv", "checkpoint.safetensors", "checkpoint.previous.safetensors",
    )  # fmt: skip


def episodes(folder: Path) -> list[list[str]]:
    lines = (folder / "search" / "episodes.csv").read_text().splitlines()
    seconds = lines[0].split(",").index("seconds")
    return [[cell for column, cell in enumerate(line.split(",")) if column != seconds] for line in lines[1:]]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves without the seconds; every episode must stand there once."""
    events = EventAccumulator(str(folder / "search"))
    events.Reload()
    found = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [step for step, _ in found["search/reward"]] == list(range(1, EPISODES + 1))
    return {tag: values for tag, values in found.items() if tag != "search/seconds"}


# checkpoints killed ---------------------------------------------------------------------------------------------------

SAVES = """
import os, random, select, signal, sys, time, warnings
os.fsync = lambda file: None  # slow, and no matter of a kill
import torch
from cacp.checkpoint import load_state, save_state

warnings.simplefilter("error")  # a torn checkpoint would be one
torch.set_num_threads(1)
save_state(sys.argv[1], {"x": torch.zeros(100_000)}, {"count": 0})
start = time.monotonic()
save_state(sys.argv[1], {"x": torch.zeros(100_000)}, {"count": 0})
seconds = time.monotonic() - start
moments, last = random.Random(0), 0
saved, saves = os.pipe()
for kill in range(25):
    child = os.fork()
    if child == 0:
        while True:
            last += 1
            save_state(sys.argv[1], {"x": torch.full((100_000,), float(last))}, {"count": last})
            os.write(saves, b".")
    os.read(saved, 1)  # at least one save a child, however slow the machine is
    time.sleep(seconds * moments.uniform(0, 3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = load_state(sys.argv[1])
    assert state.data["count"] >= last + 1 and (state.tensors["x"] == state.data["count"]).all(), state.data
    last = state.data["count"]
    while select.select([saved], [], [], 0)[0]:
        os.read(saved, 1)
print(last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_checkpoint_killed_at_random_moments_is_always_whole(tmp_path: Path) -> None:
    line = [sys.executable, "-c", SAVES, str(tmp_path / "run")]
    process = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 25


# a full file system ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_full_disk_at_any_step_of_a_checkpoint_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    save_state(tmp_path, {"x": torch.zeros(3)}, {"count": 1})
    save_state(tmp_path, {"x": torch.ones(3)}, {"count": 2})
    real, calls = getattr(os, step), []

    def full(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, step, full)
        failed = False
        try:
            save_state(tmp_path, {"x": torch.full((3,), 2.0)}, {"count": 3})
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed = True
    assert failed == (len(calls) >= nth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = load_state(tmp_path)
    assert state is not None and state.data["count"] in ((1, 2, 3) if failed else (3,))
    assert torch.equal(state.tensors["x"], torch.full((3,), state.data["count"] - 1.0))
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    save_state(tmp_path, {"x": torch.full((3,), 3.0)}, {"count": 4})
    state = load_state(tmp_path)
    assert state is not None and state.data == {"count": 4}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("no tmpfs may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_search_on_a_full_disk_keeps_its_checkpoint_and_goes_on_when_there_is_space(
    finished: Path, tmp_path: Path, small_disk: Path
) -> None:
    whole, broken = tmp_path / "whole", small_disk / "broken"
    arguments = [*TINY, f"--episodes={EPISODES}", f"--weights={finished}", "--output"]
    run("search", *arguments, whole)
    process = begun(broken, *arguments)
    newest = broken / "search" / "checkpoint" / checkpoint.NEWEST
    while not newest.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, ballast = newest.read_bytes(), small_disk / "ballast"
    fill(ballast, leave=100_000)
    error = run("search", *arguments, broken, status=2)
    assert "No space left on device; free some space, then run the same command again: what is done is kept" in error
    assert newest.read_bytes() == before
    assert [path for path in broken.rglob("*.tmp")] == []
    ballast.unlink()
    assert "going on after episode 10" in run("search", *arguments, broken)
    assert_same_search(whole, broken)


def fill(path: Path, leave: int) -> None:
    """Let a file take all that is free but so many bytes."""
    statistics = os.statvfs(path.parent)
    free = statistics.f_bavail * statistics.f_frsize
    path.write_bytes(bytes(max(free - leave, 0)))
