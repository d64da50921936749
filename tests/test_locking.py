"""One command at a time writes to a run folder; who only reads is let in, and a killed process holds nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, TINY, Call

import cacp
from cacp.locking import HOLDER, LOCK, is_fresh, only_writer
from cacp.schema import UserError

HOLD = """
import sys, time
from pathlib import Path
from cacp.locking import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_is_at_work_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    (folder / ".result.json.12.34.tmp").write_text("half")  # what a write leaves that is killed
    (folder / ".mine.tmp").write_text("keep")
    with pytest.raises(UserError) as caught, only_writer(folder):
        pass
    assert f"{folder} is in use by process {process.pid} on " in str(caught.value)
    assert str(caught.value).endswith(f": -c {folder}; wait until it ends, or use another --output")
    assert (folder / ".result.json.12.34.tmp").exists()  # it may be the holder's
    process.send_signal(signal.SIGKILL)
    process.wait()
    with only_writer(folder):
        assert json.loads((folder / HOLDER).read_text())["pid"] == os.getpid()
    assert sorted(path.name for path in folder.iterdir()) == sorted([LOCK, HOLDER, ".mine.tmp"])


def test_the_page_that_a_report_is_writing_is_left_alone(tmp_path: Path) -> None:
    page, half = tmp_path / "report" / ".index.html.12.34.tmp", tmp_path / "dense" / ".result.json.12.34.tmp"
    for path in (page, half):
        path.parent.mkdir()
        path.write_text("half")
    with only_writer(tmp_path):
        assert page.exists() and not half.exists()


def test_a_writer_lets_go_however_it_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), only_writer(tmp_path):
        raise RuntimeError
    with only_writer(tmp_path), pytest.raises(UserError, match="is in use"), only_writer(tmp_path):
        pass
    (tmp_path / HOLDER).write_text("torn")
    with only_writer(tmp_path / "other"):  # another folder is another run
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        for text in ("torn", "[]", '{"pid": 1, "host": "here", "command": 3}'):
            (tmp_path / HOLDER).write_text(text)
            with pytest.raises(UserError, match="is in use by another process; wait"), only_writer(tmp_path):
                pass


def test_what_a_command_leaves_that_is_killed_at_once_is_no_other_folder(tmp_path: Path) -> None:
    assert is_fresh(tmp_path)
    with only_writer(tmp_path):
        (tmp_path / ".config.yaml.12.34.tmp").write_text("half")
        assert is_fresh(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert not is_fresh(tmp_path)


def test_every_command_that_writes_is_refused_and_those_that_read_are_not(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with only_writer(finished), only_writer(other):
        for command in ("pretrain", "search", "prune"):
            assert "is in use by process" in call(command, *TINY, "--output", finished, status=2)
        assert "is in use by process" in call("search", "--ask=0.45", "--output", finished, status=2)
        assert "is in use by process" in call("prune", *TINY, "--output", other, status=2)
        assert not (other / "config.yaml").exists()
        call("search", "--ask=0.5", "--output", finished)  # answered before
        call("export", finished)
        call("finetune", finished)
        call("search", "--print_config", "--output", finished)
        assert cacp.load_pruned(finished / "finetune" / "macs-0.50") is not None
        call("pretrain", *TINY, f"--weights={finished}", "--output", tmp_path / "taken")  # reads another run's
        for command in ("finetune", "export"):
            moved = (finished / command).rename(tmp_path / command)
            assert "is in use by process" in call(command, finished, status=2)
            assert not (finished / command).exists()
            moved.rename(finished / command)
