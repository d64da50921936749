"""Whole networks: torchvision's CNNs and the CIFAR VGGs, traced, sliced and counted; Torch-Pruning as an oracle.

The slow tests take every network; the others a small one of every kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, keep_all, lively, policy_counts, random_policy
from torch import Tensor, nn

from cacp.cost import CostModel, counted_cost
from cacp.evaluation import recalibrate_batchnorm
from cacp.fusion import FusedNetwork
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.models import CIFAR_NAMES, TORCHVISION_NAMES, build_model
from cacp.schema import Axis, ChannelGroup, ChannelGroups, Policy, UserError
from cacp.slicing import counts_policy, slice_model

CLASSES = 7
LEAST_SIZE = {"inception_v3": 75}  # pixels; 64 for the others
FAST = (
    "alexnet", "cifar_vgg11_bn", "densenet121", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
    "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
)  # fmt: skip
HUGE = ("regnet_y_128gf",)  # 638 million parameters: counted, not run
NETWORKS = (*(name for name in CIFAR_NAMES if "vgg" in name), *TORCHVISION_NAMES)


def marked(names: tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in names]


every_network = pytest.mark.parametrize("name", marked(NETWORKS))
every_network_that_fits = pytest.mark.parametrize("name", marked(tuple(name for name in NETWORKS if name not in HUGE)))


def size(name: str) -> int:
    return LEAST_SIZE.get(name, 64)


def built(name: str) -> nn.Module:
    """With statistics and scales of ordinary size; ConvNeXt's 1e-6 would hide what its blocks do."""
    model = lively(build_model(name, CLASSES, seed=0))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("layer_scale"):
            parameter.data.fill_(0.5)
    return model


def images(name: str) -> Tensor:
    return torch.randn(2, 3, size(name), size(name), generator=torch.Generator().manual_seed(7))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@contextmanager
def masked(model: nn.Module, groups: ChannelGroups, policy: Policy) -> Iterator[None]:
    """The full-size model as it is seen through a policy: every layer reads zeros in place of what was dropped."""

    def entries(axis: Axis) -> Tensor:
        parts = []
        for segment in axis.segments:
            channels = groups[segment].channels
            part = torch.zeros(channels, dtype=torch.float64)
            parts.append(part.index_fill(0, torch.tensor(policy.keep.get(segment, range(channels))), 1.0))
        return torch.cat(parts).repeat_interleave(axis.repeat)

    def masking(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        return lambda module, inputs: inputs[0] * (mask if isinstance(module, nn.Linear) else mask[:, None, None])

    readers = [axis for axis in groups.axes if axis.role == "in"]
    hooks = [model.get_submodule(axis.module).register_forward_pre_hook(masking(entries(axis))) for axis in readers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@every_network_that_fits
def test_keep_all_is_bit_identical(name: str) -> None:
    model, x = built(name), images(name)
    groups = trace(model, x[:1], "all")
    assert groups.prunable
    assert torch.equal(outputs(slice_model(model, groups, keep_all(groups)), x), outputs(model, x))


@every_network_that_fits
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_sliced_equals_masked(name: str, scope: str) -> None:
    model, x = built(name).double(), images(name).double()
    groups = trace(model, x[:1], scope)
    policy = random_policy(groups, 1)
    result = outputs(slice_model(model, groups, policy), x)
    with masked(model, groups, policy):
        expected = outputs(model, x)
    assert result.shape == (2, CLASSES)
    scale = expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9 * scale)
    assert not torch.allclose(expected, outputs(model, x), rtol=0, atol=1e-6 * scale)  # the masks do something


@every_network
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_closed_form_equals_what_is_counted_on_the_sliced_model(name: str, scope: str) -> None:
    shape = (3, size(name), size(name))
    model = build_model(name, CLASSES, seed=0).to("meta")
    groups = trace(model, torch.zeros(1, *shape, device="meta"), scope)
    cost_model = CostModel(groups)
    assert cost_model.dense == counted_cost(model, shape)
    for seed in range(2):
        policy = random_policy(groups, seed)
        sliced = slice_model(model, groups, policy)
        assert cost_model.cost(policy_counts(groups, policy)) == counted_cost(sliced, shape)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_sliced_networks_are_fused(name: str) -> None:
    model, x = built(name), images(name)
    groups = trace(model, x[:1], "all")
    network = FusedNetwork(model, x[:1])
    sliced = slice_model(model, groups, random_policy(groups, 0)).eval()
    network.load(sliced)
    network.set_statistics([network.moments(x)])
    logits = network(x)
    recalibrate_batchnorm(sliced, x, len(x))
    expected = outputs(sliced, x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


# small networks of one kind of coupling each --------------------------------------------------------------------------


def conv(inputs: int, outputs: int, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def ghost(m: nn.Module, x: Tensor) -> Tensor:
    """Half of the channels are made of the other half by a depthwise convolution (Han et al., CVPR 2020)."""
    primary = torch.relu(m.norm(m.a(x)))
    return m.out(torch.cat([primary, m.cheap(primary)], 1).mean((2, 3)))


def widened(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(torch.relu(m.norm(m.grouped(m.wide(m.a(x))))).flatten(1))


def dense_and_grouped(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([m.a(x), m.b(x)], 1)
    return m.out(F.adaptive_avg_pool2d(m.c(torch.cat([x, m.grouped(torch.relu(m.norm(x)))], 1)), 1).flatten(1))


def gated_unit(m: nn.Module, x: Tensor) -> Tensor:
    return m.out((m.a(x) * torch.sigmoid(m.b(x)) + m.a(x)).mean((2, 3)))


def excited(m: nn.Module, x: Tensor) -> Tensor:
    x = m.grouped(torch.relu(m.a(x)))
    batch, channels, _, _ = x.shape
    gate = torch.sigmoid(m.grow(torch.relu(m.shrink(x.mean((2, 3)))))).view(batch, channels, 1, 1)
    return m.out((gate.expand_as(x) * x).mean((2, 3)))


def channels_last(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    y = m.shrink(F.gelu(m.grow(m.b(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
    return m.out(torch.flatten(F.max_pool2d(x + y, 2), 1))


SMALL: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, nn.Module], list[tuple[str, int]]]] = {
    "ghost": (ghost, dict(a=conv(3, 6), norm=nn.BatchNorm2d(6), cheap=conv(6, 6, groups=6), out=nn.Linear(12, 4)),
              [("a", 1)]),
    "widened": (widened, dict(a=conv(3, 6), wide=conv(6, 18, groups=6), grouped=conv(18, 36, groups=3),
                              norm=nn.BatchNorm2d(36), out=nn.Linear(36 * 64, 4)), [("a", 2)]),
    "dense_and_grouped": (dense_and_grouped, dict(a=conv(3, 8), b=conv(3, 12), norm=nn.BatchNorm2d(20),
                                                  grouped=conv(20, 20, groups=5), c=conv(40, 6), out=nn.Linear(6, 4)),
                          [("a", 4), ("b", 4), ("c", 1)]),
    "gated_unit": (gated_unit, dict(a=conv(3, 8), b=conv(3, 8), out=nn.Linear(8, 4)), [("a", 1)]),
    "excited": (excited, dict(a=conv(3, 12), grouped=conv(12, 12, groups=4), shrink=nn.Linear(12, 5),
                              grow=nn.Linear(5, 12), out=nn.Linear(12, 4)), [("a", 3), ("shrink", 1)]),
    "channels_last": (channels_last, dict(a=conv(3, 8), b=conv(8, 8, groups=8), grow=nn.Linear(8, 16),
                                          shrink=nn.Linear(16, 8), out=nn.Linear(8 * 16, 4)), [("a", 1), ("grow", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_sliced_equal_masked_ones_and_are_counted(name: str, seed: int) -> None:
    run, layers, expected_groups = SMALL[name]
    torch.manual_seed(seed)
    model = lively(copy.deepcopy(Net(run, **layers))).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = trace(model, x[:1], "all")
    assert groups.unknown == ()
    assert [(group.name, group.block) for group in groups.prunable] == expected_groups
    policy = random_policy(groups, seed)
    sliced = slice_model(model, groups, policy)
    with masked(model, groups, policy):
        expected = outputs(model, x)
    torch.testing.assert_close(outputs(sliced, x), expected, rtol=0, atol=1e-10)
    assert CostModel(groups).cost(policy_counts(groups, policy)) == counted_cost(sliced, (3, 8, 8))
    assert torch.equal(outputs(slice_model(model, groups, keep_all(groups)), x), outputs(model, x))


def test_half_a_group_of_a_grouped_convolution_is_refused() -> None:
    run, layers, _ = SMALL["excited"]
    model = Net(run, **layers)
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        UserError, match=r"a: every 3 channels of a grouped convolution's group must stay or go together"
    ):
        slice_model(model, groups, Policy({"a": (0, 1, 2, 3), "shrink": (0,)}, "hand"))


@pytest.mark.parametrize("criterion", ["l1", "fpgm", "taylor", "random"])
def test_criteria_rank_the_groups_of_a_grouped_convolution_as_wholes(criterion: str) -> None:
    run, layers, _ = SMALL["widened"]
    model = lively(Net(run, **layers)) if criterion != "taylor" else small_resnext()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = trace(model, x[:1])
    importance = channel_importance(model, groups, criterion, [(x, torch.tensor([0, 1, 2, 3]))])
    (name, scores), *_ = importance.items()
    block = groups[name].block
    assert block > 1 and all(len(set(row.tolist())) == 1 for row in scores.view(-1, block))
    assert len(set(scores.tolist())) == len(scores) // block
    if criterion == "l1":
        filters = model.get_submodule(name).weight.detach().abs().flatten(1).sum(1)
        torch.testing.assert_close(scores[::block], filters.view(-1, block).sum(1))
    policy = counts_policy(groups, [2 * block], channel_orders(importance), criterion)
    assert outputs(slice_model(model, groups, policy), x).shape == (4, 4)


def small_resnext() -> nn.Module:
    torch.manual_seed(0)
    return lively(Net(
        lambda m, x: m.out(torch.relu(m.norm2(m.grouped(torch.relu(m.norm1(m.a(x)))))).mean((2, 3))),
        a=conv(3, 12), norm1=nn.BatchNorm2d(12), grouped=conv(12, 12, groups=4), norm2=nn.BatchNorm2d(12),
        out=nn.Linear(12, 4),
    ))  # fmt: skip


# groups ---------------------------------------------------------------------------------------------------------------


def coupled_by_torch_pruning(model: nn.Module, example: Tensor) -> set[frozenset[tuple[str, str]]]:
    """Its groups as sets of (module, role).

    It prunes inside of the groups of a convolution, so that inputs and outputs are two groups there; ours, which drop
    whole ones, are these two together.
    """
    torch_pruning = pytest.importorskip("torch_pruning")
    names = {module: name for name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    groups: list[set[tuple[str, str]]] = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = set()
        for dependency, _ in group:
            module = dependency.target.module
            if isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.Conv2d) and module.groups > 1):
                members.add((names[module], "features"))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                outputs = graph.is_out_channel_pruning_fn(dependency.handler)
                members.add((names[module], "out" if outputs else "in"))
        sides = {(name, role) for name, role in members if getattr(model.get_submodule(name), "groups", 1) > 1}
        for other in [other for other in groups if other & sides]:
            groups.remove(other)
            members |= other
        groups.append(members)
    return {frozenset(members) for members in groups}


# Torch-Pruning 1.6.1 fails on ShuffleNet's view: "integer division or modulo by zero" in its index mapping.
@pytest.mark.parametrize("name", marked(tuple(n for n in NETWORKS if n not in HUGE and "shufflenet" not in n)))
@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_groups_couple_the_layers_that_torch_pruning_couples(name: str) -> None:
    model = build_model(name, CLASSES, seed=0).eval()
    example = torch.zeros(1, 3, size(name), size(name))
    groups = trace(model, example, "all")

    def coupled(groups: Sequence[ChannelGroup]) -> set[frozenset[tuple[str, str]]]:
        return {
            frozenset((axis.module, axis.role) for axis in all_axes if group.name in axis.segments)
            for group in groups
            if group.producers
        }

    all_axes = groups.axes
    theirs = coupled_by_torch_pruning(model, example)
    if groups.unknown:  # what an operator that is not known makes stays whole, and is coupled with nothing
        assert name.startswith("convnext")
        assert coupled(groups.prunable) <= theirs
    else:
        assert coupled(groups) == theirs


# Operators that are not known, by the beginning of the name: a parameter that scales channels; channel shuffle.
UNKNOWN = {"convnext": {"mul"}, "shufflenet": {"view", "transpose", "chunk"}}
# What can be pruned: groups in scope inner, in scope all, and of how many.
PRUNABLE = {
    "cifar_vgg11_bn": (8, 8, 10),
    "cifar_vgg13_bn": (10, 10, 12),
    "cifar_vgg16_bn": (13, 13, 15),
    "cifar_vgg19_bn": (16, 16, 18),
    "alexnet": (7, 7, 9),
    "convnext_base": (36, 36, 78),
    "convnext_large": (36, 36, 78),
    "convnext_small": (36, 36, 78),
    "convnext_tiny": (18, 18, 42),
    "densenet121": (120, 120, 122),
    "densenet161": (160, 160, 162),
    "densenet169": (168, 168, 170),
    "densenet201": (200, 200, 202),
    "efficientnet_b0": (35, 40, 42),
    "efficientnet_b1": (46, 53, 55),
    "efficientnet_b2": (46, 53, 55),
    "efficientnet_b3": (52, 59, 61),
    "efficientnet_b4": (64, 71, 73),
    "efficientnet_b5": (77, 84, 86),
    "efficientnet_b6": (89, 96, 98),
    "efficientnet_b7": (108, 115, 117),
    "efficientnet_v2_l": (137, 144, 146),
    "efficientnet_v2_m": (99, 106, 108),
    "efficientnet_v2_s": (69, 75, 77),
    "googlenet": (57, 57, 59),
    "inception_v3": (94, 94, 96),
    "mnasnet0_5": (20, 25, 27),
    "mnasnet0_75": (20, 25, 27),
    "mnasnet1_0": (20, 25, 27),
    "mnasnet1_3": (20, 25, 27),
    "mobilenet_v2": (20, 25, 27),
    "mobilenet_v3_large": (24, 30, 32),
    "mobilenet_v3_small": (23, 27, 29),
    "regnet_x_16gf": (23, 27, 29),
    "regnet_x_1_6gf": (19, 23, 25),
    "regnet_x_32gf": (24, 28, 30),
    "regnet_x_3_2gf": (26, 30, 32),
    "regnet_x_400mf": (23, 27, 29),
    "regnet_x_800mf": (17, 21, 23),
    "regnet_x_8gf": (26, 30, 32),
    "regnet_y_128gf": (55, 59, 61),
    "regnet_y_16gf": (37, 41, 43),
    "regnet_y_1_6gf": (55, 59, 61),
    "regnet_y_32gf": (43, 47, 49),
    "regnet_y_3_2gf": (43, 47, 49),
    "regnet_y_400mf": (33, 37, 39),
    "regnet_y_800mf": (29, 33, 35),
    "regnet_y_8gf": (35, 39, 41),
    "resnet101": (67, 71, 73),
    "resnet152": (101, 105, 107),
    "resnet18": (8, 12, 14),
    "resnet34": (16, 20, 22),
    "resnet50": (33, 37, 39),
    "resnext101_32x8d": (34, 38, 40),
    "resnext101_64x4d": (34, 38, 40),
    "resnext50_32x4d": (17, 21, 23),
    "shufflenet_v2_x0_5": (18, 18, 113),
    "shufflenet_v2_x1_0": (18, 18, 113),
    "shufflenet_v2_x1_5": (18, 18, 113),
    "shufflenet_v2_x2_0": (18, 18, 113),
    "squeezenet1_0": (25, 25, 27),
    "squeezenet1_1": (25, 25, 27),
    "vgg11": (10, 10, 12),
    "vgg11_bn": (10, 10, 12),
    "vgg13": (12, 12, 14),
    "vgg13_bn": (12, 12, 14),
    "vgg16": (15, 15, 17),
    "vgg16_bn": (15, 15, 17),
    "vgg19": (18, 18, 20),
    "vgg19_bn": (18, 18, 20),
    "wide_resnet101_2": (67, 71, 73),
    "wide_resnet50_2": (33, 37, 39),
}


@pytest.mark.parametrize("name", marked(tuple(PRUNABLE)))
def test_how_many_groups_can_be_pruned(name: str) -> None:
    model = build_model(name, CLASSES, seed=0).to("meta")
    traced = [
        trace(model, torch.zeros(1, 3, size(name), size(name), device="meta"), scope) for scope in ("inner", "all")
    ]
    assert (len(traced[0].prunable), len(traced[1].prunable), len(traced[1])) == PRUNABLE[name]
    unknown = {what.split(" at ")[0] for what in traced[1].unknown}
    assert unknown == next((names for kind, names in UNKNOWN.items() if name.startswith(kind)), set())


def test_the_table_names_every_network() -> None:
    assert set(PRUNABLE) == set(NETWORKS)
