"""Evaluation, batch norm recalibration and precision, against hand values."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_equal_weights, bars, snapshot, tiny_cnn
from torch import nn

from cacp.data import normalise
from cacp.evaluation import evaluate, evaluate_data, recalibrate_batchnorm, resolve_precision, synchroniser
from cacp.schema import Normalisation, UserError

NORMALISATION = Normalisation((0.5,), (0.25,))


def test_precision_follows_what_the_cpu_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert [resolve_precision(name, cpu) for name in ("auto", "bf16", "fp32")] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", cpu) == torch.float32
    with pytest.raises(UserError, match="auto or fp32 on cpu, which has no bf16"):
        resolve_precision("bf16", cpu)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # a torch without the query
    assert resolve_precision("auto", cpu) == torch.float32
    with pytest.raises(UserError, match="precision must be one of auto, fp32, bf16, but got 'fp16'"):
        resolve_precision("fp16", cpu)


def test_a_gpu_is_waited_for_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchroniser(torch.device("cpu"))()
    assert waited == []
    synchroniser(torch.device("cuda:1"))()
    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_evaluate_equals_the_hand_value_at_every_batch_size(batch_size: int) -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 5.0]]).reshape(3, 2, 1, 1)
    labels = torch.tensor([0, 0, 1])
    # -log softmax of a pair with margin d is log(1 + exp(-d)); the margins of the right answers are 2, -1, 2
    expected = (2 * math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 3
    result = evaluate(nn.Flatten(), logits, labels, batch_size)
    assert result.top1 == pytest.approx(2 / 3, abs=1e-12)
    assert result.loss == pytest.approx(expected, abs=1e-6)
    right = [1 / (1 + math.exp(-margin)) for margin in (2, -1, 2)]
    assert result.probability == pytest.approx(sum(right) / 3, abs=1e-6)


def test_evaluate_uses_running_statistics_and_restores_every_flag() -> None:
    model = tiny_cnn(dropout=0.5).train()
    model[1].eval()  # frozen by the caller
    flags = [module.training for module in model.modules()]
    before = snapshot(model)
    images, labels = torch.randn(7, 1, 8, 8), torch.arange(7) % 3
    first, second = evaluate(model, images, labels, 7), evaluate(model, images, labels, 3)
    assert first == pytest.approx(second, abs=1e-6)
    assert [module.training for module in model.modules()] == flags
    assert_equal_weights(snapshot(model), before)


def test_evaluate_data_equals_evaluate_on_the_normalised_images() -> None:
    model, data = tiny_cnn(), bars(23)
    images = normalise(data.batch(torch.arange(23)), NORMALISATION)
    assert evaluate_data(model, data, NORMALISATION, batch_size=5) == pytest.approx(
        evaluate(model, images, data.labels, 23), abs=1e-6
    )


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_evaluate_is_an_error(count: int, batch_size: int) -> None:
    with pytest.raises(UserError, match=f"images={count}, batch_size={batch_size}"):
        evaluate(tiny_cnn(), torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64), batch_size)


def test_one_batch_gives_its_mean_and_unbiased_variance() -> None:
    images = torch.randn(10, 3, 4, 4) * 3 + 1
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(99)
    recalibrate_batchnorm(model, images, 10)
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var, images.var((0, 2, 3), unbiased=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(12, 4, [4, 4, 4]), (9, 8, [5, 4]), (10, 4, [4, 3, 3])])
def test_several_batches_give_the_average_of_theirs(count: int, batch_size: int, sizes: list[int]) -> None:
    images = torch.randn(count, 3, 4, 4)
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate_batchnorm(model, images, batch_size)
    batches = images.split(sizes)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3), unbiased=True) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var, variances, rtol=1e-5, atol=1e-6)
    assert int(model[0].num_batches_tracked) == len(sizes)


def test_recalibration_is_deterministic_with_dropout_and_restores_the_model() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3)).train()
    model[2].eval()
    images = torch.randn(10, 3, 4, 4)
    recalibrate_batchnorm(model, images, 10)
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    first = snapshot(model)
    recalibrate_batchnorm(model, images, 10)
    assert_equal_weights(snapshot(model), first)
    assert (model[1].momentum, model[2].momentum) == (0.3, 0.1)
    assert [module.training for module in model] == [True, True, False]


def test_a_model_without_batch_norm_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    before = snapshot(model)
    recalibrate_batchnorm(model, torch.randn(2, 3, 4, 4), 2)
    assert_equal_weights(snapshot(model), before)
