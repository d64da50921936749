"""The real commands misused: every mistake ends in one message that names the remedy."""

import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from running import ROOT, TINY, Call, run

from cacp.checkpoint import save_tensors
from cacp.models import build_model


@pytest.mark.parametrize(
    ("command", "own", "others"),
    [("search", "--warmup_episodes N", "--method NAME"), ("prune", "--method NAME", "--warmup_episodes N")],
)
def test_help_shows_commands_defaults_and_own_settings_first(
    call: Call, command: str, own: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = call(command, "--help")
    assert f"\n    python {command}.py --config configs/digits_resnet56.yaml" in out
    before, after = out.split("settings of the other stages:")
    assert own in before and own not in after and others in after and others not in before
    text = " ".join(out.split())
    assert "policies to score, all targets together; search, and prune --method sensitivity (default: 900)" in text
    assert "--calibration_images N training images for repair and batch norm (default: 1024)" in text
    assert "--seed N of everything random (default: 0)" in text
    assert not [word for word in (" null", "type:", "default: []", "default: )") if word in text]


@pytest.mark.parametrize("command", ["export", "finetune"])
def test_help_of_export_and_finetune_shows_the_forms_first(
    call: Call, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    own = call(command, "--help").partition(f"settings of {command}:")[2].partition("settings of the other stages:")[0]
    assert "--forms FORM [FORM ...]" in own
    assert "beside safetensors, of python, onnx, pt2; default: all --" in f"{' '.join(own.split())} --"


def test_a_folder_of_another_run_is_refused(call: Call, finished: Path, tmp_path: Path) -> None:
    error = call("search", *TINY, "--episodes=15", "--output", finished, status=2)
    assert "episodes: 14 -> 15" in error
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no run" in call("search", *TINY, "--output", tmp_path, status=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "epochs: 1 -> 2" in call("finetune", finished, "--epochs=2", status=2)


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
        ("search", ["--output=x", "--finetune_at_once=0"], ["finetune_at_once must be above 0, but got 0"]),
        (
            "export",
            ["--output=x", "--forms", "onnx", "tflite"],
            ["forms must be of python, onnx, pt2, but got 'tflite'"],
        ),
        ("search", ["--output=x", "--dataset=cifar11"], ["dataset must be one of digits", "'cifar11'"]),
        ("search", ["--output=x", "--criterion=l3"], ["criterion must be one of l1", "'l3'"]),
        ("search", ["--output=x", "--targets", "0.5", "1.5"], ["targets must be kept fractions in (0, 1]", "1.5"]),
        ("search", ["--output=x", "--targets", "nan"], ["targets", "nan"]),
        (
            "search",
            ["--output=x", "--targets=0.5", "--macs=0.5"],
            ["targets, and macs, params or latency, exclude each other"],
        ),
        ("prune", ["--output=x", "--params=1.5"], ["params must be a kept fraction in (0, 1]", "1.5"]),
        ("prune", ["--output=x", "--macs=1", "--params=1"], ["keeps all prunes nothing"]),
        (
            "prune",
            ["--output=x", "--method=fgpm"],
            ["method must be one of uniform", "'fgpm'"],
        ),
        (
            "prune",
            ["--output=x", "--method=taylor", "--epochs=3"],
            ["method_epochs (--epochs) is an option"],
        ),
        ("prune", ["--output=x", "--method=sfp", "--scope=all"], ["scope of sfp must be inner, but got 'all'"]),
        (
            "prune",
            ["--output=x", "--method=gfi_ap", "--method_lr=0.1"],
            ["method_lr of gfi_ap is that of"],
        ),
        ("prune", ["--output=x", "--method=magnitude", "--ignore=conv1"], ["ignore is for channels, and magnitude"]),
        ("prune", ["--output=x", "--method=gfi_ap", "--sweep=0.3:inf:0.1"], ["must rise by a STEP", "0.3:inf:0.1"]),
        ("search", ["--output=x", "--method=gfi_ap", "--quantile=0.4"], ["quantiles are for prune.py"]),
        ("prune", ["--output=x", "--method=sfp", "--distance=l1"], ["distance is an option of --method fpgm"]),
        ("prune", ["--output=x", "--method=fpgm", "--distance=l3"], ["distance must be one of l2, l1, cosine", "'l3'"]),
        ("prune", ["--output=x", "--method=fpgm", "--norm_share=2"], ["norm_share must lie in [0, 1], but got 2"]),
        ("prune", ["--output=x", "--method=sfp", "--method_schedule=fast"], ["method_schedule must be", "x0.2@60,120"]),
        ("prune", ["--output=x", "--method=caie", "--channels_per_step=0"], ["channels_per_step must be above 0"]),
        ("prune", ["--output=x", "--method=gfi_ap", "--quantile=1"], ["quantiles must lie in (0, 1)", "empties every"]),
        ("prune", ["--output=x", "--method=gfi_ap", "--sweep=0.3:0.7"], ["LOW:HIGH:STEP", "'0.3:0.7'"]),
        ("prune", ["--output=x", "--method=gfi_ap", "--sweep=0.7:0.3:0.1"], ["must rise", "0.7:0.3:0.1"]),
        ("prune", ["--output=x", "--quantile=0.4"], ["quantiles are an option of --method gfi_ap", "uniform"]),
        (
            "prune",
            ["--output=x", "--method=gfi_ap", "--quantile=0.4", "--macs=0.5"],
            ["quantiles and macs, params or latency"],
        ),
        ("search", ["--output=x", "--targets", "0.3:half"], ["a range of targets is LOW:HIGH", "0.3:half"]),
        ("search", ["--output=x", "--targets", "0.3:0.5:0.7"], ["a range of targets is LOW:HIGH", "0.3:0.5:0.7"]),
        ("search", ["--output=x", "--ask", "half"], ["--ask", "kept fractions in (0, 1]", "'half'"]),
        ("search", ["--output=x", "--targets", "0.6:0.4"], ["a range of targets must be", "'0.6:0.4'"]),
        ("search", ["--output=x", "--targets", "0.3:0.6", "0.7"], ["or one range like 0.3:0.8, not both", "0.3:0.6"]),
        ("search", ["--output=x", "--targets=0.3:0.6", "--agent=cma"], ["agent cma takes a list of targets"]),
        ("search", ["--output=x", "--targets=0.3:0.6", "--agent=random"], ["agent random takes a list of targets"]),
        ("search", ["--output=x", "--mean", "125", "123", "114", "--std", "58", "57", "57"], ["mean must be three"]),
        ("search", ["--output=x", "--colour=red"], ["colour"]),
        ("search", ["--output=x", "--episodes=many"], ["episodes", "many"]),
        (
            "search",
            ["--output=x", f"--min_keep={10**400}"],
            ["settings must be numbers that a float holds", "too large"],
        ),
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
        ("targets: [0.5, 1.3]", ["targets must be kept fractions in (0, 1], but got 1.3; 0.5 keeps half of the MACs"]),
        ("targets: ['0.3:x']", ["a range of targets is LOW:HIGH, like 0.3:0.8, but got '0.3:x'"]),
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
    words = (*TINY, f"--weights={finished}", "--output", other_split)
    assert "validation images, which its weights may have seen, in" in " ".join(
        call("pretrain", *words, "--seed=1").split()
    )
    assert "validation images, in" in call("pretrain", *TINY, "--output", finished)
    assert json.loads((other_split / "dense" / "result.json").read_text())["validation_unseen"] is False


def test_a_missing_policy_or_export_is_named(call: Call, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "export" / "macs-0.50")
    assert "not exported yet, or not whole: macs-0.50" in call("finetune", copy, status=2)
    (copy / "policies" / "macs-0.70.json").unlink()
    assert "no policy yet for macs-0.70" in call("export", copy, status=2)
    call("search", *TINY, "--output", copy)
    assert (copy / "policies" / "macs-0.70.json").read_bytes() == (
        finished / "policies" / "macs-0.70.json"
    ).read_bytes()


def test_settings_of_the_run_hold_wherever_its_name_stands(call: Call, finished: Path) -> None:
    assert "epochs: 1 -> 3" in call("finetune", "--epochs=3", finished, status=2)
    assert "seed: 0 -> 1" in call("finetune", finished, "--seed=1", status=2)
    ranked_by_l2 = call("search", "--ask=0.45", "--criterion=l2", "--output", finished, status=2)
    assert "criterion: 'reconstruction' -> 'l2'" in ranked_by_l2
    assert "scope: None -> 'all'" in call("export", finished, "--scope=all", status=2)


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


@pytest.mark.parametrize("command", ["pretrain", "search", "prune", "export", "finetune"])
def test_help_shows_no_python(call: Call, command: str) -> None:
    shown = call(command, "--help")
    assert "--targets" in shown and not re.search(r"<(function|class)| at 0x", shown)
