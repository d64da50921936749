"""Loss, optimiser, weight averaging and erasing, against hand formulas; and that fits with them resume exactly."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import assert_equal_weights, bars, snapshot, tiny_cnn
from running import ROOT
from torch import Tensor, nn

from cacp.config import experiment_from, parse
from cacp.data import augment
from cacp.evaluation import evaluate_data
from cacp.pipeline import finetuning_recipe
from cacp.recipe import Recipe, moving_average, sgd_optimizer
from cacp.schema import Normalisation, UserError
from cacp.training import EpochRecord, fit

NORMALISATION = Normalisation((0.5,), (0.25,))
EVERYTHING = Recipe(
    epochs=4, lr=0.05, nesterov=True, decay_all=False, batch_size=32, label_smoothing=0.1, distillation=0.7,
    ema_decay=0.9, padding=1, erasing=2, precision="fp32",
)  # fmt: skip


def test_label_smoothing_shares_a_part_of_the_target() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    nats = logits.logsumexp(1) - logits[0]  # (3,), of each class
    expected = 0.9 * nats[0] + 0.1 * nats.mean()
    assert float(Recipe(1, label_smoothing=0.1).loss(logits, labels, None)) == pytest.approx(float(expected))


def test_distillation_is_the_divergence_of_the_softened_answers_times_the_temperature_squared() -> None:
    logits, taught, labels = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[3.0, 1.0], [0.0, 3.0]]), [1, 1]
    student, teacher = (1 / (1 + math.exp(-gap / 4)) for gap in (1.0, 2.0))  # of the first image's first class
    divergence = teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))
    plain = (math.log(1 + math.e) + math.log(1 + math.exp(-3))) / 2
    expected = 0.25 * plain + 0.75 * 16 * divergence / 2  # the second image's answers agree
    loss = Recipe(1, distillation=0.75, temperature=4.0).loss(logits, torch.tensor(labels), taught)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_norms_and_biases_can_be_spared_the_decay() -> None:
    model = tiny_cnn()
    spared = sgd_optimizer(model, Recipe(1, weight_decay=0.01, decay_all=False)).param_groups
    decayed = {id(parameter) for group in spared if group["weight_decay"] == 0.01 for parameter in group["params"]}
    assert {name: id(parameter) in decayed for name, parameter in model.named_parameters()} == {
        name: parameter.dim() > 1 for name, parameter in model.named_parameters()
    }
    (everything,) = sgd_optimizer(model, Recipe(1, weight_decay=0.01)).param_groups
    assert len(everything["params"]) == len(list(model.parameters())) and everything["weight_decay"] == 0.01


def test_the_average_of_weights_is_exponential_and_has_the_statistics_too() -> None:
    model = tiny_cnn()
    average = moving_average(model, Recipe(1, ema_decay=0.75))
    assert average is not None
    expected = {}
    for step in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(step)
        average.update_parameters(model)
        for name, tensor in model.state_dict().items():
            expected[name] = tensor.double() if step == 0 else 0.75 * expected[name] + 0.25 * tensor.double()
    found = average.module.state_dict()
    floats = [name for name in found if found[name].is_floating_point()]
    assert len(floats) == len(found) - 2  # the numbers of batches are whole
    for name in floats:
        torch.testing.assert_close(found[name].double(), expected[name])


def test_integers_are_not_averaged() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    indices = torch.arange(2048)  # as those of the channels that a shortcut passes on
    model.register_buffer("indices", indices.clone())
    average = moving_average(model, Recipe(1, ema_decay=0.9))
    assert average is not None
    for _ in range(5):
        average.update_parameters(model)
    assert torch.equal(average.module.indices, indices)


def test_the_average_is_what_is_judged_and_left() -> None:
    recipe = Recipe(epochs=1, lr=0.05, batch_size=16, ema_decay=0.5, padding=0, flip=False, precision="fp32")
    model, validation = tiny_cnn(), bars(60, seed=1)
    iterator = fit(model, bars(64), validation, NORMALISATION, recipe, 0)
    record = next(iterator)
    raw = snapshot(model)
    assert list(iterator) == []
    scored = evaluate_data(model, validation, NORMALISATION)
    assert (scored.top1, scored.loss) == (record.validation_top1, record.validation_loss)
    assert any(not torch.equal(raw[name], tensor) for name, tensor in model.state_dict().items())


def test_a_teacher_is_learnt_from_and_left_as_it_is() -> None:
    data, teacher = bars(96), tiny_cnn()
    with torch.no_grad():
        teacher[-1].bias.copy_(torch.tensor([0.0, 6.0, 0.0]))  # says "1" to everything
    before = snapshot(teacher)
    recipe = Recipe(epochs=6, lr=0.1, batch_size=16, distillation=1.0, padding=0, flip=False, precision="fp32")
    model = tiny_cnn()
    records = list(fit(model, data, None, NORMALISATION, recipe, 0, teacher=teacher))
    assert records[-1].train_top1 == pytest.approx(1 / 3)  # of three classes, as the teacher
    assert records[-1].train_loss < 0.1 * records[0].train_loss
    assert_equal_weights(snapshot(teacher), before)
    assert teacher.training


class Fitted(NamedTuple):
    records: list[EpochRecord]
    weights: dict[str, Tensor]


def whole_and_resumed(folder: Path, broken_off_after: int, device: str) -> tuple[Fitted, Fitted]:
    """Fits with everything: undisturbed, and broken off after so many epochs."""
    data, teacher = (bars(100), bars(60, seed=1), NORMALISATION, EVERYTHING, 3), tiny_cnn(dropout=0.5).to(device)
    whole, broken_off, resumed = (tiny_cnn().to(device) for _ in range(3))
    expected = list(fit(whole, *data, teacher=teacher))
    broken = fit(broken_off, *data, checkpoint_dir=folder, teacher=teacher)
    for _ in range(broken_off_after):
        next(broken)
    broken.close()
    records = list(fit(resumed, *data, checkpoint_dir=folder, teacher=teacher))
    return Fitted(expected, snapshot(whole)), Fitted(records, snapshot(resumed))


@pytest.mark.gpu
def test_a_broken_off_fit_with_everything_goes_on_on_a_gpu(tmp_path: Path) -> None:
    """To rounding: not all of its sums are in a fixed order."""
    whole, resumed = whole_and_resumed(tmp_path, 3, "cuda")
    assert [record.epoch for record in resumed.records] == [1, 2, 3, 4]
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("broken_off_after", [1, 3])
def test_a_broken_off_fit_with_everything_resumes_bit_equal(tmp_path: Path, broken_off_after: int) -> None:
    whole, resumed = whole_and_resumed(tmp_path, broken_off_after, "cpu")
    assert [record[:6] for record in resumed.records] == [record[:6] for record in whole.records]  # all but times
    assert_equal_weights(resumed.weights, whole.weights)


def test_distillation_without_teacher_is_refused_and_the_other_way_round() -> None:
    for recipe, teacher in ((EVERYTHING, None), (Recipe(1), tiny_cnn())):
        with pytest.raises(UserError, match="distillation needs a teacher, and a teacher distillation"):
            fit(tiny_cnn(), bars(6), None, NORMALISATION, recipe, 0, teacher=teacher)


def test_a_square_is_erased_anywhere() -> None:
    images = torch.full((4000, 1, 6, 8), 200, dtype=torch.uint8)
    erased = augment(images, torch.Generator().manual_seed(0), 0, False, 4) == 0  # (B, 1, H, W)
    rows, columns = erased.any(3).sum(2).flatten(), erased.any(2).sum(2).flatten()
    assert torch.equal(erased.flatten(1).sum(1), rows * columns)  # rectangles
    assert {int(rows.min()), int(rows.max())} == {2, 4} and {int(columns.min()), int(columns.max())} == {2, 4}
    part = erased.float().mean(0)[0]  # (H, W)
    assert float(part[2:-2, 2:-2].mean()) == pytest.approx(4 / 6 * 4 / 8, abs=0.02)
    assert torch.equal(augment(images, torch.Generator().manual_seed(0), 0, False), images)


@pytest.mark.parametrize(("config", "epochs", "padding", "flip"), [("cifar10", 400, 4, True), ("digits", 20, 3, False)])
def test_the_papers_fine_tuning_is_the_flags_that_the_readme_names(
    config: str, epochs: int, padding: int, flip: bool
) -> None:
    words = ["--config", f"configs/{config}_resnet56.yaml"]
    default = finetuning_recipe(experiment_from(parse("pretrain", "", words)))
    assert (default.epochs, default.lr, default.schedule, default.distillation) == (epochs, None, "cosine", 0.9)
    (flags,) = re.findall(r"The paper's recipe:\n`([^`]*)`", (ROOT / "README.md").read_text())
    words += flags.replace("--epochs", "--finetune_epochs").split()  # as finetune.py calls them
    paper = finetuning_recipe(experiment_from(parse("pretrain", "", words)))
    expected = Recipe(400, 0.1, 0.9, weight_decay=1e-4, batch_size=256, schedule="paper", precision="fp32")
    assert paper == replace(expected, padding=padding, flip=flip)  # these are the data set's


def test_a_distillation_beyond_all_of_the_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"finetune_distillation must be in \[0, 1\], but got 1.5"):
        experiment_from(parse("pretrain", "", ["--output", "runs/any", "--finetune_distillation", "1.5"]))
