"""What the quality benchmarks conclude: tables by hand, least squares against torch's, numbers of known logits."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import resnet20
from test_agents import ToyEnv, play

from benchmarks import quality_cell, search_quality
from benchmarks.quality_cell import PURSE, Cell, Found, Spending
from benchmarks.quality_searchers import SEARCHERS, WithoutActor, WithoutImagination, WithoutPlanner
from benchmarks.quality_table import summed_up
from benchmarks.score_quality import correlated, numbers
from benchmarks.search_quality import best_of
from cacp.budget import uniform_counts
from cacp.checkpoint import load_json, load_tensors, save_json, save_tensors
from cacp.data import ImageData
from cacp.schema import Budget, UserError


def row(searcher: str, seed: int, **tops: float) -> dict:
    measured = {name.replace("at", "0."): {"top1": top1} for name, top1 in tops.items()}
    return {"searcher": searcher, "seed": seed, "measured": measured}


def test_the_table_by_hand() -> None:
    rows = [row("cacp", 0, at30=0.5, at50=0.8), row("cacp", 1, at30=0.6, at50=0.8)]
    rows += [row("random", 0, at30=0.4, at50=0.7), row("random", 1, at30=0.3, at50=0.8), row("cma", 0, at30=0.4)]
    table = summed_up(rows, [0.3, 0.5])
    assert table["cacp"]["0.30"]["mean"] == pytest.approx(0.55)
    assert table["cacp"]["0.30"]["standard_error"] == pytest.approx(0.05)  # standard deviation 0.0707 over sqrt(2)
    assert table["cacp"]["mean"]["mean"] == pytest.approx(0.675)
    assert table["random"]["0.30"]["ours_minus_it"]["mean"] == pytest.approx(0.2)
    assert table["random"]["0.30"]["ours_minus_it"]["standard_error"] == pytest.approx(0.1)
    assert table["cma"].keys() == {"0.30"} and table["cma"]["0.30"]["standard_error"] is None


def test_numbers_of_known_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    dense = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = numbers(logits, torch.tensor([1, 1, 0]), dense)
    assert found["top1"] == pytest.approx(2 / 3) and found["agreement"] == pytest.approx(2 / 3)
    assert found["probability"] == pytest.approx((0.75 + 0.25 + 0.75) / 3)
    assert found["loss"] == pytest.approx((2 * math.log(0.75) + math.log(0.25)) / 3)
    assert numbers(dense, torch.tensor([1, 1, 0]), dense)["divergence"] == pytest.approx(0.0, abs=1e-7)


def test_correlations_of_equal_and_reversed_ranks() -> None:
    values = np.arange(24.0)
    assert correlated(values, values**3)["kendall"] == 1 and correlated(values, -values)["spearman"] == -1
    wide = correlated(values, np.random.default_rng(0).random(24))["spearman_interval"]
    assert wide[0] < 0 < wide[1]


def test_ours_without_a_part_lacks_that_part_alone() -> None:
    plain = WithoutPlanner(ToyEnv(), warmup_episodes=3)
    assert {end.source for end in play(plain, 9)[3:]} == {"actor"}
    assert plain.replay_buffer.size() == 9 * 6  # steps of the episodes that were played

    without = WithoutActor(ToyEnv(), warmup_episodes=3)
    play(without, 9)
    assert without._greedy(0.5) == pytest.approx(without._rehearsal.roll_out(0.5, lambda _: 0.0).ratios)
    assert without.replay_buffer.size() == (9 + 4 * 7) * 6  # imagined ones from the end of warm-up on

    play(without_imagination := WithoutImagination(ToyEnv(), warmup_episodes=3), 9)
    assert without_imagination.replay_buffer.size() == 9 * 6


@pytest.fixture
def cell_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ImageData]:
    """Weights and images of a tiny cell."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    file = tmp_path / "resnet20.safetensors"
    save_tensors(file, resnet20().state_dict())
    for name, count in (("CALIBRATION", 20), ("DEVELOPMENT", 20)):
        monkeypatch.setattr(quality_cell, name, count)
    return file, ImageData(pixels, torch.arange(60) % 10, tuple("abcdefghij"))


@pytest.fixture
def cell(cell_parts: tuple[Path, ImageData]) -> Cell:
    return Cell("resnet20", *cell_parts, seed=0, spending=Spending(policies=1, validation=10))


def test_the_purse_pays_every_score_and_no_more(cell: Cell) -> None:
    counts = uniform_counts(cell.cost_model, Budget({"macs": 0.5}))
    assert cell.purse == 5  # a policy a target
    scores = [cell.score(counts) for _ in range(4)]  # equal policies are paid too
    assert scores[0] == scores[3] and 0 <= cell.stale_top1(counts) <= 1 and cell.scored == 5
    with pytest.raises(AssertionError, match="the purse is empty"):
        cell.score(counts)


def test_a_purse_is_spent_on_many_policies_or_on_many_images() -> None:
    assert PURSE == 100 * (1000 + 512)
    assert Spending().check() == (100, 1000) and Spending(60, 2000).check() == (60, 2000)
    with pytest.raises(
        UserError, match=r"61 policies on 2000 \+ 512 images are 153232 a target, and a purse has 151200"
    ):
        Spending(61, 2000).check()
    with pytest.raises(UserError, match="0 policies"):
        Spending(0, 2000).check()


def test_no_image_of_a_cell_serves_two_ends(cell: Cell) -> None:
    parts = [cell.development, cell.splits.validation, cell.splits.holdout, cell.splits.train]
    images = [[image.tobytes() for image in part.batch(torch.arange(len(part))).numpy()] for part in parts]
    assert [len(part) for part in images] == [20, 10, 10, 20]
    assert len({image for part in images for image in part}) == 60
    calibration = cell.splits.calibration.batch(torch.arange(20)).numpy()
    assert {image.tobytes() for image in calibration} <= set(images[3])


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_a_searcher_spends_its_purse_and_answers_every_target(
    searcher: str, cell_parts: tuple[Path, ImageData]
) -> None:
    cell = Cell("resnet20", *cell_parts, seed=0, spending=Spending(policies=4, validation=10))
    found = search_quality.searched(searcher, "resnet20", cell)
    asked = ["0.35", "0.45", "0.55", "0.65"]
    episodes = {"uniform": 0, "taylor": 0, "sensitivity": cell.scored, "random-between": 16}.get(searcher, 20)
    plans = searcher in ("cacp", "by-top1", "by-loss") or searcher.startswith("without-")
    assert found["policies_scored"] == episodes + 4 * plans and cell.scored <= 24
    targets = asked if searcher == "random-between" else ["0.30", "0.40", "0.50", "0.60", "0.70"] + asked * plans
    assert list(found["picked"]) == targets
    for target, picked in found["picked"].items():
        if picked is None:  # published: its policies may end above their target
            assert searcher == "published"
            continue
        kept = cell.cost_model.cost(picked["counts"]).macs / cell.cost_model.dense.macs
        if searcher == "published":  # may also end far below
            assert kept <= float(target) + 0.005
        else:
            assert float(target) - 0.05 < kept <= float(target)


def test_cells_are_skipped_checked_and_judged_as_named(
    cell_parts: tuple[Path, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, train = cell_parts
    monkeypatch.setattr(quality_cell, "load_dataset", lambda *_: train)
    words = ["--weights", f"resnet20={file}", "--work", tmp_path, "--seeds", 0, "--result", tmp_path / "result.json"]
    words += ["--policies", 1, "--validation", 10]

    def main(*more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["search_quality", *map(str, words), *more])
        search_quality.main()
        return [row["searcher"] for row in load_json(tmp_path / "result.json")["cells"]]

    assert main("--searchers", "uniform", "taylor", "--judge", "development") == ["uniform", "taylor"]
    monkeypatch.setattr(search_quality, "searched", None)
    assert main("--searchers", "uniform", "--judge", "test") == ["uniform"]
    with pytest.raises(UserError, match=r"made with other weights or another purse"):
        main("--searchers", "taylor", "--judge", "test", "--validation", "9")
    with pytest.raises(SystemExit):
        main("--searchers", "by-loss", "--judge", "test")
    assert "decide among the others with --judge development" in capsys.readouterr().err
    save_tensors(file, {name: 2 * tensor for name, tensor in load_tensors(file).items()})
    with pytest.raises(UserError, match=r"resnet20_taylor_0.json was made with other weights or another purse"):
        main("--searchers", "taylor", "--judge", "test")


def test_a_target_gets_the_best_policy_that_meets_it(cell: Cell) -> None:
    fits, over = (uniform_counts(cell.cost_model, Budget({"macs": macs})) for macs in (0.5, 0.504))
    found = [Found(0.5, fits, 1.0), Found(0.5, over, 3.0), Found(0.6, fits, 4.0), Found(0.5, fits, 2.0)]
    assert cell.cost_model.cost(over).macs > 0.5 * cell.cost_model.dense.macs
    assert best_of(found, 0.5, cell) == Found(0.5, fits, 2.0) and best_of(found[1:2], 0.5, cell) is None
    cell.forgiven = 0.005
    assert best_of(found, 0.5, cell) == Found(0.5, over, 3.0)


def test_a_judgement_is_of_the_cell_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[dict] = []
    scored = {"0.50": {"top1": 0.5}}
    monkeypatch.setattr(search_quality, "scores_of", lambda found, inputs: judged.append(found) or scored)
    inputs = quality_cell.Inputs({}, resnet20(), None)  # type: ignore[arg-type]
    path = tmp_path / "resnet20_random_0.json"
    for number in (1, 1, 2):
        save_json(path, {"found": [], "number": number})
        row = search_quality.measured(path, inputs)
        assert row == {"number": number, "measured": scored}
    assert [found["number"] for found in judged] == [1, 2]
