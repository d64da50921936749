"""`--latency 0.7` with the real commands: a table in the run folder, policies, export, page, and what is refused."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, Call, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAME = "macs-0.80_latency-0.70"
ASKED = [*TINY, "--scope=all", "--latency_batch=8"]


def latency_kept(folder: Path, name: str) -> float:
    cost = json.loads((folder / "policies" / f"{name}.json").read_text())["cost"]
    return cost["latency_ps"] / json.loads((folder / "latency.json").read_text())["dense_ps"]


@pytest.fixture(scope="module")
def searched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search for macs 0.8 and latency 0.7, by a table that the real clock has made."""
    folder = tmp_path_factory.mktemp("latency") / "tiny"
    arguments = [*ASKED, "--macs=0.8", "--latency=0.7", f"--weights={finished}", f"--output={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["search.py", *arguments])
        patch.setattr("cacp.latency.SECONDS", 0.0)  # as few repeats as it takes
        importlib.import_module("search").main()
    return folder


def copied(searched: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(searched, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_a_search_meets_macs_and_latency(searched: Path) -> None:
    table = json.loads((searched / "latency.json").read_text())
    assert (table["threads"], table["batch"], table["torch"]) == (1, 8, torch.__version__)
    assert table["largest_error"] == max(abs(one["predicted"] - one["measured"]) for one in table["checked"])
    played = rows(searched)
    assert len(played) == 14
    for row in played:
        macs, latency = int(row["macs"]) / 40551040, float(row["latency_ps"]) / table["dense_ps"]
        assert macs <= 0.8 and latency <= 0.7
    assert max(float(row["latency_ps"]) for row in played) / table["dense_ps"] >= 0.695
    assert latency_kept(searched, NAME) <= 0.7
    events = EventAccumulator(str(searched / "search"))
    events.Reload()
    shown = [event.value for event in events.Scalars(f"target {NAME}/latency_ms")]
    assert shown == pytest.approx([float(row["latency_ps"]) / 1e9 for row in played])


def test_a_search_goes_on_with_its_table_to_the_same_bits(call: Call, searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path / "broken", "policies", "checkpoint.safetensors")
    out = call("search", "--output", folder)
    assert "going on after episode 10 of 14" in out and "timing" not in out
    for one, other in zip(rows(searched), rows(folder), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}
    assert (folder / "policies" / f"{NAME}.json").read_bytes() == (searched / "policies" / f"{NAME}.json").read_bytes()


def test_a_search_without_its_table_or_on_another_device_is_refused(call: Call, searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path / "broken", "policies", "checkpoint.safetensors")
    path = folder / "latency.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "threads": 64}))
    assert "with 64 threads" in call("search", "--output", folder, status=2)
    path.unlink()
    err = call("search", "--output", folder, status=2)
    assert "latency.json is missing" in err and "search/checkpoint" in err


@pytest.mark.slow
def test_export_and_page_say_what_was_asked_predicted_and_measured(call: Call, searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path / "elsewhere")
    table = json.loads((folder / "latency.json").read_text())
    (folder / "latency.json").write_text(json.dumps({**table, "device": "another"}))  # export takes it all the same
    out = call("export", folder)
    assert "latency in PyTorch that was asked for" in out
    report = json.loads((folder / "export" / NAME / "report.json").read_text())
    said, ms = report["latency_target"], report["latency_ms"]["batch 8"]
    assert (said["target"], said["batch"]) == (0.7, 8) and said["table"].startswith("another, 1 threads")
    assert said["predicted"] == pytest.approx(latency_kept(folder, NAME))
    assert said["measured"] == ms["pruned"]["median"] / ms["dense"]["median"]
    assert list(report["latency_ms"]) == ["batch 1", "batch 8", "batch 64"]
    architecture = json.loads((folder / "export" / NAME / "architecture.json").read_text())
    assert list(architecture["cost"]) == ["macs", "params"]  # a latency is of a device
    call("report", folder)
    page = (folder / "report" / "index.html").read_text()
    assert f"{100 * said['predicted']:.2f} % of the latency by the table" in page


def test_a_method_prunes_to_a_latency_by_the_same_table(call: Call, searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path / "uniform", "policies", "search")
    out = call("prune", "--latency=0.7", "--method=uniform", "--output", folder)
    assert "latency-0.70" in out and "timing" not in out
    assert 0.695 <= latency_kept(folder, "latency-0.70") <= 0.7


def test_a_latency_out_of_reach_is_refused_before_training(call: Call, tmp_path: Path) -> None:
    err = call("pretrain", *ASKED, "--latency=0.01", "--output", tmp_path / "run", status=2)
    assert "no policy meets latency 0.01 (reachable: 0." in err
    assert (tmp_path / "run" / "latency.json").is_file()  # measured once
    assert not (tmp_path / "run" / "dense").exists()


def test_without_a_latency_target_nothing_is_measured_or_added(finished: Path) -> None:
    assert not (finished / "latency.json").exists()
    with (finished / "search" / "episodes.csv").open(newline="") as file:
        assert "latency_ps" not in next(csv.reader(file))
    policy = json.loads((finished / "policies" / "macs-0.50.json").read_text())
    assert list(policy["cost"]) == ["macs", "params"]
    report = json.loads((finished / "export" / "macs-0.50" / "report.json").read_text())
    assert "latency_target" not in report and list(report["pruned"])[:2] == ["macs", "params"]
