"""Sliced models against masked ones, keep-all against the dense model, and policies that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Net, keep_all, lively, policy_counts, random_policy, resnet20
from torch import Tensor, nn

from cacp.graph import trace
from cacp.models.resnet import ChannelPadShortcut
from cacp.schema import Policy, UserError
from cacp.slicing import counts_policy, slice_model


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def masked_output(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The full-size model's output when the outputs of the named modules are multiplied by (C,) masks of 0 and 1."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, mask=mask: output * mask[:, None, None])
        for name, mask in masks.items()
    ]
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()


def mask(channels: int, kept: tuple[int, ...]) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1.0)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_keep_all_is_bit_identical(scope: str) -> None:
    model, x = resnet20(), images().float()
    groups = trace(model, torch.zeros(1, 3, 16, 16), scope)
    sliced = slice_model(model, groups, keep_all(groups))
    assert torch.equal(outputs(sliced, x), outputs(model, x))
    assert sliced.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, sliced.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_sliced_resnet_equals_masked(scope: str, seed: int) -> None:
    model = resnet20(seed).double()
    groups = trace(model, images()[:1], scope)
    policy = random_policy(groups, seed)
    masks = {
        producer.replace("conv", "bn"): mask(group.channels, policy.keep[group.name])  # shortcuts keep their names
        for group in groups.prunable
        for producer in group.producers
    }  # fmt: skip
    assert len(masks) == (9 if scope == "inner" else 9 + 10 + 2)  # inner, conv1 + 9 conv2, two shortcuts
    sliced = slice_model(model, groups, policy)
    expected = masked_output(model, masks, images())
    torch.testing.assert_close(outputs(sliced, images()), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert not torch.allclose(expected, outputs(model, images()), rtol=0, atol=1e-3)  # the masks do something


def test_sliced_concatenation_equals_masked() -> None:
    torch.manual_seed(0)
    model = lively(
        Net(
            lambda m, x: m.out(torch.flatten(torch.relu(m.norm(m.c(torch.cat([m.b(x), m.a(x), m.b(x)], 1)))), 1)),
            a=nn.Conv2d(3, 5, 3, padding=1),
            b=nn.Conv2d(3, 4, 1),
            c=nn.Conv2d(13, 6, 3, stride=4),
            norm=nn.BatchNorm2d(6),
            out=nn.Linear(6 * 16, 3),
        )
    ).double()
    groups = trace(model, images()[:1])
    policy = Policy({"b": (1, 3), "a": (0, 2, 4), "c": (2, 3, 5)}, "hand")
    masks = {"a": mask(5, (0, 2, 4)), "b": mask(4, (1, 3)), "norm": mask(6, (2, 3, 5))}
    sliced = slice_model(model, groups, policy)
    torch.testing.assert_close(outputs(sliced, images()), masked_output(model, masks, images()), rtol=0, atol=1e-10)
    assert sliced.c.weight.shape == (3, 2 + 3 + 2, 3, 3)
    assert torch.equal(sliced.c.weight[0, 2:5], model.c.weight[2, [4, 6, 8]])  # a's channels lie behind b's four
    assert (sliced.c.in_channels, sliced.c.out_channels, sliced.out.in_features) == (7, 3, 48)


def test_sliced_depthwise_equals_masked() -> None:
    torch.manual_seed(0)
    model = lively(
        Net(
            lambda m, x: m.c(torch.relu(m.norm(m.depthwise(torch.relu(m.a(x)))))),
            a=nn.Conv2d(3, 6, 1),
            depthwise=nn.Conv2d(6, 6, 3, groups=6, stride=2),
            norm=nn.BatchNorm2d(6),
            c=nn.Conv2d(6, 4, 1),
        )
    ).double()
    groups = trace(model, images()[:1])
    sliced = slice_model(model, groups, Policy({"a": (0, 4, 5)}, "hand"))
    expected = masked_output(model, {"norm": mask(6, (0, 4, 5))}, images())
    torch.testing.assert_close(outputs(sliced, images()), expected, rtol=0, atol=1e-10)
    depthwise = sliced.depthwise
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert torch.equal(depthwise.weight, model.depthwise.weight[[0, 4, 5]])


def test_sliced_hidden_linear_and_batch_norm_without_parameters() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.out(torch.relu(m.hidden(torch.flatten(torch.relu(m.norm(m.a(x))), 1)))),
        a=nn.Conv2d(3, 4, 3, stride=8, bias=False),
        norm=nn.BatchNorm2d(4, affine=False),
        hidden=nn.Linear(16, 8),
        out=nn.Linear(8, 3),
    ).double().eval()  # fmt: skip
    model.norm.running_mean.copy_(torch.arange(4))
    groups = trace(model, images()[:1])
    sliced = slice_model(model, groups, Policy({"a": (1, 2), "hidden": (0, 7)}, "hand"))
    hidden = mask(8, (0, 7))
    model.out.weight.data *= hidden
    expected = masked_output(model, {"norm": mask(4, (1, 2))}, images())
    torch.testing.assert_close(outputs(sliced, images()), expected, rtol=0, atol=1e-10)
    assert sliced.norm.running_mean.tolist() == [1, 2]
    assert sliced.hidden.weight.shape == (2, 8)


def test_the_model_is_left_as_it_was() -> None:
    model = resnet20().train()
    state = copy.deepcopy(model.state_dict())
    groups = trace(model, torch.zeros(1, 3, 16, 16), "all")
    sliced = slice_model(model, groups, random_policy(groups, 0))
    with torch.no_grad():
        for parameter in sliced.parameters():
            parameter.fill_(7)
    assert model.training and sliced.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_trainable_and_frozen_parameters_stay_so() -> None:
    model = resnet20()
    model.conv1.weight.requires_grad_(False)
    groups = trace(model, torch.zeros(1, 3, 16, 16), "all")
    sliced = slice_model(model, groups, random_policy(groups, 1))
    assert {name for name, parameter in sliced.named_parameters() if not parameter.requires_grad} == {"conv1.weight"}


def test_everything_stays_on_the_models_device() -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 16, 16), "all")
    sliced = slice_model(model.to("meta"), groups, random_policy(groups, 0))
    shortcut = sliced.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, ChannelPadShortcut)
    assert shortcut.index.device.type == "meta"
    assert {tensor.device.type for tensor in sliced.state_dict().values()} == {"meta"}


def test_a_policy_that_does_not_fit_is_refused_with_every_fault() -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 16, 16))
    keep = dict(keep_all(groups).keep)
    del keep["layer1.0.conv1"]
    keep |= {"conv1": (0,), "layer1.1.conv1": (16,), "layer1.2.conv1": ()}
    with pytest.raises(UserError) as caught:
        slice_model(model, groups, Policy(keep, "hand"))
    text = str(caught.value)
    assert "layer1.0.conv1: missing" in text
    assert "conv1: not a prunable group" in text
    assert "layer1.1.conv1: indices must be sorted, different and in [0, 16), got (16,)" in text
    assert "layer1.2.conv1: indices must be sorted, different and in [0, 16), got ()" in text


def test_counts_policy_keeps_the_highest_ranked_in_channel_order() -> None:
    groups = trace(resnet20(), torch.zeros(1, 3, 16, 16))
    counts = [2] * 9
    orders = {group.name: torch.arange(group.channels).roll(3) for group in groups.prunable}
    policy = counts_policy(groups, counts, orders, "l1")
    assert policy_counts(groups, policy) == counts
    assert policy.keep["layer1.0.conv1"] == (13, 14)
    assert counts_policy(groups, [4] * 9, orders, "l1").keep["layer1.0.conv1"] == (0, 13, 14, 15)


# the copy -------------------------------------------------------------------------------------------------------------


class Keepsakes(nn.Module):
    """One prunable convolution, and whatever else a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)
        self.third.weight = self.second.weight  # tied
        self.again = self.norm  # one module under two names
        self.nothing = nn.Sequential()
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.scale = torch.full((1,), 2.0)
        self.notes = [torch.zeros(2), {"depth": [3]}]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.again(self.first(x)))
        return self.nothing(self.third(self.second(x)) * self.scale + self.shift)


@pytest.fixture
def keepsakes() -> nn.Module:
    return lively(Keepsakes())


def sliced_to(model: nn.Module, *first: int) -> nn.Module:
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    return slice_model(model, groups, Policy(dict(keep_all(groups).keep) | {"first": first}, "hand"))


def storages(model: nn.Module) -> set[int]:
    """Addresses of every tensor in a model, registered or not."""
    tensors = [*model.parameters(), *model.buffers()]
    if isinstance(model, Keepsakes):
        tensors += [model.scale, model.notes[0]]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 2)], ids=str)
def test_no_tensor_is_shared_with_the_model(keepsakes: nn.Module, kept: tuple[int, ...]) -> None:
    assert storages(sliced_to(keepsakes, *kept)) & storages(keepsakes) == set()


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_no_tensor_of_a_resnet_is_shared(scope: str) -> None:
    model = resnet20()
    groups = trace(model, torch.zeros(1, 3, 16, 16), scope)
    for policy in (keep_all(groups), random_policy(groups, 0)):
        assert storages(slice_model(model, groups, policy)) & storages(model) == set()


def test_every_module_is_a_new_object_even_an_empty_one(keepsakes: nn.Module) -> None:
    sliced = sliced_to(keepsakes, 1, 2)
    assert isinstance(sliced.nothing, nn.Sequential)
    assert not {id(module) for module in sliced.modules()} & {id(module) for module in keepsakes.modules()}
    sliced.nothing.append(nn.Flatten())
    assert (len(keepsakes.nothing), len(sliced.nothing)) == (0, 1)


def test_tied_parameters_stay_tied(keepsakes: nn.Module) -> None:
    sliced = sliced_to(keepsakes, 1, 2, 3)
    assert sliced.third.bias is not sliced.second.bias
    whole = sliced_to(keepsakes, 0, 1, 2, 3)
    assert whole.third.weight is whole.second.weight
    assert len(list(whole.parameters())) == len(list(keepsakes.parameters()))


def test_a_module_under_two_names_stays_one_and_is_cut_once(keepsakes: nn.Module) -> None:
    sliced = sliced_to(keepsakes, 1, 3)
    assert sliced.again is sliced.norm
    assert torch.equal(sliced.norm.running_mean, keepsakes.norm.running_mean[[1, 3]])
    masked = masked_output(keepsakes.double(), {"again": mask(4, (1, 3))}, images())
    torch.testing.assert_close(outputs(sliced.double(), images()), masked, rtol=0, atol=1e-6)


def test_plain_attributes_are_copied_deeply(keepsakes: nn.Module) -> None:
    sliced = sliced_to(keepsakes, 1, 2)
    sliced.scale.fill_(5)
    sliced.notes[0].fill_(5)
    sliced.notes[1]["depth"].append(5)
    assert (keepsakes.scale.item(), keepsakes.notes[0].tolist(), keepsakes.notes[1]) == (2, [0, 0], {"depth": [3]})
    assert sliced.notes[1] == {"depth": [3, 5]}


def test_a_buffer_outside_of_the_state_dict_survives(keepsakes: nn.Module) -> None:
    sliced = sliced_to(keepsakes, 1, 2)
    assert dict(sliced.named_buffers())["shift"].item() == 1
    assert "shift" not in sliced.state_dict()
    sliced.shift.fill_(5)
    assert keepsakes.shift.item() == 1


def test_hooks_of_one_do_not_fire_on_the_other(keepsakes: nn.Module) -> None:
    fired: list[int] = []
    keepsakes.first.register_forward_hook(lambda module, inputs, output: fired.append(module.out_channels))
    sliced = sliced_to(keepsakes, 1, 2)
    late = sliced.first.register_forward_hook(lambda module, inputs, output: fired.append(-module.out_channels))
    fired.clear()  # tracing fires them too
    outputs(keepsakes, images().float())
    assert fired == [4]
    outputs(sliced, images().float())
    assert fired == [4, 2, -2]  # a hook from before the copy is on both
    late.remove()
    outputs(sliced, images().float())
    assert fired == [4, 2, -2, 2]


def test_the_copy_can_be_trained_sliced_again_and_copied(keepsakes: nn.Module) -> None:
    before = outputs(keepsakes, images().float())
    once = sliced_to(keepsakes, 0, 1, 3).train()
    once(images().float()).sum().backward()
    assert all(parameter.grad is not None for parameter in once.parameters())
    assert all(parameter.grad is None for parameter in keepsakes.parameters())
    twice = sliced_to(once.eval(), 0, 2)
    assert torch.equal(twice.first.weight, keepsakes.first.weight[[0, 3]])
    assert torch.equal(outputs(copy.deepcopy(twice), images().float()), outputs(twice, images().float()))
    assert torch.equal(outputs(keepsakes, images().float()), before)


def test_attributes_that_refer_to_a_tensor_refer_to_the_copy() -> None:
    model = Net(lambda m, x: m.out(m.hidden(x.flatten(1))), hidden=nn.Linear(12, 4), out=nn.Linear(4, 3))
    model.tied = [model.hidden.weight]
    groups = trace(model, torch.zeros(1, 3, 2, 2), "all")
    sliced = slice_model(model, groups, keep_all(groups))
    assert sliced.tied[0] is sliced.hidden.weight
    assert sliced.tied[0] is not model.hidden.weight
