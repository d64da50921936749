"""What several test files share: one thread, networks from a few lines, random policies, a finished run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, TINY, Call, run
from torch import Tensor, nn

from cacp.command import run_command
from cacp.data import ImageData
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
    """Any number of channels of every prunable group, from one to all of them, at random; a block counts as one."""
    generator = np.random.default_rng(seed)
    keep = {}
    for group in groups.prunable:
        blocks = group.channels // group.block
        count = int(generator.integers(1, blocks + 1))
        chosen = sorted(generator.choice(blocks, count, replace=False).tolist())
        keep[group.name] = tuple(block * group.block + index for block in chosen for index in range(group.block))
    return Policy(keep, "random")


def keep_all(groups: ChannelGroups) -> Policy:
    return Policy({group.name: tuple(range(group.channels)) for group in groups.prunable}, "none")


def policy_counts(groups: ChannelGroups, policy: Policy) -> list[int]:
    return [len(policy.keep[group.name]) for group in groups.prunable]


def bars(count: int, seed: int = 0) -> ImageData:
    """8 x 8 noise with a bright row (class 0), column (1) or diagonal (2): (count, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        place = int(torch.randint(2, 6, (), generator=generator))
        shape = {0: torch.zeros(8, 8), 1: torch.zeros(8, 8), 2: torch.eye(8)}[label]
        if label == 0:
            shape[place] = 1
        elif label == 1:
            shape[:, place] = 1
        image[0][shape.bool()] = 255
    return ImageData(images, labels, ("row", "column", "diagonal"))


def tiny_cnn(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(12, 3),
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Like `run`, in this process: the imports of an entry point take seconds."""

    def called(command: str, *arguments: object, status: int = 0) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
        monkeypatch.setattr("cacp.latency.SECONDS", 0.0)  # as few repeats as it takes
        ended = 0
        try:
            run_command(importlib.import_module(command).main)
        except SystemExit as exit_:
            ended = exit_.code
        out, err = capsys.readouterr()
        assert ended == status, out + err
        return out if status == 0 else err

    return called


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after all four commands."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for command in ("pretrain", "search"):
        run(command, *TINY, "--output", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["export.py", str(folder)])
        patch.setattr("cacp.latency.SECONDS", 0.0)  # as few repeats as it takes
        importlib.import_module("export").main()
    run("finetune", folder)
    return folder
