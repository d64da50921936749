"""Fused networks against plain PyTorch: statistics and logits, pattern by pattern, in fp32 and bf16, in threads."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, assert_equal_weights, lively, random_policy, resnet20, snapshot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cacp.evaluation import recalibrate_batchnorm, resolve_precision
from cacp.fusion import FusedNetwork, Moments, Unfusable, units
from cacp.graph import trace
from cacp.schema import UserError
from cacp.slicing import slice_model

BATCH = 6
FP32_TOLERANCE = 1e-5  # of the largest logit; the largest seen is 1e-6
BF16_TOLERANCE = 0.05  # of the largest logit; the largest seen is 0.02, plain PyTorch's as well
needs_bf16 = pytest.mark.skipif(
    resolve_precision("auto", torch.device("cpu")) != torch.bfloat16, reason="this CPU has no bf16 arithmetic"
)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 7, 5, generator=torch.Generator().manual_seed(seed))


def batches(calibration: Tensor) -> tuple[Tensor, ...]:
    return calibration.tensor_split(math.ceil(len(calibration) / BATCH))  # as `recalibrate_batchnorm` cuts them


def plain(model: nn.Module, calibration: Tensor, x: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """PyTorch's logits; the model gets the statistics of `calibration`."""
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        recalibrate_batchnorm(model, calibration.clone(), BATCH)  # clones: networks may overwrite their input
        return model.eval()(x.clone())


def fused(network: FusedNetwork, model: nn.Module, calibration: Tensor, x: Tensor) -> Tensor:
    network.load(model)
    network.set_statistics([network.moments(batch.clone()) for batch in batches(calibration)])
    return network(x.clone())


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every entry within `tolerance` times the largest expected one."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def assert_near_moments(mean: Tensor, variance: Tensor, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Means within `tolerance` deviations, variances within as large a share of theirs."""
    assert ((mean - expected[0]).abs() / (expected[1] + 1e-3).sqrt()).max() <= tolerance
    assert ((variance - expected[1]).abs() / (expected[1] + 1e-3)).max() <= tolerance


def assert_near_statistics(model: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for norm, other in zip(norms(model), norms(expected), strict=True):
        assert_near_moments(norm.running_mean, norm.running_var, (other.running_mean, other.running_var), tolerance)


def equal_moments(first: list[Moments], second: list[Moments]) -> bool:
    return all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


# patterns -------------------------------------------------------------------------------------------------------------

Run = Callable[[Any, Tensor], Tensor]
Layers = Callable[[], dict[str, nn.Module]]
Build = Callable[[int], nn.Module]  # from a seed


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2} | options)


def builder(run: Run, layers: Layers) -> Build:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        ordinary = {"stem": conv(3, 8), "conv": conv(8, 8), "norm": nn.BatchNorm2d(8)}
        return lively(Net(run, **ordinary | layers()), seed)

    return build


def case(name: str, units: list[str], run: Run, layers: Layers = dict) -> Any:
    return pytest.param(builder(run, layers), units, id=name)


def chain(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(m.stem(x))))


def residual(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    return F.relu(m.norm(m.conv(h)) + h)


def sum_over_the_norm(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.norm(m.conv(h))
    y += h
    return F.relu(y) * h


def sum_over_the_operand(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    h += m.norm(m.conv(h))
    return F.relu(h) * h


def relu_over_the_input(relu: Callable[[Any, Tensor], Tensor]) -> Run:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        y = m.conv(h)
        after = relu(m, h)
        return F.relu(m.norm(y)) - after

    return run


def relu_over_the_input_as_operand(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    return F.relu(m.norm(m.conv(h)) + F.relu(h, inplace=True))


def relu_over_the_norms_input(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    y = m.norm(h)
    return F.relu(y + F.relu(h, inplace=True))


def with_parameter(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(m.stem(x)))) + m.inner.scale * m.inner(x).mean()


def parameter_layers(*shape: int) -> dict[str, nn.Module]:
    inner = nn.Identity()
    inner.scale = nn.Parameter(torch.randn(shape))
    return {"inner": inner}


def twice(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(F.relu(m.norm(m.conv(m.stem(x)))))))


CASES = [
    case("bias", ["conv norm relu"], chain),
    case("no bias", ["conv norm relu"], chain, lambda: {"conv": conv(8, 8, bias=False)}),
    case("relu module", ["conv norm relu"], lambda m, x: m.relu(m.norm(m.stem(x))), lambda: {"relu": nn.ReLU(True)}),
    case("nothing after", ["conv norm"], lambda m, x: m.norm(m.stem(x))),
    case("norm of the input", ["norm relu"], lambda m, x: F.relu(m.norm(x)), lambda: {"norm": nn.BatchNorm2d(3)}),
    case("two readers", ["conv norm"], lambda m, x: F.relu(y := m.norm(m.stem(x))) + y),
    case("two norms of a conv", ["norm relu", "norm"], lambda m, x: F.relu(m.norm(h := m.stem(x))) - m.norm(h)),
    case("residual, norm first", ["conv norm add relu"], residual),
    case("residual, norm second", ["conv norm add relu"], lambda m, x: F.relu((h := m.stem(x)) + m.norm(m.conv(h)))),
    case("residual without relu", ["conv norm add"], lambda m, x: m.norm(m.conv(h := m.stem(x))) + h),
    case("sum of two norms", ["conv norm add relu", "conv norm"],
         lambda m, x: F.relu(m.norm(m.conv(h := m.stem(x))) + m.second(m.stem(h[:, :3]))),
         lambda: {"second": nn.BatchNorm2d(8)}),
    case("+= over the norm", ["conv norm add relu"], sum_over_the_norm),
    case("+= over the operand", ["conv norm add"], sum_over_the_operand),
    case("add_ over the operand", ["conv norm"],
         lambda m, x: F.relu((h := m.stem(x)).add_(m.norm(m.conv(h)))) - 3 * h),
    case("torch.add", ["conv norm add relu"], lambda m, x: F.relu(torch.add(h := m.stem(x), m.norm(m.conv(h))))),
    case("alpha", ["conv norm"], lambda m, x: F.relu(torch.add(m.norm(m.conv(h := m.stem(x))), h, alpha=3))),
    case("operand (B, C, 1, 1)", ["conv norm"],
         lambda m, x: F.relu(m.norm(m.conv(h := m.stem(x))) + h.mean((2, 3), keepdim=True))),
    case("expanded operand", ["conv norm add relu"],
         lambda m, x: F.relu(m.norm(m.conv(h := m.stem(x))) + h.mean((2, 3), keepdim=True).expand(-1, -1, 7, 5))),
    case("operand of one image", ["conv norm add relu"],
         lambda m, x: F.relu(m.norm(m.stem(x)) + m.other(x).mean(0, keepdim=True)), lambda: {"other": conv(3, 8)}),
    case("strided operand", ["conv norm add relu"],
         lambda m, x: F.relu(m.norm(m.conv(h := m.stem(x))) + h[:, :, ::2, ::2]),
         lambda: {"conv": conv(8, 8, stride=2)}),
    case("itself", ["conv norm"], lambda m, x: F.relu((y := m.norm(m.stem(x))) + y)),
    case("scalars", ["conv norm", "conv norm"], lambda m, x: F.relu(0.5 + m.norm(m.conv(m.norm(m.stem(x)) + 2.5)))),
    case("grouped", ["conv norm relu"], chain, lambda: {"conv": conv(8, 8, groups=4)}),
    case("depthwise", ["conv norm relu"], chain, lambda: {"conv": conv(8, 8, groups=8)}),
    case("depthwise residual", ["conv norm add relu"], residual, lambda: {"conv": conv(8, 8, groups=8)}),
    case("grouped residual", ["conv norm add relu"], residual, lambda: {"conv": conv(8, 8, groups=2)}),
    case("1x1", ["conv norm add relu"], residual, lambda: {"conv": conv(8, 8, 1)}),
    case("dilation", ["conv norm add relu"], residual, lambda: {"conv": conv(8, 8, dilation=2, padding=2)}),
    case("stride", ["conv norm relu"], chain, lambda: {"conv": conv(8, 8, stride=(2, 1), padding=(0, 2))}),
    case("padding same", ["norm add relu"], residual, lambda: {"conv": conv(8, 8, padding="same")}),
    case("padding reflect", ["norm add relu"], residual, lambda: {"conv": conv(8, 8, padding_mode="reflect")}),
    case("wide", ["conv norm add relu"], residual,
         lambda: {"stem": conv(3, 37), "conv": conv(37, 37), "norm": nn.BatchNorm2d(37)}),
    case("wide padding same", ["norm add relu"], residual,
         lambda: {"stem": conv(3, 37), "conv": conv(37, 37, padding="same"), "norm": nn.BatchNorm2d(37)}),
    case("transposed conv", ["norm relu"], chain, lambda: {"conv": nn.ConvTranspose2d(8, 8, 2)}),
    case("no affine", ["conv norm add relu"], residual, lambda: {"norm": nn.BatchNorm2d(8, eps=0.1, affine=False)}),
    case("no affine, no conv", ["norm relu"], lambda m, x: F.relu(m.norm(x)),
         lambda: {"norm": nn.BatchNorm2d(3, eps=0.1, affine=False)}),
    case("no statistics", ["conv norm"], lambda m, x: F.relu(m.free(m.conv(m.norm(m.stem(x))))),
         lambda: {"free": nn.BatchNorm2d(8, track_running_stats=False)}),
    case("linear", ["norm relu"], lambda m, x: F.relu(m.norm(m.hidden(x.flatten(1)))),
         lambda: {"hidden": nn.Linear(105, 8), "norm": nn.BatchNorm1d(8)}),
    case("1d conv", ["norm add relu"], lambda m, x: F.relu(m.norm(m.conv(h := x.flatten(2))) + h),
         lambda: {"conv": nn.Conv1d(3, 3, 3, padding=1), "norm": nn.BatchNorm1d(3)}),
    case("conv and norm called twice", ["conv norm relu", "conv norm relu"], twice),
    case("bare parameter", ["conv norm relu"], with_parameter, lambda: parameter_layers(8, 1, 1)),
    case("size as operand", ["conv norm"], lambda m, x: F.relu(m.norm(m.stem(x)) + x.size(2))),
    case("constant tensor", ["conv norm relu"],
         lambda m, x: chain(m, x * torch.tensor([1.0, 2.0, 3.0])[:, None, None])),
    case("norm by keyword", ["conv norm relu"], lambda m, x: F.relu(m.norm(input=m.stem(x)))),
    case("conv by keyword", ["conv norm relu"], lambda m, x: F.relu(m.norm(m.stem(input=x)))),
    case("layer named fused_0", ["conv norm relu"], lambda m, x: m.fused_0(chain(m, x)),
         lambda: {"fused_0": conv(8, 4)}),
    case("scaled operand", ["conv norm add relu"],
         lambda m, x: F.relu(m.norm(m.conv(h := m.stem(x))) + h * m.inner.scale), lambda: parameter_layers(8, 1, 1)),
    case("operand of a conv, norm of the input", ["norm add relu"], lambda m, x: F.relu(m.norm(x) + m.stem(x)),
         lambda: {"stem": conv(3, 3), "norm": nn.BatchNorm2d(3)}),
    case("parameter as operand", ["conv norm add relu"], lambda m, x: F.relu(m.norm(m.stem(x)) + m.inner.scale),
         lambda: parameter_layers(1, 8, 7, 5)),
    case("dropout", ["conv norm relu"], lambda m, x: m.drop(F.dropout(chain(m, x), 0.5, m.training)),
         lambda: {"drop": nn.Dropout(0.5)}),
    case("no norm", [], lambda m, x: F.relu(m.stem(x)), lambda: {"norm": nn.Identity()}),
]  # fmt: skip


@pytest.mark.parametrize(("build", "units"), CASES)
def test_statistics_and_logits_equal_pytorchs(build: Build, units: list[str]) -> None:
    model, calibration, x = build(0), images(11), images(9, 1)
    reference = copy.deepcopy(model)
    expected = plain(reference, calibration, x)
    network = FusedNetwork(build(1).train(), x[:1])  # its weights and training mode must not matter
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = [tensor.contiguous(memory_format=layout) for tensor in (calibration, x)]
        assert_near(fused(network, model, *pixels), expected, FP32_TOLERANCE)
        assert_near_statistics(model, reference, FP32_TOLERANCE)
    assert fusions(network) == units


def fusions(network: FusedNetwork) -> list[str]:
    """What each unit does in one operation."""
    patterns = [unit._pattern for unit in network._units]
    return [
        " ".join(
            word
            for word, present in (
                ("conv", pattern.convolution is not None),
                ("norm", True),
                ("add", pattern.residual is not None),
                ("relu", pattern.relu),
            )
            if present
        )
        for pattern in patterns
    ]


@needs_bf16
@pytest.mark.parametrize("build", [pytest.param(case.values[0], id=case.id) for case in CASES])
def test_patterns_in_bf16(build: Build) -> None:
    model = build(0)
    calibration, x = images(11), images(9, 1)
    reference = copy.deepcopy(model)
    expected = plain(reference, calibration, x)
    network = FusedNetwork(model, x[:1], torch.bfloat16)
    for dtype, layout in itertools.product(
        (torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)
    ):
        pixels = [tensor.to(dtype).contiguous(memory_format=layout) for tensor in (calibration, x)]
        logits = fused(network, model, *pixels)
        assert_near(logits.float(), expected, 0.02)  # a rounding is 0.004
        assert_near_statistics(model, reference, 0.04)  # of 175 or 210 pixels; the largest seen is 0.02


# writes in place ------------------------------------------------------------------------------------------------------


def unfusable(name: str, run: Run, layers: Layers = dict) -> Any:
    return pytest.param(builder(run, layers), id=name)


def relu_over_the_operand(m: Any, x: Tensor) -> Tensor:
    h, other = m.stem(x), m.other(x)
    total = m.norm(m.conv(h)) + other
    after = F.relu(other, inplace=True)
    return F.relu(total) - after


def unused_result(write: Callable[[Any, Tensor], Tensor]) -> Run:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.stem(x))
        write(m, y)
        return m.conv(y)

    return run


def second_name(m: Any, x: Tensor) -> Tensor:
    h = kept = m.stem(x)
    h += m.norm(m.conv(h))
    return F.relu(h) - 3 * kept


@pytest.mark.parametrize(
    "build",
    [
        unfusable("module", relu_over_the_input(lambda m, h: m.relu(h)), lambda: {"relu": nn.ReLU(True)}),
        unfusable("function", relu_over_the_input(lambda m, h: F.relu(h, inplace=True))),
        unfusable("method", relu_over_the_input(lambda m, h: h.relu_())),
        unfusable("through identity", relu_over_the_input(lambda m, h: F.relu(m.same(h), inplace=True)),
                  lambda: {"same": nn.Identity()}),
        unfusable("through dropout", relu_over_the_input(lambda m, h: F.relu(m.drop(h), inplace=True)),
                  lambda: {"drop": nn.Dropout(0.5)}),
        unfusable("through a view", relu_over_the_input(lambda m, h: F.relu(h[:, ::2], inplace=True).mean())),
        unfusable("the operand", relu_over_the_input_as_operand),
        unfusable("the operand, later", relu_over_the_operand, lambda: {"other": conv(3, 8)}),
        unfusable("the norm's input", relu_over_the_norms_input),
        unfusable("unused F.relu", unused_result(lambda m, y: F.relu(y, inplace=True))),
        unfusable("unused nn.ReLU", unused_result(lambda m, y: m.relu(y)), lambda: {"relu": nn.ReLU(True)}),
        unfusable("unused add_", unused_result(lambda m, y: y.add_(1.0))),
        unfusable("+= under a second name, which torch.fx traces as +", second_name),
    ],
)  # fmt: skip
def test_networks_that_compute_something_else_when_fused_are_refused(build: Build) -> None:
    with pytest.raises(Unfusable, match=r"Net gives other outputs with batch norm fused, by [\d.e-]+ of the largest"):
        FusedNetwork(build(0), images(1))


def test_a_network_that_enlarges_rounding_errors_is_fused() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(99):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 35, 10)).eval()
    reference, x = copy.deepcopy(model), images(4)
    expected, nearby = plain(reference, x, x), plain(reference, x + 1e-6 * images(4, 1), x)
    assert (nearby - expected).abs().max() > 1e-3 * expected.abs().max()  # inputs differ by 1e-6
    FusedNetwork(model, images(1))


def test_networks_that_do_not_run_when_fused_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("unsupported datatype")

    monkeypatch.setattr(units, "_affine", broken)
    with pytest.raises(Unfusable, match=r"ResNet cannot be run .* RuntimeError: unsupported datatype"):
        FusedNetwork(resnet20(), images(1))


# whole networks -------------------------------------------------------------------------------------------------------


def sliced_models(scope: str) -> list[nn.Module]:
    """ResNet-20 dense and with three random policies."""
    model = resnet20()
    groups = trace(model, images(1), scope)
    return [model, *(slice_model(model, groups, random_policy(groups, seed)) for seed in range(3))]


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_models_of_other_shapes_one_after_another(scope: str) -> None:
    models, calibration, x = sliced_models(scope), images(11), images(9, 1)
    network = FusedNetwork(resnet20(seed=1), x[:1])
    first = [fused(network, model, calibration, x) for model in models]
    for model, logits in zip(models, first, strict=True):
        reference = copy.deepcopy(model)
        assert_near(logits, plain(reference, calibration, x), FP32_TOLERANCE)
        assert_near_statistics(model, reference, FP32_TOLERANCE)
    again = [fused(network, model, calibration, x) for model in reversed(models)]
    assert all(torch.equal(*pair) for pair in zip(first, reversed(again), strict=True))
    alone = fused(FusedNetwork(models[1], x[:1]), models[1], calibration, x)
    assert torch.equal(alone, first[1])


def test_moments_change_nothing() -> None:
    model, calibration, x = resnet20(), images(11), images(9, 1)
    network = FusedNetwork(model, x[:1])
    logits = fused(network, model, calibration, x)
    before, pixels = snapshot(model), x.clone()
    first, second = network.moments(x), network.moments(x)
    assert len(first) == 19
    assert equal_moments(first, second)
    assert_equal_weights(snapshot(model), before)
    assert not any(module.training for module in model.modules())
    assert torch.equal(x, pixels)
    assert torch.equal(network(x), logits)


def test_any_memory_format_of_the_images() -> None:
    model, calibration, x = resnet20(), images(11), images(9, 1)
    network = FusedNetwork(model, x[:1])
    logits = fused(network, model, calibration, x)
    for change in (
        lambda pixels: pixels.to(memory_format=torch.channels_last),
        lambda pixels: pixels.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_near(fused(network, model, change(calibration), change(x)), logits, FP32_TOLERANCE)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    model = Net(lambda m, x: m.norm(x) if x.sum() > 0 else x, norm=nn.BatchNorm2d(3))
    with pytest.raises(UserError, match=r"Net cannot be traced by torch.fx: TraceError"):
        FusedNetwork(model, images(1))


@needs_bf16
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_bf16_is_near_fp32(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    calibration, x = (torch.randn(64, 3, 16, 16, generator=generator) for _ in range(2))
    network = FusedNetwork(resnet20(), x[:1], torch.bfloat16)
    for model in sliced_models(scope):
        reference = copy.deepcopy(model)
        expected = fused(FusedNetwork(reference, x[:1]), reference, calibration, x)
        actual = fused(network, model, calibration.bfloat16(), x.bfloat16())
        assert actual.dtype == torch.bfloat16
        assert_near(actual.float(), expected, BF16_TOLERANCE)
        assert not torch.equal(actual.float(), expected)
        assert_near_statistics(model, reference, 0.02)


# arithmetic -----------------------------------------------------------------------------------------------------------


class ElsewhereTensor(Tensor):
    """Says that it is on a GPU and computes on the CPU, and so do the results."""

    device = torch.device("cuda")


@pytest.mark.parametrize("build", [pytest.param(*case.values[:1], id=case.id) for case in CASES])
def test_other_devices_get_the_same(build: Build) -> None:
    model, calibration, x = build(0), images(11), images(9, 1)
    reference = copy.deepcopy(model)
    expected = fused(FusedNetwork(reference, x[:1]), reference, calibration, x)
    network = FusedNetwork(model, x[:1])
    logits = fused(network, model, calibration.as_subclass(ElsewhereTensor), x.as_subclass(ElsewhereTensor))
    assert isinstance(logits, ElsewhereTensor)
    assert_near(logits.as_subclass(Tensor), expected, FP32_TOLERANCE)
    assert_near_statistics(model, reference, FP32_TOLERANCE)


# threads --------------------------------------------------------------------------------------------------------------


def test_threads_compute_what_one_does() -> None:
    model, calibration = resnet20(), images(36)
    network = FusedNetwork(model, calibration[:1])
    fused(network, model, calibration, calibration[:1])
    parts = calibration.split(3)
    moments, logits = [network.moments(part) for part in parts], [network(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        futures = [(pool.submit(network.moments, part), pool.submit(network, part)) for part in parts]
        results = [(first.result(), second.result()) for first, second in futures]
    assert all(torch.equal(*pair) for pair in zip((result[1] for result in results), logits, strict=True))
    assert all(equal_moments(*pair) for pair in zip((result[0] for result in results), moments, strict=True))
