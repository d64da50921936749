"""Statistics and training of batch norm on a CPU, against exact sums and PyTorch's own, in the layouts that occur."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import snapshot
from torch import Tensor, nn

from cacp.batchnorm import mean_and_variance, wide_batch_norms

FORMATS = {
    "contiguous": lambda y: y.contiguous(),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "transposed": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda y: y.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(3, 7, 5), (16, 8, 8), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("channels", [3, 11, 16, 37, 512, 600])
def test_mean_and_variance(channels: int, shape: tuple[int, int, int], layout: str) -> None:
    count, height, width = shape
    y = 1 + torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(channels))
    for dtype in (torch.float32, torch.bfloat16):
        values = FORMATS[layout](y.to(dtype))
        mean, variance = mean_and_variance(values)
        assert mean.dtype == variance.dtype == torch.float32
        exact = torch.var_mean(values.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance.double(), exact[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [3, 10, 100, 1000])
def test_variance_next_to_a_large_mean(ratio: float) -> None:
    y = ratio + torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        exact = torch.var(y.to(dtype).double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean_and_variance(y.to(dtype))[1].double(), exact, rtol=1e-3, atol=0)


def test_mean_and_variance_of_vectors() -> None:
    y = 1 + torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    mean, variance = mean_and_variance(y)
    torch.testing.assert_close(mean, y.mean(0))
    torch.testing.assert_close(variance, y.var(0, correction=0))


def network(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3, bias=False), norm, nn.ReLU(inplace=True), nn.Conv2d(channels, 4, 3)
    )
    return layers.to(memory_format=torch.channels_last)


def results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and statistics after two steps."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        outputs = model(images + step)
        model.zero_grad()
        outputs.square().mean().backward()
        found[f"outputs {step}"] = outputs.detach()
        found |= {f"{name} {step}": one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return found | dict(snapshot(model))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels", [1, 5, 8, 16, 31])
def test_wide_batch_norms_train_as_pytorch_s(channels: int, momentum: float | None, layout: str) -> None:
    plain = network(channels).double()
    plain[1].momentum = momentum
    wide = copy.deepcopy(plain)
    images = FORMATS[layout](torch.randn(6, 3, 10, 14, generator=torch.Generator().manual_seed(1)).double())
    expected = results(plain, images)
    with wide_batch_norms(wide):
        found = results(wide, images)
        assert ("forward" in vars(wide[1])) == (channels % 16 != 0)
    assert "forward" not in vars(wide[1])
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_bf16_and_evaluation_and_no_statistics() -> None:
    images = torch.randn(8, 3, 18, 18, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    plain = network(8)
    wide = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(plain, images)
        with wide_batch_norms(wide):
            found = results(wide, images)
    for name in expected:
        assert float((found[name] - expected[name]).abs().max()) <= 0.02 * float(expected[name].abs().max()), name
    assert found["1.running_var"].dtype == torch.float32
    wide.load_state_dict(plain.state_dict())
    with wide_batch_norms(wide):
        assert torch.equal(wide.eval()(images), plain.eval()(images))
    bare = nn.BatchNorm2d(5, track_running_stats=False)
    inputs = torch.randn(4, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    expected_outputs = bare(inputs)
    with wide_batch_norms(bare):
        torch.testing.assert_close(bare(inputs), expected_outputs)


def test_a_single_value_a_channel_is_refused_as_by_pytorch() -> None:
    norm = nn.BatchNorm2d(5)
    with wide_batch_norms(norm), pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 5, 1, 1).contiguous(memory_format=torch.channels_last))
