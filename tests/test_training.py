"""Schedules and fitting, against hand formulas and interrupted runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_weights, bars, snapshot, tiny_cnn
from torch import nn

from cacp import steps
from cacp.checkpoint import load_state, save_state
from cacp.data import ImageData
from cacp.evaluation import evaluate_data
from cacp.recipe import Recipe
from cacp.schedules import is_schedule, learning_rate
from cacp.schema import Normalisation, UserError
from cacp.steps import TrainingDiverged
from cacp.training import EpochRecord, chosen_epoch, fit, images_per_second

NORMALISATION = Normalisation((0.5,), (0.25,))
RECIPE = Recipe(epochs=5, lr=0.05, batch_size=32, padding=1, flip=False, precision="fp32")


def without_times(records: list[EpochRecord]) -> list[EpochRecord]:
    return [record._replace(seconds=0.0, images_per_second=0.0) for record in records]


# --- learning rate and recipe


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        ("paper", 0, 0.1),
        ("paper", 19.99, 0.1),
        ("paper", 20, 0.01),
        ("paper", 80, 1e-5),
        ("step", 199.9, 0.1),
        ("step", 200, 0.01),
        ("step", 299.9, 0.01),
        ("step", 300, 0.001),
        ("cosine", 0, 0.0),
        ("cosine", 10, 0.05),  # half of the warm-up of 20 epochs
        ("cosine", 20, 0.1),
        ("cosine", 210, 0.05),  # half of the remaining 380
        ("cosine", 305, 0.1 * 0.5 * (1 - math.sqrt(0.5))),  # three quarters: cos(135 deg)
        ("cosine", 400, 0.0),
        ("constant", 399, 0.1),
        ("x0.2@60,120,160/200", 119.9, 0.1),  # twice the published length
        ("x0.2@60,120,160/200", 120, 0.02),
        ("x0.2@60,120,160/200", 320, 0.0008),
    ],
)
def test_learning_rate_has_the_hand_values_of_400_epochs(schedule: str, epoch: float, expected: float) -> None:
    assert learning_rate(schedule, 0.1, epoch, 400) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_step_falls_over_whatever_length() -> None:
    assert [learning_rate("step", 1.0, epoch, 4) for epoch in range(4)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_several_processes_need_an_image_each_and_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusals alone: what several processes do is in test_parallel."""
    data, recipe = bars(12), Recipe(epochs=1, batch_size=4, padding=0, flip=False, precision="fp32")
    monkeypatch.setattr(steps, "processes", lambda: 5)
    with pytest.raises(UserError, match=r"number of processes that share a mini-batch \(5\), but got 4"):
        list(fit(tiny_cnn(), data, None, NORMALISATION, recipe, 0))
    monkeypatch.setattr(steps, "processes", lambda: 2)
    model = tiny_cnn()
    model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match="every parameter must take part in the loss, but idle do not"):
        list(fit(model, data, None, NORMALISATION, recipe, 0))


def test_a_short_training_without_a_learning_rate_of_its_own_takes_a_smaller_one() -> None:
    recipe = Recipe(epochs=5, batch_size=16)  # 7 steps over 100 images
    assert recipe.highest_lr(100) == pytest.approx(0.1 * math.sqrt(35 / 2000))
    assert Recipe(epochs=400).highest_lr(50_000) == 0.1
    assert Recipe(epochs=5, lr=0.3, batch_size=16).highest_lr(100) == 0.3
    (record,) = fit(tiny_cnn(), bars(100), None, NORMALISATION, replace(recipe, epochs=1, schedule="constant"), 0)
    assert record.lr == pytest.approx(0.1 * math.sqrt(7 / 2000))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match=r"step .*cosine, or drops like .* but got 'linear'"):
        learning_rate("linear", 0.1, 0, 10)


@pytest.mark.parametrize("name", ["x0@1/2", "x3@1/2", "x0.1@0/2", "x0.1@20,500/400", "x0.1@400/400", "x0.1@1"])
def test_drops_that_mean_nothing_are_refused(name: str) -> None:
    assert is_schedule("x0.1@1/2") and is_schedule("x.2@60,120,160/200")
    assert not is_schedule(name)


def test_a_recipe_lists_every_wrong_value() -> None:
    with pytest.raises(UserError) as error:
        Recipe(epochs=0, lr=-1.0, schedule="linear", precision="fp16")
    for part in ("epochs must be at least 1, but got 0", "lr", "-1.0", "'linear'", "'fp16'"):
        assert part in str(error.value)
    assert "momentum" not in str(error.value)


# --- fit


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fit_learns_bars_and_reports_what_it_did(device: str) -> None:
    model, train, validation = tiny_cnn().to(device), bars(240), bars(90, seed=1)
    before = evaluate_data(model, validation, NORMALISATION)
    recipe = Recipe(epochs=12, lr=0.1, batch_size=24, padding=1, flip=False)
    records = list(fit(model, train, validation, NORMALISATION, recipe, seed=0))
    after = evaluate_data(model, validation, NORMALISATION)
    assert before.top1 < 0.7
    assert after.top1 > 0.95
    assert records[-1].train_loss < 0.5 * records[0].train_loss
    assert [record.epoch for record in records] == list(range(1, 13))
    assert records[-1].lr == pytest.approx(learning_rate("cosine", 0.1, 12 - 0.5 / 10, 12))  # 10 steps an epoch
    assert all(record.seconds * record.images_per_second >= 240 for record in records)
    assert model.training


@pytest.mark.parametrize(
    ("precision", "momentum", "broken_off_after"),
    [("fp32", 0.9, 1), ("fp32", 0.9, 3), ("fp32", 0.0, 2), ("auto", 0.9, 3)],
)
def test_a_broken_off_fit_resumes_bit_equal(
    tmp_path: Path, precision: str, momentum: float, broken_off_after: int
) -> None:
    recipe = Recipe(epochs=5, lr=0.05, momentum=momentum, batch_size=32, padding=1, precision=precision)
    data = (bars(100), bars(60, seed=1), NORMALISATION, recipe, 3)
    whole = tiny_cnn(dropout=0.2)
    expected = list(fit(whole, *data))

    broken = fit(tiny_cnn(dropout=0.2), *data, checkpoint_dir=tmp_path)
    for _ in range(broken_off_after):
        next(broken)
    broken.close()
    resumed = tiny_cnn(dropout=0.2)
    torch.manual_seed(99)  # the global generator of another process stands elsewhere
    records = list(fit(resumed, *data, checkpoint_dir=tmp_path))

    assert without_times(records) == without_times(expected)
    assert_equal_weights(snapshot(resumed), snapshot(whole))
    again = tiny_cnn()
    assert list(fit(again, *data, checkpoint_dir=tmp_path)) == records  # a finished run is told again, times and all
    assert_equal_weights(snapshot(again), snapshot(whole))


def test_the_seed_decides_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    losses = []
    for seed in (0, 0, 1):
        model = tiny_cnn(dropout=0.2)
        torch.set_rng_state(state)
        losses.append([record.train_loss for record in fit(model, bars(64), None, NORMALISATION, RECIPE, seed)])
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_validation_chooses_the_epoch_and_without_it_the_last_stays(tmp_path: Path) -> None:
    train = bars(96)
    # Every label wrong: what is learnt can only harm, so the best epoch is an early one.
    wrong = ImageData(train.batch(torch.arange(96)), (train.labels + 1) % 3, train.classes)
    model = tiny_cnn()
    recipe = Recipe(epochs=6, lr=0.2, batch_size=16, padding=0, flip=False, precision="fp32")
    records = []
    weights = []
    for record in fit(model, train, wrong, NORMALISATION, recipe, 0):
        records.append(record)
        weights.append(snapshot(model))
    best = chosen_epoch(records)
    assert best < 6
    assert records[best - 1].validation_top1 == max(record.validation_top1 or 0.0 for record in records)
    assert_equal_weights(snapshot(model), weights[best - 1])
    chosen = records[best - 1]
    assert evaluate_data(model, wrong, NORMALISATION)[:2] == (chosen.validation_top1, chosen.validation_loss)

    last = tiny_cnn()
    records = list(fit(last, train, None, NORMALISATION, recipe, 0))
    assert (chosen_epoch(records), records[-1].validation_top1) == (6, None)
    assert_equal_weights(snapshot(last), weights[-1])


def test_chosen_epoch_breaks_ties_by_loss_then_by_time() -> None:
    def record(epoch: int, top1: float | None, loss: float | None) -> EpochRecord:
        return EpochRecord(epoch, 0.1, 1.0, 0.5, top1, loss, 1.0, 1.0)

    assert chosen_epoch([record(1, 0.5, 1.0), record(2, 0.7, 0.9), record(3, 0.6, 0.2)]) == 2
    assert chosen_epoch([record(1, 0.7, 1.0), record(2, 0.7, 0.9), record(3, 0.7, 0.9)]) == 2
    assert chosen_epoch([record(1, None, None), record(2, None, None)]) == 2
    assert chosen_epoch([]) == 0


def test_images_per_second_are_those_of_all_epochs_together() -> None:
    records = [EpochRecord(epoch, 0.1, 1.0, 0.5, None, None, 9.0, 1200 / epoch) for epoch in (1, 2, 3)]
    assert images_per_second(records) == pytest.approx(3 * 1200 / (1 + 2 + 3))  # 1,200 images in 1, 2, 3 seconds


# --- what goes wrong


def test_divergence_names_epoch_and_remedy_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model, data = tiny_cnn(), (bars(64), None, NORMALISATION, RECIPE, 0)
    iterator = fit(model, *data, checkpoint_dir=tmp_path)
    next(iterator)
    next(iterator)
    good = snapshot(model)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"epoch 3 at learning rate .*the training loss is nan; lower the"):
        next(iterator)

    resumed = tiny_cnn()
    iterator = fit(resumed, *data, checkpoint_dir=tmp_path)
    assert [next(iterator).epoch for _ in range(2)] == [1, 2]
    assert_equal_weights(snapshot(resumed), good)


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    # One step an epoch: its loss is that of the initial weights, finite; only the weights after it are not.
    recipe = Recipe(epochs=2, lr=3e38, batch_size=64, schedule="paper", padding=0, precision="fp32")
    with pytest.raises(TrainingDiverged, match=r"epoch 1 at learning rate 3e\+38.*weights or batch norm"):
        next(fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), *_with(recipe), checkpoint_dir=tmp_path))
    assert load_state(tmp_path) is None


def _with(recipe: Recipe) -> tuple[ImageData, None, Normalisation, Recipe, int]:
    return bars(64), None, Normalisation((0.0,), (1e-3,)), recipe, 0


def test_a_checkpoint_of_another_recipe_or_seed_is_refused_by_the_call(tmp_path: Path) -> None:
    next(fit(tiny_cnn(), bars(64), None, NORMALISATION, RECIPE, 0, checkpoint_dir=tmp_path))
    other = Recipe(epochs=5, lr=0.01, batch_size=32, padding=1, flip=False, precision="fp32")
    model = tiny_cnn()
    before = snapshot(model)
    with pytest.raises(UserError) as error:
        fit(model, bars(63), None, NORMALISATION, other, 1, checkpoint_dir=tmp_path)
    message = str(error.value)
    for part in ("lr (checkpoint 0.05, now 0.01)", "seed (checkpoint 0, now 1)", "train_images", "delete that folder"):
        assert part in message
    assert "momentum" not in message
    assert_equal_weights(snapshot(model), before)


def test_a_checkpoint_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    next(fit(tiny_cnn(), bars(64), None, NORMALISATION, RECIPE, 0, checkpoint_dir=tmp_path))
    saved = load_state(tmp_path)
    assert saved is not None
    for lacking in ("ema_decay", "nesterov"):
        del saved.data["settings"][lacking]
    save_state(tmp_path, saved.tensors, saved.data)
    assert len(list(fit(tiny_cnn(), bars(64), None, NORMALISATION, RECIPE, 0, checkpoint_dir=tmp_path))) == 5
    other = replace(RECIPE, nesterov=True)
    with pytest.raises(UserError, match=r"nesterov \(checkpoint False, now True\)"):
        fit(tiny_cnn(), bars(64), None, NORMALISATION, other, 0, checkpoint_dir=tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    next(fit(tiny_cnn(), bars(64), None, NORMALISATION, RECIPE, 0, checkpoint_dir=tmp_path))
    model = tiny_cnn()
    model[0] = nn.Conv2d(1, 12, 5, padding=2, bias=False)
    with pytest.raises(UserError, match=r"another model: 0.weight \(checkpoint \(12, 1, 3, 3\), now \(12, 1, 5, 5\)\)"):
        fit(model, bars(64), None, NORMALISATION, RECIPE, 0, checkpoint_dir=tmp_path)


def test_empty_data_is_refused() -> None:
    with pytest.raises(UserError, match="validation must hold at least 1 image"):
        fit(tiny_cnn(), bars(6), bars(0), NORMALISATION, RECIPE, 0)
