"""What several test files share: one thread, networks from a few lines, random policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cacp.models import build_model
from cacp.schema import ChannelGroups, Policy


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits, for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A network from its layers and what it does with them: Net(lambda m, x: m.b(m.a(x)), a=..., b=...)."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, its batch norms with random statistics and affine parameters of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            tensors = (module.weight, module.bias, module.running_mean, module.running_var)
            for tensor, low in zip(tensors, (0.5, -0.5, -0.5, 0.5), strict=True):
                if tensor is not None:
                    tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def resnet20(seed: int = 0) -> nn.Module:
    return lively(build_model("resnet20", 10, seed=seed), seed)


def random_policy(groups: ChannelGroups, seed: int) -> Policy:
    """Any number of channels of every prunable group, from one to all of them, at random."""
    generator = np.random.default_rng(seed)
    keep = {}
    for group in groups.prunable:
        count = int(generator.integers(1, group.channels + 1))
        keep[group.name] = tuple(sorted(generator.choice(group.channels, count, replace=False).tolist()))
    return Policy(keep, "random")


def keep_all(groups: ChannelGroups) -> Policy:
    return Policy({group.name: tuple(range(group.channels)) for group in groups.prunable}, "none")


def policy_counts(groups: ChannelGroups, policy: Policy) -> list[int]:
    return [len(policy.keep[group.name]) for group in groups.prunable]
