"""Criteria against hand values, and Taylor against gates that autograd differentiates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, resnet20
from torch import Tensor, nn

from cacp.graph import trace
from cacp.importance import CRITERIA, channel_importance, channel_orders, fpgm, l1, l2
from cacp.schema import ChannelGroups, UserError

# Three 1 x 1 filters over two inputs, a 3-4-5 triangle: (0, 0), (3, 0), (3, -4)
TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, -4.0]])[:, :, None, None]  # (3, 2, 1, 1)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(10, (8,), generator=generator)


def groups_of(model: nn.Module, scope: str = "inner") -> ChannelGroups:
    return trace(model, torch.zeros(1, 3, 12, 12), scope)


def gate_gradients(model: nn.Module, norms: list[str], images: Tensor, labels: Tensor) -> list[Tensor]:
    """dL/dg at g = 1 of gates (C,) that multiply the outputs of the named modules."""
    gates, handles = [], []
    for name in norms:
        norm = model.get_submodule(name)
        gates.append(torch.ones(norm.num_features, requires_grad=True))
        hook = lambda _, __, output, gate=gates[-1]: output * gate[:, None, None]  # noqa: E731
        handles.append(norm.register_forward_hook(hook))
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), gates)
    for handle in handles:
        handle.remove()
    return list(gradients)


def test_norms_by_hand() -> None:
    assert l1(TRIANGLE).tolist() == [0, 3, 7]
    assert l2(TRIANGLE).tolist() == [0, 3, 5]
    assert fpgm(TRIANGLE).tolist() == [3 + 5, 3 + 4, 5 + 4]


@pytest.mark.parametrize(("criterion", "scores"), [("l1", [0, 3, 7]), ("l2", [0, 3, 5]), ("fpgm", [8, 7, 9])])
def test_a_stream_sums_over_its_producers(criterion: str, scores: list[float]) -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) + m.b(x)),
        a=nn.Conv2d(2, 3, 1, bias=False), b=nn.Conv2d(2, 3, 1, bias=False), c=nn.Conv2d(3, 4, 1),
    )  # fmt: skip
    model.a.weight.data.copy_(TRIANGLE)
    model.b.weight.data.copy_(2 * TRIANGLE)
    groups = trace(model, torch.zeros(1, 2, 4, 4), "all")
    (importance,) = channel_importance(model, groups, criterion).values()
    assert importance.tolist() == [3 * score for score in scores]


def test_orders_begin_with_the_most_important_and_ties_go_to_the_lower_index() -> None:
    orders = channel_orders({"a": torch.tensor([1.0, 3.0, 2.0, 3.0]), "b": torch.zeros(3)})
    assert orders["a"].tolist() == [1, 3, 2, 0]
    assert orders["b"].tolist() == [0, 1, 2]


def test_taylor_of_one_batch_is_the_squared_gradient_of_a_gate() -> None:
    model = resnet20()
    importance = channel_importance(model, groups_of(model), "taylor", [batch(0)])
    norms = [name.replace("conv1", "bn1") for name in importance]
    for scores, gradient in zip(importance.values(), gate_gradients(model, norms, *batch(0)), strict=True):
        torch.testing.assert_close(scores, gradient**2, rtol=2e-4, atol=1e-9)
    assert len(norms) == 9


def test_taylor_of_a_stream_gates_all_its_layers_together() -> None:
    model = resnet20()
    groups = groups_of(model, "all")
    importance = channel_importance(model, groups, "taylor", [batch(0)])
    norms = [name.replace("conv", "bn") for name in groups["conv1"].producers]
    expected = torch.stack(gate_gradients(model, norms, *batch(0))).sum(0) ** 2
    torch.testing.assert_close(importance["conv1"], expected, rtol=2e-4, atol=1e-9)


def test_taylor_is_the_mean_over_batches() -> None:
    model = resnet20()
    groups = groups_of(model)
    single = [channel_importance(model, groups, "taylor", [batch(seed)]) for seed in (0, 1)]
    both = channel_importance(model, groups, "taylor", [batch(0), batch(1)])
    for name, scores in both.items():
        torch.testing.assert_close(scores, (single[0][name] + single[1][name]) / 2, rtol=1e-6, atol=0)


def test_taylor_leaves_weights_gradients_and_mode_alone() -> None:
    model = resnet20().train()
    state = copy.deepcopy(model.state_dict())
    channel_importance(model, groups_of(model), "taylor", [batch(0)])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_random_is_reproducible_and_differs_between_seeds() -> None:
    model = resnet20()
    groups = groups_of(model)
    first, again, other = (channel_importance(model, groups, "random", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_channel_of_every_prunable_group(criterion: str) -> None:
    model = resnet20()
    groups = groups_of(model, "all")
    importance = channel_importance(model, groups, criterion, [batch(0)])
    assert [(name, *scores.shape) for name, scores in importance.items()] == [
        (group.name, group.channels) for group in groups.prunable
    ]
    assert all(scores.dtype == torch.float32 and scores.isfinite().all() for scores in importance.values())


def test_what_cannot_be_scored_is_refused() -> None:
    model = resnet20()
    with pytest.raises(
        UserError, match="criterion must be one of l1, l2, fpgm, taylor, reconstruction, gfi, random, but got 'l3'"
    ):
        channel_importance(model, groups_of(model), "l3")
    with pytest.raises(UserError, match="needs batches of training images, but got none"):
        channel_importance(model, groups_of(model), "taylor", [])
    bare = Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1))
    with pytest.raises(UserError, match="behind every group; keep those without whole: --ignore a"):
        channel_importance(bare, groups_of(bare), "taylor", [batch(0)])
