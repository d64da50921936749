"""The page of a run at every stage of it, and how it looks in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from running import Call

from cacp.checkpoint import load_json, save_json, save_tensors
from cacp.figures import training_figure
from cacp.page import page as page_of
from cacp.page.markup import VOID, document, table, tag
from cacp.page.result import answer, latencies
from cacp.reporting import duration
from cacp.runfolder import PrunedModel, RunFolder, read_run, stages
from cacp.schema import Budget, Cost, Policy, PolicyRecord, Score

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


class Outline(HTMLParser):
    """Elements, ids, text and addresses of a page; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for key, value in attrs if key == "id"]
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def reported(call: Call, *runs: Path) -> str:
    assert "index.html" in call("report", *runs)
    return (runs[0] / "report" / "index.html").read_text(encoding="utf-8")


def copied(finished: Path, tmp_path: Path, *without: str) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in without:
        shutil.rmtree(folder / name)
    return folder


def test_a_finished_run_shows_its_answer_first_and_everything_else(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    text = reported(call, folder)
    page = Outline(text)
    result = load_json(folder / "finetune" / "macs-0.50" / "result.json")
    report = load_json(folder / "export" / "macs-0.50" / "report.json")
    after, dense = (result["test_top1"][key] for key in ("after", "dense"))
    shown = page.words.partition("Trade-off")[2].partition("Trade-off")[0]  # between the contents and that heading
    for value in (f"{100 * after:.2f}", f"{100 * (after - dense):+.2f}", f"{report['pruned']['macs'] / 1e6:.2f} M"):
        assert value in shown, value
    median = report["latency_ms"]["batch 64"]["pruned"]["median"]
    assert f"{median:.2f}" in shown and "batch 64, ms" in shown
    assert f"{(folder / 'export' / 'macs-0.50' / 'model.safetensors').stat().st_size / 1e6:.3f}" in shown
    assert f"load_pruned('{folder}/finetune/macs-0.50')" in page.words
    assert "Search: 14 of 14 episodes." in page.words and "layer3.2.conv1" in page.words
    assert "Not there yet" not in page.words and "Quantiles" not in page.words
    assert page.tags.count("svg") == 3 + 1 + 2 + 2 + 2  # trade-off, layers, search, fine-tuning, dense training


def test_the_page_is_one_file_that_fetches_nothing(call: Call, finished: Path, tmp_path: Path) -> None:
    text = reported(call, copied(finished, tmp_path))
    page = Outline(text)
    assert len(page.ids) == len(set(page.ids)) > 50
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert set(re.findall(r"url\((.)", text)) == {"#"} and "@import" not in text
    assert "default-src 'none'" in text.replace("&#x27;", "'") and page.tags.count("script") == 1
    assert (
        page.tags.count("svg") == text.count('role="img"') == page.tags.count("figcaption") == page.tags.count("desc")
    )
    assert "#2563a8" not in text.partition("</style>")[2]  # every figure follows the reader's theme
    assert "DejaVu" not in text


@pytest.mark.parametrize(
    ("without", "missing", "command"),
    [
        ((), "", ""),
        (("finetune",), "fine-tuning: 0 of 3", "finetune.py"),
        (("finetune", "export"), "export: 0 of 3", "export.py"),
        (("finetune", "export", "policies"), "policies: none yet, 14 of 14 episodes; missing: macs-0.30", "search.py"),
        (("finetune", "export", "policies", "search"), "policies: none yet; missing", "search.py"),
        (("finetune", "export", "policies", "search", "dense"), "dense model: not yet", "pretrain.py"),
    ],
)
def test_at_every_stage_the_page_says_what_is_missing_and_which_command_makes_it(
    call: Call, finished: Path, tmp_path: Path, without: tuple[str, ...], missing: str, command: str
) -> None:
    folder = copied(finished, tmp_path, *without)
    words = Outline(reported(call, folder)).words
    assert missing in words
    lines = [stage.command for stage in stages(read_run(folder)) if stage.command]
    assert len(lines) == max(0, len(without) - ("search" in without))  # the search and its policies are one stage
    assert all(line in words and line.endswith(str(folder)) for line in lines)
    assert (lines[0].split()[1] if lines else "") == command


def test_a_fine_tuning_that_was_broken_off_goes_on_by_its_own_recipe(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    (folder / "finetune" / "macs-0.50" / "result.json").unlink()
    source = load_json(folder / "finetune" / "macs-0.30" / "source.json")
    begun = {**source, "epochs": 3, "schedule": "x0.2@1/3", "distillation": 0.5, "precision": "fp32", "padding": 2}
    save_json(folder / "finetune" / "macs-0.30" / "source.json", begun)
    stage = stages(read_run(folder))[-1]
    assert stage.state == "2 of 3; macs-0.50: 1 of 1 epochs"
    flags = (
        " --finetune_epochs=3 --finetune_schedule=x0.2@1/3 --finetune_distillation={} --precision=fp32 --crop_padding=2"
    )
    assert stage.command.endswith(flags.format(0.5))
    older = {key: value for key, value in begun.items() if key != "distillation"}  # of before it was known
    save_json(folder / "finetune" / "macs-0.30" / "source.json", older)
    command = stages(read_run(folder))[-1].command
    assert command.endswith(flags.format(0.0))


def test_names_of_files_cannot_inject_markup(call: Call, finished: Path, tmp_path: Path) -> None:
    evil = "</code></pre><script>alert('x')</script><img src=x onerror=alert(1)>&$\\frac{"
    folder = copied(finished, tmp_path)
    folder = folder.rename(tmp_path / "a<b>$&'\"x")
    for path in (folder / "dense" / "result.json", folder / "export" / "macs-0.50" / "report.json"):
        data = load_json(path)
        evils = {
            "classes": [evil] * 10,
            "source": evil,
            "latency_ms": {evil: data.get("latency_ms", {}).get("batch 1")},
        }
        save_json(path, {**data, **evils})
    for path in [*folder.glob("policies/*.json"), *folder.glob("export/*/report.json")]:
        changed = path.read_text().replace("layer1.0.conv1", json.dumps(evil)[1:-1])
        path.write_text(changed.replace("search cacp", "<b>"))
    settings = (folder / "config.yaml").read_text().replace("model: resnet20", "model: '<u>'")
    (folder / "config.yaml").write_text(settings)
    text = reported(call, folder)
    page = Outline(text)
    assert page.tags.count("script") == 1 and not {"img", "u"} & set(page.tags)
    assert "pruned by <b>" in page.words and "<u> on digits" in page.words and evil in page.words
    assert page.words.count("onerror=alert(1)") > 15


def test_a_page_needs_nothing_of_a_report_and_takes_more(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    path = folder / "export" / "macs-0.30" / "report.json"
    save_json(path, {"policy": load_json(path)["policy"], "dense": "none", "latency_ms": [1]})
    save_json(folder / "environment.json", [{"commit": None}, {"packages": None, "command": "none"}])
    save_json(folder / "search" / "profile.json", {"slicing": "long", "evaluation": 61.0})
    save_json(folder / "finetune" / "macs-0.30" / "result.json", {"test_top1": {"after": "none"}, "test_images": None})
    path = folder / "export" / "macs-0.70" / "report.json"
    pair = {"dense": {"median": 8.0}, "pruned": {"median": 2.0, "more": [1]}}
    times = {"batch 1": pair, "batch 8": 2, "batch 64": {"dense": pair["dense"]}}
    save_json(path, {**load_json(path), "latency_ms_onnxruntime": times})
    (folder / "export" / "macs-0.70" / "model.onnx").write_bytes(b"x" * 5000)
    words = Outline(reported(call, folder)).words
    assert "evaluation1 min 1 s100.00" in words and "slicing" not in words
    assert "ONNX Runtime, batch 1, ms" in words and "4.00 × as fast, ONNX Runtime, batch 1" in words
    assert "export: 3 of 3" not in words
    (folder / "finetune" / "macs-0.70" / "result.json").unlink()
    assert "export/macs-0.70/model.onnx0.005" in Outline(reported(call, folder)).words


def test_damaged_files_are_named_and_the_rest_is_shown(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    damaged = ["policies/macs-0.30.json", "search/tradeoff.csv", "dense/model.safetensors", "environment.json"]
    for name in damaged:
        (folder / name).write_bytes(b"\x00torn")
    (folder / "search" / "tradeoff.csv").write_text("macs_kept,top1\nx,y\n")
    with (folder / "search" / "episodes.csv").open("a") as file:
        file.write("15,0.3,1.")  # being written
    words = Outline(reported(call, folder)).words
    assert all(f"{folder / name} cannot be read" in words for name in damaged)
    assert "14 of 14 episodes" in words and "macs 0.50" in words and "missing: macs-0.30" in words
    assert "holds no run" in call("report", tmp_path, status=2)


def test_what_no_run_holds_is_named_or_left_out(tmp_path: Path) -> None:
    files = {
        "config.yaml": "model: resnet20\ndataset: digits\n",
        "environment.json": '[{"packages": [1], "command": [3]}]',
        "dense/result.json": '{"validation_top1": 1' + 400 * "0" + "}",
        "dense/epochs.csv": "epoch,seconds\n1,inf\n",
        "method/macs-0.50/epochs.csv": "seconds\n1\n",
        "search/tradeoff.csv": "macs_kept,macs,top1\n1e-12,1e300,0.5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    weights = {"scale": torch.tensor(1.0), "empty": torch.zeros(0, 3), "a": torch.ones(4, 2)}
    save_tensors(tmp_path / "dense" / "model.safetensors", {f"{name}.weight": one for name, one in weights.items()})
    run = read_run(tmp_path)
    assert run.channels == {"a": 4}
    damaged = ("dense/result.json", "dense/epochs.csv", "search/tradeoff.csv", "method/macs-0.50/epochs.csv")
    assert [problem.partition(" cannot be read")[0] for problem in run.problems] == [
        str(tmp_path / name) for name in damaged
    ]
    assert "No pruned model yet" in Outline(page_of([run])).words


def test_a_training_without_any_known_number_is_an_empty_figure() -> None:
    drawn, empty = (
        training_figure("top1", "top-1, %", {"dense": [row]})
        for row in ({"epoch": 1.0, "train_top1": 0.5}, {"epoch": 1.0})
    )
    assert [len(figure.legends) for figure in (drawn, empty)] == [1, 0]


def test_the_page_says_how_latencies_were_measured_and_why_they_are_no_lower() -> None:
    score = Score(0.5, 1.0, 0.4, Cost(50, 5))
    record = PolicyRecord(Policy({"a": (0,)}, "l1"), Budget({"macs": 0.5}), score, score, "uniform", 0)
    conditions = {"threads": 2, "torch": "2.9 on cpu", "onnxruntime": "1.2 on cpu"}
    why = {"torch, batch 1": {"why": "<b>calls</b> of layers"}}
    models = [
        PrunedModel("macs-0.50", record, {"latency_conditions": conditions, "latency_why": why}),
        PrunedModel("macs-0.70", record, {"latency_conditions": conditions, "latency_why": {}}),
    ]
    words = Outline(answer(RunFolder(Path("x"), models=models))).words
    assert words.count("threads: 2. PyTorch: 2.9 on cpu. ONNX Runtime: 1.2 on cpu.") == 1
    assert words.endswith("and what helpsmacs 0.50, torch, batch 1: <b>calls</b> of layers.")
    models[0].exported["latency_why"] = {}
    assert "what helps" not in answer(RunFolder(Path("x"), models=models))


def renamed(finished: Path, folder: Path, method: str) -> Path:
    """A run by a method without episodes: the finished one under another name, not fine-tuned."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("search", "finetune"))
    for path in [*folder.glob("policies/*.json"), *folder.glob("export/*/report.json")]:
        path.write_text(path.read_text().replace("search cacp", method))
    return folder


def asking(folder: Path, targets: str, **settings: str) -> None:
    """Other settings in a run's config.yaml."""
    path = folder / "config.yaml"
    text = re.sub(r"^targets:\n(- .*\n)+", f"targets: {targets}\n", path.read_text(), flags=re.MULTILINE)
    for name, value in settings.items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    path.write_text(text)


def test_runs_are_compared_and_what_cannot_be_compared_is_said(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    uniform, other = (renamed(finished, tmp_path / part / "uniform", "uniform") for part in ("a", "b"))
    result = load_json(other / "dense" / "result.json")
    save_json(other / "dense" / "result.json", {**result, "split_sha256": "0"})
    words = Outline(reported(call, folder, uniform, uniform, other)).words
    top1 = load_json(uniform / "policies" / "macs-0.50.json")["score"]["top1"]
    assert re.search(rf"macs 0\.50, {uniform}uniform[^a-z]*{100 * top1:.2f}", words)
    assert f"{other} has other images than run" in words and f"{uniform} has" not in words
    alone = " --method uniform --targets 0.3 0.5 0.7 --output "
    assert alone in Outline(reported(call, folder)).words and alone not in words
    assert words.count(f"macs 0.30, {uniform}uniform") == 1  # named twice, taken once


def test_a_sweep_shows_its_plots(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = renamed(finished, tmp_path / "sweep", "gfi_ap")
    asking(folder, "[]", method="gfi_ap", quantiles="[0.3, 0.5, 0.6]")
    rows = ["quantile,threshold,policy,macs,params,top1,seconds", "0.3,0.01,macs-0.70,0.7,0.6,0.91,75.4"]
    (folder / "sweep").mkdir()
    (folder / "sweep" / "sweep.csv").write_text("\n".join([*rows, "0.5,0.02,macs-0.50,0.5,0.4,0.9,2", ""]))
    page = Outline(reported(call, folder))
    assert "quantile 0.31 min 15 s" in page.words and "pruned by gfi_ap" in page.words
    assert "3 done; missing: quantile 0.6. To go on:python prune.py" in page.words
    assert page.tags.count("svg") == 1 + 1 + 1 + 2  # trade-off before fine-tuning, layers, plots, dense training


def test_networks_with_zero_weights_show_that_nothing_is_smaller(call: Call, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path, "search", "policies", "export", "finetune")
    asking(folder, "[0.5, 0.4]", method="magnitude")
    result = {"sparsity": 0.5001, "holdout_top1": 0.875, "dense_holdout_top1": 0.9, "budget": {"macs": 0.5}}
    save_json(folder / "unstructured" / "macs-0.50" / "result.json", result)
    words = Outline(reported(call, folder)).words
    assert "Single weights are zero" in words and "macs 0.5050.0190.0087.50" in words
    assert "1 done; missing: macs-0.40. To go on:python prune.py" in words and "export.py" not in words


def test_only_markup_is_markup() -> None:
    assert tag("td", "<b>&\"'", tag("i", 1), class_='"') == (
        '<td class="&quot;">&lt;b&gt;&amp;&quot;&#x27;<i>1</i></td>'
    )
    shown = table("t", ["a", "empty", "b"], [["x", None, 1], ["y", "", None]])
    assert "empty" not in shown and shown.count("<td>") == 4 and "<td>–</td>" in shown
    assert Outline(document("<title>")).words.strip().startswith("<title>")


def test_latencies_are_by_runtime_and_batch_and_only_what_was_exported() -> None:
    pair = {"dense": {"median": 3.0}, "pruned": {"median": 2}}
    why = {"PyTorch, batch 8": {"ms": {**pair, "narrowest": {"median": 1.0}}, "why": "odd"}}
    report = {"latency_ms": {"batch 1": pair}, "latency_ms_onnxruntime": {"batch 8": pair}, "latency_why": why}
    assert latencies(report) == {"PyTorch, batch 1": (3.0, 2.0), "ONNX Runtime, batch 8": (3.0, 2.0)}
    assert latencies({"latency_ms_onnxruntime": {"missing": "not among --forms"}}) == {}
    assert latencies({"latency_ms": {"batch 1": {"dense": {"median": "3"}, "pruned": {"median": 0}}}}) == {}


def test_durations_in_two_units() -> None:
    assert [duration(one) for one in (0.4, 59.6, 3599.4, 7384.0, -1.0)] == [
        "0 s", "1 min 0 s", "59 min 59 s", "2 h 3 min", "0 s"
    ]  # fmt: skip


def shot(page: str, picture: Path, width: int, *flags: str) -> str:
    """Open a page in a headless browser; its elements after its scripts, and a picture."""
    assert BROWSER is not None
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
    line += [f"--window-size={width},1400", *flags]
    for action in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run([*line, action, page], check=True, capture_output=True, timeout=600, text=True)
    return done.stdout


NEEDS_BROWSER = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: install one of {', '.join(BROWSERS)}, or set CHROMIUM"
)


@pytest.mark.slow
@NEEDS_BROWSER
def test_tensorboard_shows_a_search_in_a_browser(finished: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished), "--port=0", "--load_fast=false"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as board:
        try:
            assert board.stderr is not None
            address = next(found[0] for line in board.stderr if (found := re.search(r"http://\S+", line)))
            board_png = tmp_path / "board.png"
            tags = ("agent/expected_return", "search/trade-off", "target macs-0.50/best top1")
            shown = [
                any(
                    f'title="{tag}"' in shot(f"{address}?tagFilter={quote(tag)}#timeseries", board_png, 1280)
                    for _ in range(5)  # on a busy machine a page may be read before its filter is applied
                )
                for tag in tags
            ]
        finally:
            board.terminate()
    assert dict(zip(tags, shown, strict=True)) == dict.fromkeys(tags, True)
    assert board_png.stat().st_size > 20_000


@NEEDS_BROWSER
@pytest.mark.parametrize(("width", "flags"), [(1280, ()), (500, ("--blink-settings=preferredColorScheme=0",))])
def test_the_page_opens_in_a_browser(
    call: Call, finished: Path, tmp_path: Path, width: int, flags: tuple[str, ...]
) -> None:
    folder = copied(finished, tmp_path)
    text = reported(call, folder)
    probe = "<script>document.title = `${document.body.scrollWidth} ${getComputedStyle(document.body).backgroundColor}`"
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{probe}</script></body>")
    (folder / "probed.html").write_text(text, encoding="utf-8")
    seen = shot(f"file://{folder}/probed.html", tmp_path / "page.png", width, *flags)
    wide, background = re.search(r"<title>(\d+) (.*?)</title>", seen).groups()
    assert int(wide) <= width  # nothing sticks out: what is wider scrolls by itself
    assert background == ("rgb(17, 21, 27)" if flags else "rgb(255, 255, 255)")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    plain = shot(f"file://{folder}/report/index.html", tmp_path / "plain.png", width)
    assert plain.count("<button>copy</button>") == plain.count("<table") + plain.count("<pre>") > 5  # its script runs
