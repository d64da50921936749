"""The real commands on tiny budgets: one run from pretraining to fine-tuning, typed again, killed, and misused."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sized
from pathlib import Path
from typing import Protocol

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cacp
from benchmarks import fewer_images
from cacp import pipeline
from cacp.checkpoint import save_tensors
from cacp.config import experiment_from, parse
from cacp.models import build_model
from cacp.pipeline import run_command
from cacp.schema import PolicyRecord, UserError

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
]

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(command: str, *arguments: object, file_limit: int | None = None) -> subprocess.Popen[str]:
    """Start an entry point; no file it writes may grow beyond `file_limit` bytes, which looks like a full disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    line = [sys.executable, f"{command}.py", *map(str, arguments)]
    if file_limit:
        line = [sys.executable, "-c", LIMITED, str(file_limit), *line]
    return subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(command: str, *arguments: object, status: int = 0, file_limit: int | None = None) -> str:
    """Run an entry point as a process; its output, or its error text where it must fail."""
    process = start(command, *arguments, file_limit=file_limit)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    assert "Traceback" not in err, err
    return out if status == 0 else err


class Call(Protocol):
    def __call__(self, command: str, *arguments: object, status: int = 0) -> str: ...


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Like `run`, in this process: the imports of an entry point take seconds."""

    def called(command: str, *arguments: object, status: int = 0) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
        ended = 0
        try:
            run_command(importlib.import_module(command).main)
        except SystemExit as exit_:
            ended = exit_.code
        out, err = capsys.readouterr()
        assert ended == status, out + err
        return out if status == 0 else err

    return called


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after all four commands."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for command in ("pretrain", "search", "export"):
        run(command, *TINY, "--output", folder)
    run("finetune", folder)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "search" / "episodes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_policy_meets_its_budget(finished: Path) -> None:
    for name, target in (("macs-0.30", 0.3), ("macs-0.50", 0.5), ("macs-0.70", 0.7)):
        record = PolicyRecord.from_json(json.loads((finished / "policies" / f"{name}.json").read_text()))
        report = json.loads((finished / "export" / name / "report.json").read_text())
        assert target - 0.005 <= record.score.cost.macs / report["dense"]["macs"] <= target
        assert report["pruned"]["counted_macs"] == record.score.cost.macs
        assert report["score_at_export"]["top1"] == pytest.approx(report["score_at_search"]["top1"], abs=0.005)


def test_episodes_are_round_robin_and_all_there(finished: Path) -> None:
    targets = [float(row["target"]) for row in rows(finished)]
    assert targets == ([0.3, 0.5, 0.7] * 5)[:14]


def test_tensorboard_holds_what_one_wants_to_watch(finished: Path) -> None:
    events = EventAccumulator(str(finished / "search"))
    events.Reload()
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    wanted = {"target macs-0.50/top1", "target macs-0.50/best top1", "target macs-0.50/macs", "search/reward"}
    wanted |= {
        "agent/noise",
        "agent/actor_loss",
        "agent/critic_loss",
        "agent/expected_return",
        "keep target macs-0.30/layer1.0.conv1",
    }
    assert wanted <= set(scalars)
    assert "target macs-0.50/best policy" in images
    assert [event.step for event in events.Scalars("search/reward")] == list(range(1, 15))


def test_result_says_dense_before_after_and_which_epoch(finished: Path) -> None:
    result = json.loads((finished / "finetune" / "macs-0.50" / "result.json").read_text())
    assert set(result["test_top1"]) == {"dense", "before", "after"}
    assert result["test_images"] == 359
    assert result["epochs"] == result["chosen_epoch"] == 1
    assert result["chosen_because"].startswith("best validation top-1")


def test_finetuned_model_loads_by_the_folder_alone(finished: Path) -> None:
    model = cacp.load_pruned(finished / "finetune" / "macs-0.50")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not model.training


def test_typed_again_nothing_is_done_again(call: Call, finished: Path) -> None:
    files = [
        path for path in finished.rglob("*") if path.is_file() and path.name not in ("config.yaml", "environment.json")
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    for command in ("pretrain", "search", "export"):
        call(command, *TINY, "--output", finished)
    call("finetune", finished)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert len([path for path in finished.rglob("*") if path.is_file()]) == len(before) + 2


def test_the_agent_answers_a_target_it_never_saw(call: Call, finished: Path) -> None:
    out = call("search", "--ask", 0.45, "--output", finished)
    assert "macs-0.45" in out
    path = finished / "policies" / "macs-0.45.json"
    record = PolicyRecord.from_json(json.loads(path.read_text()))
    dense = json.loads((finished / "export" / "macs-0.50" / "report.json").read_text())["dense"]["macs"]
    assert 0.445 <= record.score.cost.macs / dense <= 0.45
    path.unlink()


def test_a_range_of_targets_gives_a_policy_for_every_tenth_and_a_tradeoff_curve(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "range"
    arguments = [*TINY, "--targets=0.35:0.6", f"--weights={finished}", "--output", folder]
    call("search", *arguments)
    targets = [float(row["target"]) for row in rows(folder)]
    assert len(set(targets)) == 14 and 0.35 <= min(targets) < max(targets) <= 0.6
    names = sorted(path.stem for path in (folder / "policies").glob("*.json"))
    assert names == ["macs-0.35", "macs-0.40", "macs-0.50", "macs-0.60"]
    with (folder / "search" / "tradeoff.csv").open(newline="") as file:
        front = list(csv.DictReader(file))
    kept, probabilities = ([float(row[column]) for row in front] for column in ("macs_kept", "probability"))
    assert kept == sorted(set(kept)) and len(kept) > 1
    assert probabilities == sorted(set(probabilities))
    assert "<svg" in (folder / "search" / "tradeoff.svg").read_text()
    assert "goes on" not in call("search", *arguments)  # done already


def test_killed_search_goes_on_to_the_same_end(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    weights = f"--weights={finished}"
    run("pretrain", *TINY, weights, "--output", folder)
    process = start("search", *TINY, weights, "--output", folder)
    deadline = time.monotonic() + 200
    while not (folder / "search" / "checkpoint" / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "policies").exists()
    assert "going on after episode 10" in run("search", *TINY, weights, "--output", folder)
    without_time = [{key: row[key] for key in row if key != "seconds"} for row in rows(folder)]
    assert without_time == [{key: row[key] for key in row if key != "seconds"} for row in rows(finished)]
    for name in ("macs-0.30", "macs-0.50", "macs-0.70"):
        assert (folder / "policies" / f"{name}.json").read_text() == (
            finished / "policies" / f"{name}.json"
        ).read_text()


@pytest.mark.parametrize("method", ["uniform", "taylor"])
def test_prune_writes_policies_that_export_takes(call: Call, finished: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / method
    call("prune", *TINY, f"--weights={finished}", "--method", method, "--targets", 0.5, "--output", folder)
    assert "macs-0.50" in call("export", folder)
    report = json.loads((folder / "export" / "macs-0.50" / "report.json").read_text())
    assert report["policy"]["method"] == method
    assert 0.495 <= report["pruned"]["macs"] / report["dense"]["macs"] <= 0.5
    assert json.loads((folder / "dense" / "result.json").read_text())["validation_unseen"] is True


def test_a_search_scores_with_few_calibration_images_and_the_best_again_with_all(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    counts: list[int] = []

    def noted(model: object, groups: object, validation: object, calibration: Sized, *others: object) -> None:
        counts.append(len(calibration))

    monkeypatch.setattr(pipeline, "PolicyScorer", noted)
    words = [*TINY, "--output", str(finished), "--search_calibration_images"]
    for few in (64, 500):  # there are 128
        pipeline.build_workbench(experiment_from(parse("search", "", [*words, str(few)])))
    assert counts == [64, 128, 128, 128]


def test_answers_on_images_are_those_that_scored_the_search(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fewer_images, "BATCHES", (1,))
    answers = fewer_images.collected(fewer_images.experiment_of(finished), 3)
    assert answers.targets.tolist() == [float(row["target"]) for row in rows(finished)]
    assert answers.right.mean(1) == pytest.approx([float(row["top1"]) for row in rows(finished)], abs=0.02)
    assert answers.right.shape == (14, 100) and answers.spread.tolist() == [0, 1, 2]
    assert answers.right_by_batches[1] == pytest.approx(answers.right[:3])  # its 128 images are one batch


def test_random_search_runs_by_the_same_command(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    command = ["search", *TINY, f"--weights={finished}", "--agent=random", "--episodes=3", "--output", folder]
    shown = call(*command, "--profile")
    for phase in ("preparation", "slicing", "recalibration", "evaluation", "records", "scoring again"):
        assert re.search(rf"│ {phase} +│ +\d+\.\d\d │", shown), phase
    assert float(re.search(r"│ agent's updates +│ +(\S+) │", shown)[1]) == 0  # there is nothing to learn
    assert json.loads((folder / "search" / "profile.json").read_text())["records"] > 0
    assert "where the time went" not in call(*command)
    record = json.loads((folder / "policies" / "macs-0.70.json").read_text())
    assert record["method"] == "search random"


def test_a_folder_of_another_run_is_refused(call: Call, finished: Path, tmp_path: Path) -> None:
    error = call("search", *TINY, "--episodes=15", "--output", finished, status=2)
    assert "episodes: 14 -> 15" in error
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no run" in call("search", *TINY, "--output", tmp_path, status=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "epochs: 1 -> 2" in call("finetune", finished, "--epochs=2", status=2)


OWN = """
from torch import nn

def block(inputs, outputs, **more):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, **more), nn.BatchNorm2d(outputs), nn.ReLU()]

def build(classes):
    layers = [*block(3, 16), *block(16, 16, stride=2, groups=4), *block(16, 32, stride=2), *block(32, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))
"""


def test_a_network_of_ones_own_from_training_to_fine_tuning(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_entry.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = [*TINY, "--model=own_entry:build", "--channel_multiple=4", "--ignore", "9", "--min_keep=0.2", "--targets=0.5"]
    folder = tmp_path / "run"
    for command in ("pretrain", "prune", "export"):
        call(command, *own, "--output", folder)
    call("finetune", folder)
    architecture = json.loads((folder / "finetune" / "macs-0.50" / "architecture.json").read_text())
    assert architecture["model"] == "own_entry:build"
    counts = architecture["keep_counts"]
    assert set(counts) == {"0", "6"} and all(count % 4 == 0 for count in counts.values())
    assert architecture["cost"]["macs"] <= 0.5 * architecture["dense_cost"]["macs"]
    with pytest.raises(UserError, match="own_entry:build, and nothing that a file names is imported"):
        cacp.load_pruned(folder / "finetune" / "macs-0.50")
    model = cacp.load_pruned(folder / "finetune" / "macs-0.50", lambda: sys.modules["own_entry"].build(10))
    assert [model[3].groups, model[3].in_channels, model[9].out_channels] == [counts["0"] // 4, counts["0"], 32]
    refused = call("prune", *own[:-1], "--targets=0.5", "--ignore", "0", "--output", folder, status=2)
    assert "ignore: ['9'] -> ['0']" in refused


def test_settings_that_a_run_of_an_older_version_does_not_name_had_their_default(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / "config.yaml").read_text().splitlines()
    older = [line for line in lines if not line.startswith(("ignore", "min_keep", "channel_multiple"))]
    assert len(older) == len(lines) - 3
    (folder / "config.yaml").write_text("\n".join(older))
    call("export", folder)
    assert "channel_multiple: 1 -> 8" in call("export", folder, "--channel_multiple=8", status=2)


def test_a_pattern_that_matches_nothing_ends_before_training(call: Call, tmp_path: Path) -> None:
    error = call("pretrain", *TINY, "--ignore", "layer1.0.conf1", "--output", tmp_path / "run", status=2)
    assert "matches 'layer1.0.conf1'; near: layer1.0.conv1" in error
    assert not (tmp_path / "run" / "dense").exists()


def test_a_method_and_a_search_do_not_share_a_folder(call: Call, finished: Path) -> None:
    assert "holds policies of search cacp" in call("prune", *TINY, "--output", finished, status=2)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("search", ["--output=x", "--model=resnet57"], ["model must be one of resnet20", "'resnet57'"]),
        ("search", ["--output=x", "--model=my_net.build"], ["package.module:function", "'my_net.build'"]),
        ("search", ["--output=x", "--min_keep=0"], ["min_keep must be above 0, but got 0.0"]),
        ("search", ["--output=x", "--channel_multiple=0"], ["channel_multiple must be above 0, but got 0"]),
        ("search", ["--output=x", "--dataset=cifar11"], ["dataset must be one of digits", "'cifar11'"]),
        ("search", ["--output=x", "--criterion=l3"], ["criterion must be one of l1", "'l3'"]),
        ("search", ["--output=x", "--targets", "0.5", "1.5"], ["targets must be kept fractions in (0, 1]", "1.5"]),
        ("search", ["--output=x", "--targets", "nan"], ["targets", "nan"]),
        ("search", ["--output=x", "--targets", "0.3:half"], ["targets", "0.3:half"]),
        ("search", ["--output=x", "--targets", "0.6:0.4"], ["a range of targets must be", "'0.6:0.4'"]),
        ("search", ["--output=x", "--targets", "0.3:0.6", "0.7"], ["or one range like 0.3:0.8, not both", "0.3:0.6"]),
        ("search", ["--output=x", "--targets=0.3:0.6", "--agent=cma"], ["agent cma takes a list of targets"]),
        ("search", ["--output=x", "--mean", "125", "123", "114", "--std", "58", "57", "57"], ["mean must be three"]),
        ("search", ["--output=x", "--colour=red"], ["colour"]),
        ("search", ["--output=x", "--episodes=many"], ["episodes", "many"]),
        ("search", [], ["no run folder: give --output"]),
        ("search", ["--output=x", "--device=cuda:7"], ["device cuda:7 is not there", "--device cpu"]),
        ("search", ["--output=x", "--device=tpu"], ["device must be auto, cpu, cuda or cuda:N", "'tpu'"]),
        ("search", ["--output=x", "--device=cpu:"], ["device must be auto, cpu, cuda or cuda:N", "'cpu:'"]),
        ("search", ["--output=x", "--seed=99999999999"], ["seed must be at most 4294967295"]),
        ("search", ["--output=x", "--targets", "0.5", "0.501"], ["targets must lie at least 0.01 apart"]),
        ("search", ["--output=x", "--episodes=2"], ["episodes must be at least one a target (3), but got 2"]),
        ("search", ["--output=x", "--episodes=15"], ["warmup_episodes must be below episodes (15)", "got 15"]),
        ("search", ["--output=x", "--episode=5"], ["--episode=5"]),
        ("search", ["--config=nowhere.yaml"], ["nowhere.yaml"]),
        ("pretrain", ["--output=LICENSE"], ["LICENSE is a file"]),
        ("pretrain", ["--output=LICENSE/x"], ["LICENSE/x"]),
        ("export", ["nowhere"], ["nowhere holds no run"]),
        ("finetune", ["nowhere"], ["nowhere holds no run"]),
    ],
)
def test_bad_settings_end_in_one_message(call: Call, command: str, arguments: list[str], words: list[str]) -> None:
    error = call(command, *arguments, status=2)
    assert all(word in error for word in words), error
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["must hold lines like `episodes: 900`"]),
        ("targets: 0.5", ["targets must be a list", "got 0.5"]),
        ("targets: '0.3:0.8'", ["targets must be a list", "'0.3:0.8'"]),
        ("ignore: layer1.*", ["ignore must be a list like [layer1.*], but got 'layer1.*'"]),
        ("seed: null", ["seed must have a value"]),
        ("colour: red", ["colour"]),
        ("model: [", ["mine.yaml cannot be read"]),
    ],
)
def test_bad_config_files_end_in_one_message(call: Call, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    error = call("search", f"--config={tmp_path / 'mine.yaml'}", "--output", tmp_path / "run", status=2)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_other_images_than_the_dense_model_was_made_with_are_refused(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    result = json.loads((finished / "dense" / "result.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "dense" / "result.json").write_text(json.dumps({**result, "split_sha256": "0" * 64}))
    shutil.rmtree(copy / "export")
    assert "are not those that" in call("export", copy, status=2)
    other_split = tmp_path / "other"
    call("pretrain", *TINY, f"--weights={finished}", "--seed=1", "--output", other_split)
    assert json.loads((other_split / "dense" / "result.json").read_text())["validation_unseen"] is False


def test_a_missing_policy_or_export_is_named(call: Call, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "export" / "macs-0.50")
    assert "not exported yet: macs-0.50" in call("finetune", copy, status=2)
    (copy / "policies" / "macs-0.70.json").unlink()
    assert "no policy yet for macs-0.70" in call("export", copy, status=2)
    call("search", *TINY, "--output", copy)
    assert (copy / "policies" / "macs-0.70.json").read_bytes() == (
        finished / "policies" / "macs-0.70.json"
    ).read_bytes()


def test_settings_of_the_run_hold_wherever_its_name_stands(call: Call, finished: Path) -> None:
    assert "epochs: 1 -> 3" in call("finetune", "--epochs=3", finished, status=2)
    assert "seed: 0 -> 1" in call("finetune", finished, "--seed=1", status=2)
    assert "criterion: 'l1' -> 'l2'" in call("search", "--ask=0.45", "--criterion=l2", "--output", finished, status=2)
    assert "scope: 'inner' -> 'all'" in call("export", finished, "--scope=all", status=2)


def test_an_unreachable_target_is_refused_with_the_range(call: Call, finished: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"--weights={finished}", "--targets", "0.05", "--output", tmp_path / "low"]
    error = call("search", *arguments, status=2)
    assert "macs 0.05 (reachable: 0.1" in error
    assert not (tmp_path / "low" / "policies").exists()


def test_wrong_weights_are_named(call: Call, finished: Path, tmp_path: Path) -> None:
    dense = finished / "dense" / "model.safetensors"
    normal = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    other = ["--output", tmp_path / "other"]
    assert "there is no gone.pt" in call("pretrain", *TINY, "--weights=gone.pt", *other, status=2)
    assert "give --mean and --std" in call("pretrain", *TINY, f"--weights={dense}", *other, status=2)
    deeper = call("pretrain", *TINY, "--model=resnet32", f"--weights={dense}", *normal, *other, status=2)
    assert "layer1.3.conv1.weight" in deeper and "layer3.4.bn2.weight" in deeper
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(dense.read_bytes()[:1000])
    assert "torn.safetensors" in call("pretrain", *TINY, f"--weights={torn}", *normal, *other, status=2)
    assert not (tmp_path / "other" / "dense").exists()


def test_a_model_at_chance_is_refused(call: Call, tmp_path: Path) -> None:
    weights = tmp_path / "untrained.safetensors"
    save_tensors(weights, build_model("resnet20", 10, seed=0).state_dict())
    normal = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    error = call("pretrain", *TINY, f"--weights={weights}", *normal, "--output", tmp_path / "run", status=2)
    assert "normalisation" in error and "order of the classes" in error
    assert not (tmp_path / "run" / "dense").exists()


def test_a_full_disk_ends_in_one_message_and_leaves_no_torn_file(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    error = run("pretrain", *TINY, f"--weights={finished}", "--output", folder, status=2, file_limit=100_000)
    assert "File too large; free some space, then run the same command again" in error
    assert list((folder / "dense").iterdir()) == []
    run("pretrain", *TINY, f"--weights={finished}", "--output", folder)
    assert (folder / "dense" / "result.json").is_file()
    error = run("search", *TINY, f"--weights={finished}", "--output", folder, status=2, file_limit=10_000)
    assert "free some space" in error
    assert not (folder / "policies").exists()
    assert not (folder / "search" / "checkpoint" / "checkpoint.safetensors").exists()


def test_offline_cifar10_says_all_that_is_missing(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    config, data = "--config=configs/cifar10_resnet56.yaml", tmp_path / "data"
    error = call("pretrain", config, "--data_dir", data, "--output", tmp_path / "run", status=2)
    assert str(data / "cifar-10-batches-py") in error
    assert str(data / "weights" / "resnet56-4bfd9763.th") in error
    assert "digits" in error


def test_a_diverged_training_names_the_epoch(call: Call, tmp_path: Path) -> None:
    error = call("pretrain", *TINY, "--pretrain_lr=1e30", "--output", tmp_path / "run", status=2)
    assert "epoch 1" in error
    assert not (tmp_path / "run" / "dense" / "model.safetensors").exists()


def test_a_run_from_before_a_setting_goes_on(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(finished, folder)
    config = folder / "config.yaml"
    assert "search_calibration_images: null\n" in config.read_text()
    config.write_text(config.read_text().replace("search_calibration_images: null\n", ""))
    assert "macs-0.30" in call("search", *TINY, "--output", folder)
    assert "search_calibration_images: None -> 64" in call(
        "search", *TINY, "--search_calibration_images=64", "--output", folder, status=2
    )
