"""The real commands on tiny budgets: one run from pretraining to fine-tuning, typed again, and killed."""

import csv
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sized
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, Call, rows, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cacp
from benchmarks import fewer_images
from cacp import pipeline
from cacp.checkpoint import save_json
from cacp.config import experiment_from, parse
from cacp.evaluation import resolve_precision
from cacp.experiment import Experiment
from cacp.history import Candidate
from cacp.locking import HOLDER, LOCK
from cacp.models import build_model
from cacp.schema import Budget, Cost, Policy, PolicyRecord, Score, UserError
from finetune import refuse_others
from search import show_doubts


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


TEXTS = ("settings", "groups")


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
    assert {"target macs-0.50/best policy", "search/trade-off"} <= set(images)
    texts = {name: events.Tensors(f"search/{name}/text_summary")[0].tensor_proto.string_val[0] for name in TEXTS}
    assert b"| warmup_episodes | 5 |" in texts["settings"] and b"layer3.2.conv1" in texts["groups"]
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams" and b"criterion" in plugin.content
    assert b"target macs-0.50/best top1" in events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert [event.step for event in events.Scalars("search/reward")] == list(range(1, 15))


def test_result_says_dense_before_after_and_which_epoch(finished: Path) -> None:
    result = json.loads((finished / "finetune" / "macs-0.50" / "result.json").read_text())
    assert set(result["test_top1"]) == {"dense", "before", "after"}
    assert result["test_images"] == 359
    assert result["epochs"] == result["chosen_epoch"] == 1
    assert result["recipe"]["distillation"] == 0.9  # taught by the dense model
    assert result["recipe"]["lr"] == pytest.approx(0.1 * math.sqrt(math.ceil(1238 / 64) / 2000))
    assert result["chosen_because"].startswith("best validation top-1")
    assert result["precision"] == str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    with (finished / "finetune" / "macs-0.50" / "epochs.csv").open(newline="") as file:
        (epoch,) = csv.DictReader(file)
    assert [result[key] for key in ("seconds", "images_per_second")] == pytest.approx(
        [float(epoch[key]) for key in ("seconds", "images_per_second")], rel=1e-3
    )
    assert result["seconds"] * result["images_per_second"] >= 1238


def test_finetuned_model_loads_by_the_folder_alone(finished: Path) -> None:
    model = cacp.load_pruned(finished / "finetune" / "macs-0.50")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not model.training


def test_typed_again_nothing_is_done_again(call: Call, finished: Path) -> None:
    written = {"config.yaml", "environment.json", LOCK, HOLDER}  # by every command
    files = [path for path in finished.rglob("*") if path.is_file() and path.name not in written]
    before = {path: path.stat().st_mtime_ns for path in files}
    for command in ("pretrain", "search", "export"):
        call(command, *TINY, "--output", finished)
    call("finetune", finished)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert len([path for path in finished.rglob("*") if path.is_file()]) == len(before) + len(written)


def test_an_older_export_and_fine_tuning_get_the_forms_they_lack(call: Call, finished: Path, tmp_path: Path) -> None:
    folder, old = tmp_path / "old", tmp_path / "old" / "export" / "macs-0.50"
    shutil.copytree(finished, folder)
    report = json.loads((old / "report.json").read_text())
    older = {key: report[key] for key in report if not key.startswith(("forms", "latency_"))}
    (old / "report.json").write_text(json.dumps({**older, "latency_ms": report["latency_ms"]}))
    (old / "model.py").unlink()
    weights, other = (old / "model.safetensors").stat().st_mtime_ns, folder / "export" / "macs-0.30" / "report.json"
    before = other.stat().st_mtime_ns
    out = call("export", folder)
    assert " ".join(out.split()).count("model.safetensors, architecture.json, model.py, report.json") == 1
    assert (old / "model.safetensors").stat().st_mtime_ns == weights and other.stat().st_mtime_ns == before
    completed = json.loads((old / "report.json").read_text())
    assert completed["forms"]["python"]["file"] == "model.py" and completed.keys() == report.keys()
    assert completed["latency_ms_onnxruntime"] == {"missing": "not among --forms"}
    shutil.copy(folder / "finetune" / "macs-0.30" / "model.py", tmp_path)
    (folder / "finetune" / "macs-0.30" / "model.py").unlink()
    assert "macs-0.30: model.safetensors, architecture.json, model.py, result.json" in " ".join(
        call("finetune", folder).split()
    )
    assert (folder / "finetune" / "macs-0.30" / "model.py").read_text() == (tmp_path / "model.py").read_text()


def test_fine_tunings_of_an_older_version_go_on_or_are_named_at_once(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(finished, folder)
    sources = [folder / "finetune" / name / "source.json" for name in ("macs-0.30", "macs-0.50")]
    for lacking, status in ((("nesterov", "erasing"), 0), (("distillation",), 2)):
        for path in sources:
            source = json.loads(path.read_text())
            path.write_text(json.dumps({key: source[key] for key in source if key not in lacking}))
        out = call("finetune", folder, status=status)
    assert out.count("distillation: 0.0 -> 0.9") == out.count("old/finetune/macs-0.") == 2
    assert "macs-0.70" not in out


def test_a_recipe_may_change_until_an_epoch_is_done(tmp_path: Path) -> None:
    folders, wanted = {"macs-0.50": tmp_path}, {"macs-0.50": {"weights_sha256": "", "batch_size": 64}}
    save_json(tmp_path / "source.json", {"weights_sha256": "", "batch_size": 256})
    refuse_others(folders, wanted)  # it may have run out of memory
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="batch_size: 256 -> 64"):
        refuse_others(folders, wanted)


def test_a_model_that_is_damaged_after_its_command_is_made_again(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    paths = [folder / stage / "macs-0.50" / "model.safetensors" for stage in ("export", "finetune")]
    before = [path.read_bytes() for path in paths]
    for path, content in zip(paths, before, strict=True):
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "not exported yet, or not whole: macs-0.50; run export.py" in call("finetune", folder, status=2)
    assert "macs-0.50: model.safetensors" in " ".join(call("export", folder).split())
    assert paths[0].read_bytes() == before[0]
    call("finetune", folder)
    assert paths[1].read_bytes() == before[1]


@pytest.mark.slow
def test_all_forms_are_written_and_timed_by_export_and_written_by_finetune(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    folder, name = tmp_path / "all", "macs-0.50"
    call("prune", *TINY, f"--weights={finished}", "--targets=0.5", "--output", folder)
    forms = ["--forms", "python", "onnx", "pt2"]
    assert "model.py, model.onnx, model.pt2, report.json" in " ".join(call("export", folder, *forms).split())
    report = json.loads((folder / "export" / name / "report.json").read_text())
    for key in ("latency_ms", "latency_ms_onnxruntime"):
        assert [list(times) for times in report[key].values()] == [["dense", "pruned"]] * 2
    assert "exported" not in call("export", folder, *forms).partition("milliseconds")[0].replace("exported models", "")
    assert "model.py, model.onnx, model.pt2, result.json" in " ".join(call("finetune", folder, *forms).split())
    result = json.loads((folder / "finetune" / name / "result.json").read_text())
    assert [record["file"] for record in result["forms"].values()] == ["model.py", "model.onnx", "model.pt2"]


def test_the_agent_answers_a_target_it_never_saw(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(finished, folder)
    dense = json.loads((folder / "export" / "macs-0.50" / "report.json").read_text())["dense"]["macs"]
    known = [(int(row["macs"]), float(row["probability"])) for row in rows(folder)]
    for target in (0.45, 0.85):
        out = call("search", "--ask", target, "--output", folder)
        path = folder / "policies" / f"macs-{target:.2f}.json"
        record = PolicyRecord.from_json(json.loads(path.read_text()))
        assert f"macs-{target}" in out and target - 0.005 <= record.score.cost.macs / dense <= target
        assert ("outside the targets that the search was trained for, 0.3 to 0.7" in out) == (target == 0.85)
        asked = (record.search_score.cost.macs, record.search_score.probability)
        better = [score for macs, score in known if macs <= asked[0] and score > asked[1]]
        assert ("scored higher with less" in out) == bool(better)
        with (folder / "search" / "tradeoff.csv").open(newline="") as file:
            front = [(int(row["macs"]), float(row["probability"])) for row in csv.DictReader(file)]
        known.append(asked)
        beaten = {one for one in known for other in known if one != other and other[0] <= one[0] and other[1] >= one[1]}
        assert front == sorted(set(known) - beaten)
    assert "no policy meets macs 0.05 (reachable: " in call("search", "--ask=0.05", "--output", folder, status=2)
    assert not (folder / "policies" / "macs-0.05.json").exists()


@pytest.mark.parametrize(("episode", "text"), [(7, "episode 7"), (0, "another planned policy")])
def test_a_better_and_cheaper_policy_than_the_asked_one_is_named(
    episode: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = Cost(1000, 1000)
    better, asked = (Score(0.8, 0.5, probability, Cost(macs, 400)) for probability, macs in ((0.7, 430), (0.6, 450)))
    record = PolicyRecord(
        Policy({"conv": (0,)}, "l1"), Budget({"macs": 0.45}), asked, asked, method="search cacp", episode=0
    )
    front = [Candidate((1,), better, episode)]
    show_doubts(Experiment(output=str(tmp_path), targets=[0.3, 0.7]), record, front, dense)
    assert f"note: {text} scored higher with less, macs 0.430" in " ".join(capsys.readouterr().out.split())


def test_what_was_never_searched_by_cacp_cannot_be_asked(call: Call, finished: Path, tmp_path: Path) -> None:
    call("prune", *TINY, f"--weights={finished}", "--targets=0.5", "--output", tmp_path)
    err = call("search", "--ask=0.45", "--output", tmp_path, status=2)
    assert "holds no finished search by --agent cacp" in err and "delete" not in err


def test_a_range_of_targets_gives_a_policy_for_every_tenth_and_a_tradeoff_curve(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "range"
    arguments = [*TINY, "--targets=0.35:0.6", f"--weights={finished}", "--output", folder]
    assert not re.search("search [0-9]+/14 (,|best top-1: ,)", call("search", *arguments))  # a target met or none
    targets = [float(row["target"]) for row in rows(folder)]
    assert len(set(targets)) == 14 and 0.35 <= min(targets) < max(targets) <= 0.6
    names = sorted(path.stem for path in (folder / "policies").glob("*.json"))
    assert names == ["macs-0.35", "macs-0.40", "macs-0.50", "macs-0.60"]
    with (folder / "search" / "tradeoff.csv").open(newline="") as file:
        front = list(csv.DictReader(file))
    kept, probabilities = ([float(row[column]) for row in front] for column in ("macs_kept", "probability"))
    assert kept == sorted(set(kept)) and len(kept) > 1
    assert probabilities == sorted(set(probabilities))
    macs = [int(row["macs"]) for row in front]
    for path in (folder / "policies").glob("*.json"):  # planned after the episodes, and on the curve or under it
        policy = json.loads(path.read_text())
        within = [best for best, cost in zip(probabilities, macs, strict=True) if cost <= policy["cost"]["macs"]]
        assert max(within) >= policy["search_score"]["probability"]
    assert "<svg" in (folder / "search" / "tradeoff.svg").read_text()
    assert "goes on" not in call("search", *arguments)  # done already


def test_killed_search_goes_on_to_the_same_end(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    weights = f"--weights={finished}"
    run("pretrain", *TINY, weights, "--output", folder)
    process = start("search", *TINY, weights, "--output", folder)
    deadline = time.monotonic() + 900
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


def rows_written(folder: Path) -> int:
    """Bytes of the epochs of a run's fine-tunings."""
    return sum(path.stat().st_size for path in (folder / "finetune").glob("*/epochs.csv"))


def test_models_side_by_side_are_those_in_turn(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "side_by_side"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("finetune", "search"))
    out = run("finetune", folder, "--finetune_at_once=2")
    for name in ("macs-0.30", "macs-0.50", "macs-0.70"):
        assert f"finetune {name} 1/1 loss" in out
        weights = [(run / "finetune" / name / "model.safetensors").read_bytes() for run in (finished, folder)]
        assert weights[0] == weights[1]


def test_an_error_of_one_model_is_the_message_of_all(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("finetune", "search"))
    checkpoint = folder / "finetune" / "macs-0.50" / "checkpoint"
    shutil.copytree(finished / "finetune" / "macs-0.50" / "checkpoint", checkpoint)
    told = run("finetune", folder, "--epochs=2", "--finetune_at_once=3", status=2)
    assert told.startswith("error: the checkpoint in ") and "epochs (checkpoint 1, now 2)" in told
    assert told.count("error:") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (4, 2)])
def test_fine_tuning_killed_again_and_again_ends_with_the_same_weights(
    finished: Path, tmp_path: Path, threads: int, at_once: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("finetune", "search"))
    arguments = ["--epochs=6", f"--finetune_at_once={at_once}"]
    run("finetune", whole, *arguments, threads=threads)
    moments = random.Random(0)
    for _ in range(5):
        before = rows_written(broken)
        process = start("finetune", broken, *arguments, threads=threads)
        while rows_written(broken) <= before:  # at least an epoch each, however slow the machine is
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run("finetune", broken, *arguments, threads=threads)
    for name in ("macs-0.30", "macs-0.50", "macs-0.70"):
        weights = [(folder / "finetune" / name / "model.safetensors").read_bytes() for folder in (whole, broken)]
        assert weights[0] == weights[1]
        results = [json.loads((folder / "finetune" / name / "result.json").read_text()) for folder in (whole, broken)]
        assert results[0]["test_top1"] == results[1]["test_top1"]
        assert results[0]["epochs"] == results[1]["epochs"] == 6


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


def test_a_budget_of_several_costs_from_search_to_export(call: Call, finished: Path, tmp_path: Path) -> None:
    folder, name = tmp_path / "several", "macs-0.60_params-0.50"
    assert "uniform params" in call(
        "search", *TINY, "--macs=0.6", "--params=0.5", f"--weights={finished}", "--output", folder
    )
    assert [path.stem for path in (folder / "policies").iterdir()] == [name]
    assert {float(row["target"]) for row in rows(folder)} == {0.55}
    call("export", folder)
    report = json.loads((folder / "export" / name / "report.json").read_text())
    kept = {cost: report["pruned"][cost] / report["dense"][cost] for cost in ("macs", "params")}
    assert kept["macs"] <= 0.6 and kept["params"] <= 0.5
    assert kept["macs"] >= 0.595 or kept["params"] >= 0.495
    assert "alone; search --targets to ask" in call("search", "--ask=0.45", "--output", folder, status=2)


@pytest.mark.parametrize("method", ["uniform", "taylor", "sensitivity"])
def test_methods_meet_a_budget_of_params(call: Call, finished: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / method
    call("prune", *TINY, f"--weights={finished}", f"--method={method}", "--params=0.4", "--output", folder)
    record = PolicyRecord.from_json(json.loads((folder / "policies" / "params-0.40.json").read_text()))
    assert 0.395 <= record.score.cost.params / build_params("resnet20") <= 0.4


def build_params(model: str) -> int:
    return sum(parameter.numel() for parameter in build_model(model, 10).parameters())


def test_flags_of_one_kind_of_budget_replace_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def budgets(*words: str, text: str = "") -> list[str]:
        (tmp_path / "own.yaml").write_text(f"episodes: 900\n{text}\n")
        words = ("--config", str(tmp_path / "own.yaml"), "--output=x", *words)
        return [budget.name for budget in experiment_from(parse("search", "", words)).budgets]

    assert budgets() == ["macs-0.30", "macs-0.50", "macs-0.70"]
    assert budgets("--params=0.6") == ["params-0.60"]
    assert budgets("--macs=0.5", text="targets: [0.3, 0.4]") == ["macs-0.50"]
    assert budgets(text="macs: 0.5\nparams: 0.6") == ["macs-0.50_params-0.60"]
    assert budgets("--macs=0.4", text="macs: 0.5\nparams: 0.6") == ["macs-0.40"]  # left out: no constraint
    assert budgets("--targets", "0.4", text="macs: 0.5\nparams: 0.6") == ["macs-0.40"]
    with pytest.raises(UserError, match="exclude each other"):
        budgets(text="targets: [0.3]\nmacs: 0.5")
