"""Channel groups against golden values, hand-made nets for every operator, and Torch-Pruning as an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import Net
from torch import Tensor, nn

from cacp.cost import CostModel, counted_cost
from cacp.graph import trace
from cacp.models import build_model
from cacp.schema import Axis, ChannelGroups, Policy, UserError
from cacp.slicing import slice_model

IMAGE = torch.zeros(1, 3, 8, 8)
Run = Callable[[Any, Tensor], Tensor]


def conv(inputs: int, outputs: int, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def reason(groups: ChannelGroups, name: str) -> str:
    return groups[name].fixed_reason


def unknown(groups: ChannelGroups) -> tuple[str, ...]:
    """Operators that were not known, without their line of source."""
    return tuple(what.partition(" (test_graph.py:")[0] for what in groups.unknown)


def axis(groups: ChannelGroups, module: str, role: str) -> Axis:
    return next(axis for axis in groups.axes if (axis.module, axis.role) == (module, role))


# ResNet ---------------------------------------------------------------------------------------------------------


def test_resnet56_inner_groups_are_the_first_convolutions_of_the_27_blocks() -> None:
    groups = trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32))
    expected = [
        (f"layer{stage}.{block}.conv1", channels)
        for stage, channels in ((1, 16), (2, 32), (3, 64))
        for block in range(9)
    ]
    assert [(group.name, group.channels) for group in groups.prunable] == expected
    assert [group.min_keep for group in groups.prunable] == [2] * 9 + [4] * 9 + [7] * 9
    assert all(group.producers == (group.name,) for group in groups.prunable)
    assert all(group.consumers == (group.name.replace("conv1", "conv2"),) for group in groups.prunable)
    assert groups.unknown == ()
    assert groups.fixed_params == 0


def test_resnet56_scope_all_adds_the_three_streams() -> None:
    groups = trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32), "all")
    inner = {group.name for group in trace(build_model("resnet56", 10, seed=0), torch.zeros(1, 3, 32, 32)).prunable}
    streams = [group for group in groups.prunable if group.name not in inner]
    assert len(groups.prunable) == 30
    assert [group.channels for group in streams] == [16, 32, 64]
    assert streams[0].producers == ("conv1", *(f"layer1.{block}.conv2" for block in range(9)))
    for stage, stream in ((2, streams[1]), (3, streams[2])):
        blocks = {f"layer{stage}.{block}.conv2" for block in range(9)}
        assert set(stream.producers) == blocks | {f"layer{stage}.0.shortcut"}
    assert "linear" in streams[2].consumers
    assert {group.fixed_reason for group in groups if not group.prunable} == {"the model's input", "the model's output"}


def test_inner_scope_says_why_streams_stay() -> None:
    groups = trace(build_model("resnet20", 10, seed=0), torch.zeros(1, 3, 32, 32))
    assert reason(groups, "conv1") == "residual stream, outside scope inner"
    assert reason(groups, "linear") == "the model's output"


# operators ------------------------------------------------------------------------------------------------------


def test_depthwise_convolution_shrinks_with_its_input() -> None:
    model = Net(
        lambda m, x: m.c(m.norm(m.b(m.a(x)))),
        a=conv(3, 20), b=conv(20, 20, groups=20), norm=nn.BatchNorm2d(20), c=conv(20, 5),
    )  # fmt: skip
    groups = trace(model, IMAGE)
    assert [group.name for group in groups.prunable] == ["a"]
    assert axis(groups, "b", "features").segments == ("a",)
    assert axis(groups, "norm", "features").segments == ("a",)
    assert axis(groups, "c", "in").segments == ("a",)
    assert groups["a"].min_keep == 2  # a tenth


def test_grouped_convolution_shrinks_by_whole_groups() -> None:
    model = Net(lambda m, x: m.c(m.norm(m.b(m.a(x)))), a=conv(3, 24), b=conv(24, 48, groups=6), norm=nn.BatchNorm2d(48),
                c=conv(48, 5))  # fmt: skip
    groups = trace(model, IMAGE)
    (group,) = groups.prunable
    assert (group.name, group.channels, group.block, group.multiple, group.min_keep) == ("a", 24, 4, 4, 4)
    assert axis(groups, "b", "features") == Axis("b", "features", ("a",), 2)  # every channel makes two
    assert axis(groups, "norm", "features").repeat == axis(groups, "c", "in").repeat == 2
    cost = CostModel(groups).cost([8])
    assert cost.macs == 64 * 9 * (3 * 8 + 4 * 16 + 16 * 5)  # each of 16 outputs reads 4 inputs
    assert cost.params == (27 * 8 + 8) + (36 * 16 + 16) + 2 * 16 + (9 * 16 * 5 + 5)


def branches(widths: tuple[int, int], in_groups: int) -> nn.Module:
    total = sum(widths)
    return Net(
        lambda m, x: m.d(m.c(torch.cat([m.a(x), m.b(x)], 1))),
        a=conv(3, widths[0]), b=conv(3, widths[1]), c=conv(total, total, groups=in_groups), d=conv(total, 5),
    )  # fmt: skip


def test_grouped_convolution_behind_a_concatenation() -> None:
    groups = trace(branches((12, 8), 5), IMAGE)
    assert [(group.name, group.block) for group in groups.prunable] == [("a", 4), ("b", 4)]
    groups = trace(branches((12, 4), 4), IMAGE)
    assert reason(groups, "b").startswith("no keep count below its 4 channels")
    groups = trace(branches((6, 6), 3), IMAGE)  # the second group reads both
    assert reason(groups, "a") == reason(groups, "b") == "grouped convolution c"


def test_grouped_convolution_stays_whole_where_groups_shrink_their_channels() -> None:
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, groups=4), c=conv(12, 5))
    groups = trace(model, IMAGE, "all")
    assert groups.prunable == ()
    assert reason(groups, "a") == reason(groups, "b") == "grouped convolution b"
    assert CostModel(groups).dense == counted_cost(model, (3, 8, 8))


def test_concatenation_strings_the_groups_together_in_order() -> None:
    model = Net(
        lambda m, x: m.c(torch.cat([m.b(x), m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), c=conv(16, 5)
    )  # fmt: skip
    groups = trace(model, IMAGE)
    assert axis(groups, "c", "in").segments == ("b", "a", "b")
    assert {group.name for group in groups.prunable} == {"a", "b"}


def test_concatenation_by_keywords_and_negative_dimension() -> None:
    model = Net(
        lambda m, x: m.c(torch.cat(tensors=(m.a(x), m.b(x)), dim=-3)), a=conv(3, 4), b=conv(3, 6), c=conv(10, 5)
    )
    groups = trace(model, IMAGE)
    assert axis(groups, "c", "in").segments == ("a", "b")
    assert groups.unknown == ()


def test_concatenation_along_pixels_stays_whole() -> None:
    model = Net(lambda m, x: m.b(torch.cat([m.a(x), m.a(x)], 2)), a=conv(3, 4), b=conv(4, 5))
    groups = trace(model, IMAGE)
    assert unknown(groups) == ("cat at node cat",)
    assert groups.prunable == ()


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: torch.flatten(x, 1), lambda x: x.flatten(1), lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1), lambda x: torch.flatten(x, start_dim=1),
    ],
)  # fmt: skip
def test_flatten_repeats_every_channel_by_its_pixels(flatten: object) -> None:
    model = Net(
        lambda m, x: m.out(flatten(m.pool(m.a(x)))), a=conv(3, 4), pool=nn.MaxPool2d(2), out=nn.Linear(64, 5)
    )  # fmt: skip
    groups = trace(model, IMAGE)
    assert axis(groups, "out", "in") == Axis("out", "in", ("a",), 16)
    assert [group.name for group in groups.prunable] == ["a"]


def test_flattened_concatenation() -> None:
    model = Net(
        lambda m, x: m.out(m.flat(torch.cat([m.a(x), m.b(x)], 1))),
        a=conv(3, 4), b=conv(3, 2), flat=nn.Flatten(), out=nn.Linear(6 * 64, 5),
    )  # fmt: skip
    assert axis(trace(model, IMAGE), "out", "in") == Axis("out", "in", ("a", "b"), 64)


def test_addition_couples_its_operands() -> None:
    model = Net(lambda m, x: m.c(m.a(x) + 2 * m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 5))
    assert trace(model, IMAGE).prunable == ()
    (group,) = trace(model, IMAGE, "all").prunable
    assert group.producers == ("a", "b")
    assert group.consumers == ("c",)


def test_addition_by_keywords_couples_too() -> None:
    model = Net(lambda m, x: m.c(torch.add(input=m.a(x), other=m.b(x))), a=conv(3, 4), b=conv(3, 4), c=conv(4, 5))
    (group,) = trace(model, IMAGE, "all").prunable
    assert group.producers == ("a", "b")


def test_broadcasting_from_the_right_stays_whole() -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) * m.b(x).mean((2, 3))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)
    )  # fmt: skip
    groups = trace(model, IMAGE, "all")  # (1, 8, 8, 8) * (1, 8): the factors are those of pixel columns
    assert unknown(groups) == ("mul at node mul",)
    assert groups.prunable == ()


def test_squeeze_and_excitation_couples_the_gate_and_frees_the_bottleneck() -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.grow(torch.relu(m.shrink(m.a(x).mean((2, 3), keepdim=True)))))),
        a=conv(3, 8), shrink=nn.Conv2d(8, 2, 1), grow=nn.Conv2d(2, 8, 1), c=conv(8, 5),
    )  # fmt: skip
    groups = trace(model, IMAGE, "all")
    assert {group.name: group.producers for group in groups.prunable} == {"a": ("a", "grow"), "shrink": ("shrink",)}
    assert set(groups["a"].consumers) == {"shrink", "c"}


def linear_gate(x: Tensor, squeeze: nn.Module, excite: nn.Module) -> Tensor:
    """Squeeze and excitation as in github.com/moskomule/senet.pytorch."""
    batch, channels, _, _ = x.size()
    y = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
    y = torch.sigmoid(excite(torch.relu(squeeze(y)))).view(batch, channels, 1, 1)
    return x * y.expand_as(x)


@pytest.mark.parametrize(
    "gate",
    [
        linear_gate,
        lambda x, squeeze, excite: x * torch.sigmoid(excite(squeeze(x.mean((2, 3)))))[:, :, None, None],
        lambda x, squeeze, excite: x * excite(squeeze(x.mean((2, 3)))).unsqueeze(-1).unsqueeze(3),
        lambda x, squeeze, excite: excite(squeeze(x.mean((2, 3)))).reshape(x.shape[0], x.shape[1], 1, 1) * x,
        lambda x, squeeze, excite: excite(squeeze(x.mean((2, 3)))).view(-1, x.size(1), 1, 1).mul(x),
    ],
)
def test_a_gate_of_linear_layers_is_pruned_in_scope_inner_too(gate: Callable[..., Tensor]) -> None:
    model = Net(
        lambda m, x: m.b(gate(m.a(x), m.squeeze, m.excite)),
        a=conv(3, 8), squeeze=nn.Linear(8, 4), excite=nn.Linear(4, 8), b=conv(8, 5),
    )  # fmt: skip
    groups = trace(model, IMAGE)
    assert groups.unknown == ()
    assert {group.name: group.producers for group in groups.prunable} == {"a": ("a", "excite"), "squeeze": ("squeeze",)}
    sliced = slice_model(model, groups, Policy({"a": (0, 3, 6), "squeeze": (1, 2)}, "hand"))
    assert sliced(torch.zeros(2, 3, 8, 8)).shape == (2, 5, 8, 8)
    assert counted_cost(sliced, (3, 8, 8)) == CostModel(groups).cost([3, 2])


def test_a_view_by_the_channels_of_another_tensor_couples_them_and_one_by_a_number_stays_whole() -> None:
    layers = {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 5)}
    counted = Net(lambda m, x: m.c(m.a(x).view(1, m.b(x).size(1), 8, 8)), **layers)
    assert {group.producers for group in trace(counted, IMAGE, "all").prunable} == {("a", "b")}
    literal = trace(Net(lambda m, x: m.c(m.a(x).view(1, 8, 8, 8)), **layers), IMAGE, "all")
    assert literal.prunable == () and unknown(literal) == ("view at node view",)


def test_channels_last_and_layer_norm() -> None:
    def block(m: nn.Module, x: Tensor) -> Tensor:
        return m.shrink(F.gelu(m.grow(m.norm(x))))

    model = Net(
        lambda m, x: m.out(m.a(x) + block(m, m.b(m.a(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=conv(3, 8), b=conv(8, 8, groups=8), norm=nn.LayerNorm(8), grow=nn.Linear(8, 20), shrink=nn.Linear(20, 8),
        out=conv(8, 5),
    )  # fmt: skip
    groups = trace(model, IMAGE, "all")
    assert groups.unknown == ()
    assert [(group.name, group.consumers) for group in groups.prunable] == [("grow", ("shrink",))]
    assert reason(groups, "a").startswith("normalised over all channels by LayerNorm at norm (test_graph.py:")
    assert CostModel(groups).cost([7]).macs == 64 * (2 * 27 * 8 + 9 * 8 + 2 * 8 * 7 + 9 * 8 * 5)  # a runs twice
    assert CostModel(groups).dense == counted_cost(model, (3, 8, 8))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.c(m.a(x) + m.b(x).permute(0, 2, 3, 1)),
        lambda m, x: m.c(m.a(x) + m.b(x).mean(2, keepdim=True).permute(0, 2, 3, 1)),  # (1, 1, 8, channels)
        lambda m, x: m.c(m.a(x).view(1, m.b(x).permute(0, 2, 3, 1).size(1), 8, 8)),
    ],
)
def test_channels_of_one_tensor_and_as_many_pixels_of_another_are_not_taken_for_each_other(run: Run) -> None:
    groups = trace(Net(run, a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)), IMAGE, "all")  # eight channels, 8 x 8 pixels
    assert len(groups.unknown) == 1
    assert "a" not in {group.name for group in groups.prunable}


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 2),
        lambda x: x.permute(1, 0, 2, 3),
        lambda x: F.layer_norm(x, (8,)),
    ],
)
def test_operators_that_mix_axes_stay_whole(operator: Callable[[Tensor], Tensor]) -> None:
    groups = trace(Net(lambda m, x: operator(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 8)), IMAGE, "all")
    assert len(groups.unknown) == 1
    assert [group.name for group in groups.prunable] == ["a"]


def test_a_gate_of_one_channel_is_left_alone() -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.gate(x))), a=conv(3, 8), gate=conv(3, 1), c=conv(8, 5)
    )  # fmt: skip
    groups = trace(model, IMAGE)
    assert [group.name for group in groups.prunable] == ["a"]
    assert reason(groups, "gate") == "a single channel"


def test_a_parameter_of_the_models_own_stays_whole_and_is_counted() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale), a=conv(3, 8), b=conv(8, 5))
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    groups = trace(model, IMAGE)
    assert groups.prunable == ()
    assert unknown(groups) == ("mul at node mul",)
    assert groups.fixed_params == 8


def test_spatial_padding_is_known_and_channel_padding_is_not() -> None:
    layers = {"a": conv(3, 4), "b": conv(4, 5)}
    spatial = trace(Net(lambda m, x: m.b(F.pad(m.a(x), (0, 1, 0, 1))), **layers), IMAGE)
    assert [group.name for group in spatial.prunable] == ["a"]
    channels = trace(Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, -1))), **layers), IMAGE)
    assert channels.prunable == ()
    assert unknown(channels) == ("pad at node pad",)


@pytest.mark.parametrize(("dimensions", "known"), [((2, 3), True), ((-1, -2), True), ((0, 2, 3), False)])
def test_mean_over_pixels(dimensions: tuple[int, ...], known: bool) -> None:
    model = Net(lambda m, x: m.b(m.a(x).mean(dimensions, keepdim=True)), a=conv(3, 4), b=conv(4, 5))
    groups = trace(model, IMAGE)
    assert [group.name for group in groups.prunable] == (["a"] if known else [])
    assert unknown(groups) == (() if known else ("mean at node mean",))


def test_mean_feeds_a_linear_layer() -> None:
    model = Net(lambda m, x: m.out(m.a(x).mean((2, 3))), a=conv(3, 4), out=nn.Linear(4, 5))
    assert axis(trace(model, IMAGE), "out", "in") == Axis("out", "in", ("a",), 1)


def test_cropping_pixels_is_known_and_taking_channels_is_not() -> None:
    layers = {"a": conv(3, 4), "b": conv(4, 5), "c": conv(2, 5)}
    assert trace(Net(lambda m, x: m.b(m.a(x)[:, :, ::2, 1:]), **layers), IMAGE).unknown == ()
    groups = trace(Net(lambda m, x: m.c(m.a(x)[:, :2]), **layers), IMAGE)
    assert unknown(groups) == ("getitem at node getitem",)
    assert groups.prunable == ()


def shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (shuffle, "view at node view"),
        (lambda x: torch.cumsum(x, 1), "cumsum at node cumsum"),
        (lambda x: torch.cat(torch.chunk(x, 2, 1)[::-1], 1), "chunk at node chunk"),
        (lambda x: x.flip(1), "flip at node flip"),
        (lambda x: F.group_norm(x, 2), "group_norm at node group_norm"),
    ],
)
def test_an_unknown_operator_is_listed_and_what_it_touches_stays_whole(operator: object, name: str) -> None:
    model = Net(
        lambda m, x: m.d(m.c(operator(m.b(m.a(x))))), a=conv(3, 4), b=conv(4, 8), c=conv(8, 6), d=conv(6, 5)
    )  # fmt: skip
    groups = trace(model, IMAGE, "all")
    assert unknown(groups)[0] == name
    assert reason(groups, "b") == f"touched by {groups.unknown[0]}"
    assert [group.name for group in groups.prunable] == ["a", "c"]
    assert f"not known, kept whole: {name}" in str(groups)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return 1 + next(number for number, line in enumerate(lines) if line.strip().startswith(text))


def test_an_unknown_module_is_named_with_its_place_and_its_line() -> None:
    model = Net(lambda m, x: m.b(m.act(m.a(x))), a=conv(3, 4), act=nn.PReLU(4), b=conv(4, 5))
    groups = trace(model, IMAGE)
    line = line_of("model = Net(lambda m, x: m.b(m.act(m.a(x)))")
    assert groups.unknown == (f"PReLU at act (test_graph.py:{line})",)
    assert unknown(groups) == ("PReLU at act",)
    assert groups.prunable == ()
    assert groups.fixed_params == 4


def test_a_layer_called_twice_is_one_group_and_counts_its_macs_twice() -> None:
    model = Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 5))
    groups = trace(model, IMAGE, "all")
    (group,) = groups.prunable
    assert group.producers == ("a", "b")
    assert CostModel(groups).dense == counted_cost(model, (3, 8, 8))
    assert CostModel(groups).cost([3]).macs == 64 * 9 * (3 * 3 + 2 * 3 * 3 + 3 * 5)


# the model and its faults ---------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = build_model("resnet20", 10, seed=0).train()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    trace(model, torch.ones(1, 3, 16, 16), "all")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()


def test_a_branch_on_values_cannot_be_traced() -> None:
    model = Net(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=conv(3, 4), b=conv(3, 4))
    line = line_of("model = Net(lambda m, x: m.a(x) if x.sum() > 0")
    message = rf"TraceError.*; in `.*if x\.sum\(\) > 0.*` \(test_graph\.py:{line}\); forward must not branch"
    with pytest.raises(UserError, match=r"Net cannot be traced by torch\.fx: " + message):
        trace(model, IMAGE)


def test_an_example_that_does_not_fit_is_refused_with_its_shape_and_the_operator(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = r"RuntimeError: .*; in Conv2d at a \(test_graph\.py:\d+\); .*example of shape \(1, 4, 8, 8\)"
    with pytest.raises(UserError, match=message):
        trace(Net(lambda m, x: m.a(x), a=conv(3, 4)), torch.zeros(1, 4, 8, 8))
    assert capsys.readouterr().err == ""


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(UserError, match="scope must be one of inner, all, but got 'outer'"):
        trace(build_model("resnet20", 10, seed=0), IMAGE, "outer")


# what the caller wants ------------------------------------------------------------------------------------------


def test_ignored_groups_stay_whole_with_the_pattern_as_reason() -> None:
    model = build_model("resnet20", 10, seed=0)
    groups = trace(model, IMAGE, "all", ignore=["layer1.*.conv1", "*shortcut"])
    whole = {group.name: group.fixed_reason for group in groups if "ignored" in group.fixed_reason}
    expected = {f"layer1.{block}.conv1": "ignored by pattern 'layer1.*.conv1'" for block in range(3)}
    streams = {f"layer{stage}.0.shortcut" for stage in (2, 3)}
    assert {producer for name in whole for producer in groups[name].producers} >= streams  # by a producer's name
    assert expected.items() <= whole.items() and len(whole) == 5
    assert len(groups.prunable) == 12 - 5


def test_patterns_that_match_nothing_are_refused_with_near_names() -> None:
    with pytest.raises(UserError) as caught:
        trace(build_model("resnet20", 10, seed=0), IMAGE, ignore=["layer1.*", "layer2.0.conf1", "Conv*"])
    lines = str(caught.value).split("\n")
    assert "'layer2.0.conf1'; near: layer2.0.conv1, " in lines[0]
    assert "'Conv*'; near: " in lines[1] and len(lines) == 3


@pytest.mark.parametrize(
    ("ratio", "least"), [(0.1, [2, 4, 7]), (0.25, [4, 8, 16]), (0.0001, [1, 1, 1]), (0.5, [8, 16, 32])]
)
def test_min_keep_is_the_least_ratio_of_every_group(ratio: float, least: list[int]) -> None:
    groups = trace(build_model("resnet20", 10, seed=0), IMAGE, min_keep=ratio)
    assert [group.min_keep for group in groups.prunable[::3]] == least


def test_keep_counts_are_multiples_or_whole() -> None:
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 20), b=conv(20, 8), c=conv(8, 5))
    groups = trace(model, IMAGE, channel_multiple=8)
    (group,) = groups.prunable
    assert (group.name, group.multiple, group.block, group.min_keep) == ("a", 8, 1, 8)
    assert CostModel(groups).feasible[0].tolist() == [8, 16, 20]
    assert reason(groups, "b") == "no keep count below its 8 channels: see min_keep and channel_multiple"
    assert "8, by 8" in str(groups)
    blocks = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 36), b=conv(36, 36, groups=6), c=conv(36, 5))
    (group,) = trace(blocks, IMAGE, channel_multiple=4).prunable
    assert (group.multiple, group.block) == (12, 6)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"ignore": "layer1.*"}, "ignore must be a list of patterns, but got 'layer1.*'"),
        ({"min_keep": 0.0}, "min_keep must be a keep ratio in (0, 1], but got 0.0"),
        ({"min_keep": 1.5}, "but got 1.5"),
        ({"channel_multiple": 0}, "channel_multiple must be a whole number from 1 up, but got 0"),
        ({"channel_multiple": 2.0}, "but got 2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        trace(build_model("resnet20", 10, seed=0), IMAGE, **wrong)
    assert text in str(caught.value)


# Torch-Pruning --------------------------------------------------------------------------------------------------


class ProjectionBlock(nn.Module):
    """A basic block whose shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def blocks() -> nn.Module:
    return Net(
        lambda m, x: m.out(torch.flatten(m.pool(m.blocks(m.stem(x))), 1)),
        stem=conv(3, 8),
        blocks=nn.Sequential(*(ProjectionBlock(*widths) for widths in ((8, 8), (8, 8), (8, 12), (12, 12), (12, 16)))),
        pool=nn.AdaptiveAvgPool2d(1),
        out=nn.Linear(16, 10),
    )


def small_vgg() -> nn.Module:
    """torchvision's VGG-11 with batch norm, its 7 x 7 pixels flattened into a narrow classifier."""
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn(weights=None, init_weights=False)
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    return model


def coupled_by_torch_pruning(model: nn.Module, example: Tensor) -> set[frozenset[tuple[str, str]]]:
    torch_pruning = pytest.importorskip("torch_pruning")
    names = {module: name for name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    groups = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = set()
        for dependency, _ in group:
            module = dependency.target.module
            if isinstance(module, nn.BatchNorm2d):
                members.add((names[module], "features"))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                outputs = graph.is_out_channel_pruning_fn(dependency.handler)
                members.add((names[module], "out" if outputs else "in"))
        groups.add(frozenset(members))
    return groups


@pytest.mark.parametrize(
    ("build", "size"),
    [(blocks, 8), (lambda: torchvision.models.resnet18(weights=None, num_classes=10), 32), (small_vgg, 32)],
    ids=["blocks", "resnet18", "vgg11_bn"],
)
def test_groups_couple_the_layers_that_torch_pruning_couples(build: object, size: int) -> None:
    model = build().eval()
    example = torch.zeros(1, 3, size, size)
    groups = trace(model, example, "all")
    ours = {
        frozenset((axis.module, axis.role) for axis in groups.axes if group.name in axis.segments)
        for group in groups
        if group.producers
    }
    assert groups.unknown == ()
    assert ours == coupled_by_torch_pruning(model, example)
