"""Two processes give one process's result at the same total batch, to rounding (gloo on the CPU), broken off or not."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, run
from torch import Tensor

from cacp.checkpoint import load_json
from cacp.experiment import Experiment
from cacp.parallel import following_processes
from cacp.pipeline import select_device
from cacp.schema import UserError
from finetune import check_machine


def torchrun(*arguments: object, modules: Path = ROOT, fails: bool = False) -> str:
    """Two processes of a command that finds modules of the user's own in a folder; its output, or its error text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(modules)}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)]
    process = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (process.returncode != 0) == fails, process.stdout + process.stderr
    return process.stderr if fails else process.stdout


def test_training_and_methods_that_train(tmp_path: Path) -> None:
    script = ROOT / "tests" / "trained_in_parallel.py"
    subprocess.run([sys.executable, script, tmp_path / "one.pt"], check=True, timeout=600)
    torchrun(script, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys() and len(one) > 300
    assert [name for name in one if difference(one[name], two[name]) > 1e-6] == []
    assert sum(len(one[name]) for name in one if name.startswith("caie kept")) < 448 - 100  # of all channels


def difference(one: Tensor, two: Tensor) -> float:
    """Largest difference in parts of the largest value; the labels' loss is computed in float32."""
    if one.shape != two.shape:
        return float("inf")
    return float((one.double() - two.double()).abs().max() / one.double().abs().max().clamp_min(1e-3))


def test_a_process_without_a_gpu_of_its_own_is_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="each process has a GPU of its own; use --device cuda, but got cuda:0"):
        select_device("cuda:0")
    with pytest.raises(UserError, match="train one model together; leave out --finetune_at_once"):
        check_machine(Experiment(output="x", device="cpu", finetune_at_once=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refusal = pytest.raises(UserError, match="more processes than there are GPUs; use --nproc_per_node 1")
    with refusal, following_processes():
        pass


IDLE = """
import torch
from torch import nn

def network(classes):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, classes))
    model.spare = nn.Parameter(torch.zeros(1))
    return model
"""


def error_in_training(folder: Path, source: str) -> str:
    """What is told when a network of the user's own is trained."""
    (folder / "own.py").write_text(source)
    words = ("pretrain.py", *TINY, "--model=own:network", "--output", folder / "run")
    return torchrun(*words, modules=folder, fails=True)


def test_what_all_processes_refuse_the_first_one_alone_tells(tmp_path: Path) -> None:
    error = error_in_training(tmp_path, IDLE)
    assert error.count("every parameter must take part in the loss, but spare do not; set their requires_grad") == 1
    assert "[rank1]" not in error


KILLED = """
import os
import signal
from torch import nn

class Killed(nn.Sequential):
    def forward(self, images):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

def network(classes):
    return Killed(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                  nn.Linear(8, classes))
"""


def test_the_first_process_tells_of_another_one_that_was_killed(tmp_path: Path) -> None:
    error = error_in_training(tmp_path, KILLED)
    assert error.count("error: a process that trained with this one was killed, perhaps for want of memory;") == 1
    assert "[rank0]" not in error


@pytest.mark.slow
def test_commands_under_torchrun(tmp_path: Path) -> None:
    single, several = tmp_path / "one", tmp_path / "two"
    settings = [*TINY, "--precision=fp32", "--pretrain_lr=0.02"]
    run("pretrain", *settings, "--output", single)
    out = torchrun("pretrain.py", *settings, "--output", several)
    assert out.count("validation images, in") == 1  # the first process alone speaks
    losses = []
    for folder in (single, several):
        with (folder / "dense" / "epochs.csv").open(newline="") as file:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    torchrun("prune.py", *settings, "--method=caie", "--macs=0.5", "--channels_per_step=100", "--output", several)
    run("export", several)
    torchrun("finetune.py", several)
    result = load_json(several / "finetune" / "macs-0.50" / "result.json")
    assert result["test_top1"]["after"] > 0.4  # of ten classes, after one epoch
    assert torchrun("finetune.py", "nowhere", fails=True).count("nowhere holds no run") == 1
