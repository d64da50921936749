"""prune.py as it is typed: methods that train, quantiles, single weights, a method of one's own."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, Call

import cacp
from cacp.checkpoint import load_json, load_tensors, save_tensors
from cacp.config import experiment_from, parse
from cacp.experiment import Experiment
from cacp.methods import make_method


@pytest.fixture
def prune(call: Call, finished: Path) -> Call:
    """prune.py on the dense model of the finished run."""
    return lambda command, *rest, status=0: call(command, *TINY, "--weights", finished, *rest, status=status)


CAIE = ["--method=caie", "--macs=0.5", "--params=0.4", "--channels_per_step=100", "--batches_per_step=1"]


def test_caie_meets_two_targets_and_is_exported_with_its_weights(prune: Call, call: Call, tmp_path: Path) -> None:
    folder, name = tmp_path / "run", "macs-0.50_params-0.40"
    prune("prune", *CAIE, "--output", folder)
    record = load_json(folder / "policies" / f"{name}.json")
    assert record["scope"] == "all" and record["criterion"] == "taylor" and record["details"]["steps"] >= 2
    assert record["keep_counts"]["conv1"] < 16  # a residual stream
    call("export", folder)
    report = load_json(folder / "export" / name / "report.json")
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["pruned"]["params"] <= 0.4 * report["dense"]["params"]
    trained = load_tensors(folder / "policies" / f"{name}.safetensors")
    dense = load_tensors(folder / "dense" / "model.safetensors")
    assert not torch.equal(trained["conv1.weight"], dense["conv1.weight"])
    exported = cacp.load_pruned(folder / "export" / name).state_dict()
    kept = record["keep"]["conv1"]
    inside = record["keep"]["layer2.0.conv1"]
    assert torch.equal(
        exported["layer2.0.conv1.weight"], trained["layer2.0.conv1.weight"][inside][:, kept]
    )  # unrepaired


def test_weights_that_are_not_the_policys_are_refused(prune: Call, call: Call, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prune("prune", *CAIE, "--output", folder)
    path = next((folder / "policies").glob("*.safetensors"))
    save_tensors(path, load_tensors(finished / "dense" / "model.safetensors"))
    assert "not the file of its policy" in call("export", folder, status=2)
    path.unlink()
    assert "is missing or not the file of its policy" in call("export", folder, status=2)


def test_a_sweep_over_quantiles_and_its_plots(prune: Call, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--method=gfi_ap", "--sweep=0.2:0.4:0.1", "--output", folder]
    out = prune("prune", *arguments)
    with (folder / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["quantile"] for row in rows] == ["0.2", "0.3", "0.4"]
    assert all(row["policy"] in out for row in rows)
    macs = [float(row["macs"]) for row in rows]
    thresholds = [float(row["threshold"]) for row in rows]
    assert macs == sorted(macs, reverse=True) and thresholds == sorted(thresholds)
    for row in rows:
        record = load_json(folder / "policies" / f"{row['policy']}.json")
        details = {key: record["details"][key] for key in ("quantile", "threshold")}
        assert details == {"quantile": float(row["quantile"]), "threshold": float(row["threshold"])}
        assert 0 <= record["budget"]["macs"] - float(row["macs"]) < 1e-4
    assert points(folder) == [3, 3, 3, 3, 0, 3]  # nothing is fine-tuned yet
    written = (folder / "policies" / f"{rows[0]['policy']}.json").stat().st_mtime_ns
    prune("prune", *arguments)
    assert (folder / "policies" / f"{rows[0]['policy']}.json").stat().st_mtime_ns == written
    call("export", folder)
    call("finetune", folder)
    assert points(folder) == [3] * 6


def points(folder: Path) -> list[int]:
    """Points of each of the six plots."""
    text = (folder / "sweep" / "sweep.svg").read_text()
    names = ["threshold on the importance", "MACs kept", "parameters kept", "top-1 before fine-tuning",
             "top-1 after fine-tuning", "seconds"]  # fmt: skip
    lines = [text.partition(f'<g id="{name}">')[2].partition('<g id="patch')[0] for name in names]
    return [line.count("<use") for line in lines]


def test_magnitude_writes_weights_and_export_refuses_them(prune: Call, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--method=magnitude", "--targets", "0.3", "0.5", "--output", folder]
    out = prune("prune", *arguments)
    assert "single weights zero" in " ".join(out.split())
    for name, part in (("macs-0.30", 0.7), ("macs-0.50", 0.5)):
        result = load_json(folder / "unstructured" / name / "result.json")
        assert result["sparsity"] == pytest.approx(part, abs=1e-3)
        weights = load_tensors(folder / "unstructured" / name / "model.safetensors")
        assert float((weights["layer1.0.conv1.weight"] == 0).float().mean()) == pytest.approx(part, abs=1e-3)
    assert prune("prune", *arguments) == out.split("\n", 1)[1]  # all is there: no line about the dense model
    assert "no channel falls, so there is nothing to slice" in call("export", folder, status=2)


def test_readmes_method_runs_from_pruning_to_export(
    prune: Call, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Add a method")[2]
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(example.splitlines()) <= 25
    (tmp_path / "my_method.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    folder = tmp_path / "run"
    prune("prune", "--method=my_method:slimming", "--macs=0.5", "--output", folder)
    call("export", folder)
    report = load_json(folder / "export" / "macs-0.50" / "report.json")
    assert 0.49 <= report["pruned"]["macs"] / report["dense"]["macs"] <= 0.5
    assert report["policy"]["method"] == "my_method:slimming" and report["policy"]["criterion"] == "slimming"
    (tmp_path / "my_method.py").write_text("def slimming(subject, budget):\n    return 3\n")
    monkeypatch.delitem(sys.modules, "my_method")
    error = prune("prune", "--method=my_method:slimming", "--macs=0.5", "--output", tmp_path / "other", status=2)
    assert "my_method:slimming must return cacp.methods.Pruned, but got int" in error
    error = prune("prune", "--method=my_method:slim", "--macs=0.5", "--output", tmp_path / "third", status=2)
    assert "must have a function slim(subject, budget), but has slimming" in error


def test_what_a_method_of_ones_own_must_not_return(
    prune: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_methods.py").write_text(
        "from cacp.methods import Pruned\n"
        "from cacp.schema import Policy\n"
        "def everything(subject, budget):\n"
        "    return Pruned(Policy({g.name: tuple(range(g.channels)) for g in subject.groups.prunable}, 'none'))\n"
        "def nothing(subject, budget):\n"
        "    return Pruned(None)\n"
        "def half(subject, budget):\n"
        "    return Pruned(Policy({}, 'none'))\n"
        "def weights(subject, budget):\n"
        "    policy = Policy({g.name: (0, 1) for g in subject.groups.prunable}, 'none')\n"
        "    return Pruned(policy, {'conv1.weight': subject.model.conv1.weight})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, words in {
        "everything": "returned a policy that costs macs 40551040, params 269722, above macs-0.50",
        "nothing": "returned no policy",
        "half": "layer1.0.conv1: missing",
        "weights": "must be a state dict of the dense network",
    }.items():
        error = prune("prune", f"--method=wrong_methods:{name}", "--macs=0.5", "--output", tmp_path / name, status=2)
        assert words in error, error
        assert not (tmp_path / name / "policies").exists()


def test_quantiles_of_one_policy_share_it(prune: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prune("prune", "--method=gfi_ap", "--quantile", "0.3", "0.3001", "--output", folder)
    with (folder / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["quantile"] for row in rows] == ["0.3", "0.3001"] and rows[0]["policy"] == rows[1]["policy"]
    assert len(list((folder / "policies").iterdir())) == 1


def test_a_sweep_ends_at_high() -> None:
    def quantiles(text: str) -> list[float]:
        settings = ["--config", str(ROOT / "configs/digits_resnet56.yaml"), "--method=gfi_ap", f"--sweep={text}"]
        return experiment_from(parse("prune", "", settings)).quantile_list

    assert quantiles("0.3:0.7:0.1") == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert quantiles("0.3:0.68:0.1") == [0.3, 0.4, 0.5, 0.6]
    assert quantiles("0.5:0.96:0.1") == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_flags_replace_what_a_preset_says_of_another_method_and_budget() -> None:
    preset = ["--config", str(ROOT / "configs/cifar10_resnet56_caie.yaml")]

    def experiment(command: str, *flags: str) -> Experiment:
        return experiment_from(parse(command, "", [*preset, *flags]))

    assert experiment("prune").method_options["channels_per_step"] == 25
    assert experiment("prune", "--method=caie").method_options["channels_per_step"] == 25
    other = experiment("prune", "--method=sfp", "--epochs=3")
    assert other.method_options == {"method_epochs": 3, "method_lr": None, "method_schedule": None}
    assert other.budgets[0].targets == {"macs": 0.5, "params": 0.6}
    assert experiment("prune", "--macs=0.4").budgets[0].targets == {"macs": 0.4}
    searched = experiment("search")
    assert (searched.method, searched.pruned_scope, searched.macs) == ("uniform", "inner", 0.5)


@pytest.mark.parametrize("name", ["cifar10_resnet56_caie", "cifar10_resnet32_gfi_ap", "digits_resnet56"])
def test_printed_settings_can_be_read_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(ROOT / "configs" / f"{name}.yaml")
    with pytest.raises(SystemExit):
        parse("prune", "", ["--config", preset, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = experiment_from(parse("prune", "", ["--config", str(tmp_path / "printed.yaml"), "--output", "x"]))
    first = experiment_from(parse("prune", "", ["--config", preset, "--output", "x"]))
    assert again == first


def test_a_killed_method_goes_on(prune: Call, tmp_path: Path) -> None:
    """A run whose policy was not written yet goes on from the method's checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ["--method=sfp", "--macs=0.5", "--epochs=2"]
    prune("prune", *arguments, "--output", whole)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "policies")
    prune("prune", *arguments, "--output", broken)
    files = [folder / "policies" / "macs-0.50.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len((broken / "method" / "macs-0.50" / "epochs.csv").read_text().splitlines()) == 3
    assert json.loads((broken / "policies" / "macs-0.50.json").read_text())["method"] == "sfp"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_understood_and_says_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and (path.stem in first or "search_export.sh" in first)
    for command in ("search", "prune", "finetune"):
        experiment = experiment_from(parse(command, "", ["--config", str(path)], run_argument=command == "finetune"))
        assert experiment.output == f"runs/{path.stem}"
    make_method(experiment.method, experiment.method_options)
