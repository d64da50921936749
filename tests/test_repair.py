"""Repair against torch's least squares, and the criterion that counts what a repair cannot mend against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, keep_all, lively, random_policy, resnet20
from torch import Tensor, nn

from cacp import reconstruction
from cacp.gram import columns, readers
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.repair import Repair
from cacp.schema import Policy, UserError
from cacp.slicing import kept_entries, slice_model

IMAGES = torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def streams() -> nn.Module:
    """A residual stream, a layer with a bias, a concatenation, and a linear layer behind a flattened feature map."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.norm(m.b(a)) + a)
        return m.out(torch.cat([F.max_pool2d(b, 6), F.max_pool2d(F.relu(m.c(b)), 6)], 1).flatten(1))

    layers = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 3, padding=1, bias=False)}
    torch.manual_seed(0)
    net = Net(run, **layers, norm=nn.BatchNorm2d(6), c=nn.Conv2d(6, 5, 1), out=nn.Linear(44, 4))
    return lively(net)


def channels_last() -> nn.Module:
    """Linear layers over the last axis of feature maps, as ConvNeXt has them."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        hidden = F.gelu(m.a(m.stem(x).permute(0, 2, 3, 1)))
        return m.out(m.b(hidden).permute(0, 3, 1, 2).mean((2, 3)))

    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 5, 3), "a": nn.Linear(5, 12), "b": nn.Linear(12, 6), "out": nn.Linear(6, 4)}
    return Net(run, **layers).eval()


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """(N P, E) unfolded inputs of a layer on IMAGES, with a column of ones where it has a bias."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(IMAGES)
    hook.remove()
    rows = seen[0].double()
    if isinstance(layer, nn.Linear):
        rows = rows.reshape(-1, layer.in_features)
    else:
        rows = F.unfold(rows, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
        rows = rows.transpose(1, 2).flatten(0, 1)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def parameters_of(layer: nn.Module) -> Tensor:
    """(E, O) with the bias as the last row."""
    weights = layer.weight.detach().double().flatten(1)
    return (weights if layer.bias is None else torch.cat([weights, layer.bias.detach().double()[:, None]], 1)).T


@pytest.mark.parametrize(
    ("build", "scope", "count"),
    [
        (resnet20, "inner", 9),
        (resnet20, "all", 19),
        (streams, "inner", 1),
        (streams, "all", 3),
        (channels_last, "inner", 3),
    ],
)
def test_every_reader_gets_the_weights_of_torchs_least_squares(
    build: Callable[[], nn.Module], scope: str, count: int
) -> None:
    model = build()
    groups = trace(model, IMAGES[:1], scope)
    policy = random_policy(groups, 1)
    sliced = slice_model(model, groups, policy)
    Repair(model, groups, IMAGES)(sliced, policy)
    checked = 0
    for name, reader in readers(model, groups, []).items():
        kept = kept_entries(reader.inputs, groups, policy)
        if kept is None:
            continue
        layer, rows = model.get_submodule(name), inputs_of(model, name)
        chosen = columns(layer, torch.tensor(kept)).tolist() + ([] if layer.bias is None else [rows.shape[1] - 1])
        outputs = rows @ parameters_of(layer)
        if reader.outputs is not None and (out := kept_entries(reader.outputs, groups, policy)) is not None:
            outputs = outputs[:, out]
        best = (rows[:, chosen] @ torch.linalg.lstsq(rows[:, chosen], outputs).solution - outputs).square().sum()
        ours = (rows[:, chosen] @ parameters_of(sliced.get_submodule(name)) - outputs).square().sum()
        plain = (
            (rows[:, chosen] @ parameters_of(slice_model(model, groups, policy).get_submodule(name)) - outputs)
            .square()
            .sum()
        )
        assert best - 1e-6 <= ours <= best * 1.02 + 1e-3 * outputs.square().sum()  # the ridge costs a little
        assert ours < plain
        checked += 1
    assert checked == count


def test_a_whole_network_stays_as_it_is() -> None:
    model = resnet20()
    groups = trace(model, IMAGES[:1])
    sliced = slice_model(model, groups, keep_all(groups))
    Repair(model, groups, IMAGES)(sliced, keep_all(groups))
    for name, tensor in model.state_dict().items():
        assert torch.equal(sliced.state_dict()[name], tensor)


def test_inputs_that_are_always_zero_are_no_trouble() -> None:
    model = lively(
        Net(lambda m, x: m.out(F.relu(m.a(x)).mean((2, 3))), a=nn.Conv2d(3, 4, 1), out=nn.Linear(4, 2, bias=False))
    )
    nn.init.zeros_(model.a.weight)
    nn.init.constant_(model.a.bias, -1.0)
    groups = trace(model, IMAGES[:1])
    policy = Policy({"a": (0, 2)}, "l1")
    sliced = slice_model(model, groups, policy)
    Repair(model, groups, IMAGES)(sliced, policy)
    assert sliced.out.weight.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def residual(rows: Tensor, weights: Tensor, kept: list[int]) -> float:
    """Squared error of the best fit with these columns, as a part of the outputs' sum of squares."""
    outputs = rows @ weights
    fitted = rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], outputs).solution if kept else 0.0
    return float((outputs - fitted).square().sum() / outputs.square().sum())


def test_reconstruction_scores_are_the_errors_of_the_best_fits() -> None:
    model = streams()
    groups = trace(model, IMAGES[:1])  # group c is read by the linear layer alone, 4 pixels a channel
    assert [group.name for group in groups.prunable] == ["c"]
    scores = channel_importance(model, groups, "reconstruction", [(IMAGES, torch.zeros(160))])["c"]
    rows, weights = inputs_of(model, "out"), parameters_of(model.out)
    order = channel_orders({"c": scores})["c"].tolist()
    assert sorted(order) == list(range(5))
    entries = {channel: [24 + 4 * channel + pixel for pixel in range(4)] for channel in range(5)}
    whole = [*range(24), 44]
    for left in range(5):
        kept = whole + sorted(itertools.chain(*(entries[channel] for channel in order[:left])))
        assert float(scores[order[left]]) == pytest.approx(residual(rows, weights, kept), rel=0.05, abs=2e-4)
    first = {
        channel: residual(rows, weights, [e for e in range(45) if e not in entries[channel]]) for channel in entries
    }
    assert min(first, key=first.__getitem__) == order[-1]


def test_reconstruction_adds_the_errors_of_all_that_read_a_stream() -> None:
    model = streams()
    groups = trace(model, IMAGES[:1], "all")
    scores = channel_importance(model, groups, "reconstruction", [(IMAGES, torch.zeros(160))])["a"]
    last = channel_orders({"a": scores})["a"].tolist()[-1]
    expected = 0.0
    for name, size in (("b", 9), ("c", 1), ("out", 4)):
        rows = inputs_of(model, name)
        gone = set(range(last * size, (last + 1) * size))
        expected += residual(
            rows, parameters_of(model.get_submodule(name)), [e for e in range(rows.shape[1]) if e not in gone]
        )
    assert float(scores[last]) == pytest.approx(expected, rel=0.05, abs=1e-4)


def test_reconstruction_needs_images() -> None:
    model = streams()
    with pytest.raises(UserError, match="needs batches of training images, but got none"):
        channel_importance(model, trace(model, IMAGES[:1]), "reconstruction", [])


def test_a_group_that_no_layer_with_a_gram_matrix_reads_is_ranked_by_l1() -> None:
    model = Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, padding_mode="circular"))
    groups = trace(model, IMAGES[:1])
    scores = channel_importance(model, groups, "reconstruction", [(IMAGES, torch.zeros(160))])["a"]
    assert torch.equal(scores, model.a.weight.detach().abs().sum((1, 2, 3)))


def test_channels_of_one_group_of_a_grouped_convolution_go_together() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 6, 3, padding=1, groups=3), "out": nn.Conv2d(6, 2, 1)}
    model = Net(lambda m, x: m.out(F.relu(m.b(m.a(x)))).mean((2, 3)), **layers).eval()
    groups = trace(model, IMAGES[:1])
    assert [(group.name, group.block) for group in groups.prunable] == [("a", 2)]
    scores = channel_importance(model, groups, "reconstruction", [(IMAGES, torch.zeros(160))])["a"]
    assert torch.equal(scores[::2], scores[1::2]) and len(scores.unique()) == 3
    rows, weights = inputs_of(model, "out"), parameters_of(model.out)
    order = channel_orders({"a": scores})["a"].tolist()
    for left in (0, 2, 4):
        assert float(scores[order[left]]) == pytest.approx(
            residual(rows, weights, [*sorted(order[:left]), 6]), rel=0.05
        )


def test_channels_that_go_together_share_the_error_that_they_add(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streams()
    groups, batch = trace(model, IMAGES[:1]), [(IMAGES, torch.zeros(160))]
    singly = channel_importance(model, groups, "reconstruction", batch)["c"]
    monkeypatch.setattr(reconstruction, "STEPS", 3)  # 2, 2 and 1 of the 5 channels
    scores = channel_importance(model, groups, "reconstruction", batch)["c"]
    rows, weights = inputs_of(model, "out"), parameters_of(model.out)
    order = channel_orders({"c": scores})["c"].tolist()
    entries = {channel: [24 + 4 * channel + pixel for pixel in range(4)] for channel in range(5)}
    for left in (0, 1, 3):  # after every step
        kept = [*range(24), 44, *sorted(itertools.chain(*(entries[channel] for channel in order[:left])))]
        assert float(scores[order[left]]) == pytest.approx(residual(rows, weights, kept), rel=0.05, abs=2e-4)
    assert len(scores.unique()) == 5 and order[-1] == channel_orders({"c": singly})["c"].tolist()[-1]
