"""Signals, really sent: to this process, to a forked one, and to a search."""

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from running import ROOT, TINY, rows, start

from cacp.checkpoint import load_state
from cacp.command import run_command
from cacp.interrupts import Interrupted, finishing_first, interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_one_ends(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with finishing_first("episode") as request:
        assert request.number == 0
        os.kill(os.getpid(), number)
        assert request.number == number and "ending after this episode; once more" in capfd.readouterr().err
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.number == number
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    noted: list[int] = []
    former = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with finishing_first("episode") as request:
            noted.append(request.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [0] and signal.getsignal(signal.SIGTERM) == former


def test_a_forked_process_dies_of_the_signal() -> None:
    with interruptible():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_says_how_to_go_on(
    number: int, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", "runs/a b", "--epochs", "3"])
    typed = ModuleSpec("benchmarks.recovery", None)
    for module, line in ((None, "finetune.py"), (typed, "-m benchmarks.recovery")):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", module)
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: os.kill(os.getpid(), number))
        assert ended.value.code == status
        told = capsys.readouterr().err
        assert told == f"interrupted; the same command goes on: python {line} 'runs/a b' --epochs 3\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        run_command(lambda: os.kill(os.getpid(), number))
    assert capsys.readouterr().err == ""  # one message of all processes


def test_a_warning_is_one_line() -> None:
    code = "import warnings; from cacp.command import run_command; run_command(lambda: warnings.warn('a damaged file'))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert (ended.returncode, ended.stderr) == (0, "warning: a damaged file\n")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_search_ends_its_episode_saves_it_and_says_how_to_go_on(
    finished: Path, tmp_path: Path, number: int, status: int
) -> None:
    folder = tmp_path / "run"
    words = ["search", *TINY, f"--weights={finished}", "--episodes=500", "--output", folder]
    process = start(*words)
    while not (folder / "search" / "episodes.csv").exists() or len(rows(folder)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    err = process.communicate(timeout=600)[1]
    played = len(rows(folder))
    assert process.returncode == status and "Traceback" not in err
    assert "ending after this episode" in err
    assert f"stopped after episode {played} of 500, all saved; the same command goes on: python search.py" in err
    saved = load_state(folder / "search" / "checkpoint")
    assert saved is not None and saved.data["episode"] == played < 500
