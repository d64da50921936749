"""Soft filter pruning (He et al., SFP, IJCAI 2018): filters that are zeroed after every epoch train on, and may come
back; those that are zero after the last one are pruned.

Differences from the released code: it starts from the trained weights of the run; channels inside blocks, not the sums
of residual streams, whose filters it zeroes without being able to cut them out; the rate follows from the budget.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from cacp.budget import uniform_counts
from cacp.importance import channel_importance, channel_orders, filters_of, l2, shared
from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget, ChannelGroup, ChannelGroups, Policy
from cacp.slicing import counts_policy
from cacp.training import fit


@dataclass(frozen=True)
class SoftPruning:
    """Every group keeps the same ratio of its channels, as the budget allows. By default the published training: 200
    epochs at 0.1, times 0.2 at 60, 120 and 160.
    """

    method_epochs: int = 200
    method_lr: float = 0.1
    method_schedule: str = "x0.2@60,120,160/200"

    criterion: ClassVar[str]  # the name of what ranks the filters

    def order(self, model: nn.Module, group: ChannelGroup, count: int) -> Tensor:
        """Channels (C,) of a group of which `count` are kept, the most important first, on the CPU."""
        raise NotImplementedError

    def __call__(self, subject: Subject, budget: Budget) -> Pruned:
        groups, training = subject.groups, subject.training
        counts = uniform_counts(subject.cost_model, budget)
        model = copy.deepcopy(subject.model)

        def prune_softly(model: nn.Module) -> None:
            pairs = zip(groups.prunable, counts, strict=True)
            orders = {group.name: self.order(model, group, count) for group, count in pairs}
            zero_filters(model, groups, counts_policy(groups, counts, orders, self.criterion))

        prune_softly(model)
        recipe = replace(training.recipe, epochs=self.method_epochs, lr=self.method_lr, schedule=self.method_schedule)
        images, normalisation = training.images, subject.normalisation
        records = fit(model, images, None, normalisation, recipe, training.seed, training.folder, prune_softly)
        training.track(records, self.method_epochs)
        largest = channel_orders(channel_importance(model, groups, "l2"))  # the others are zero
        return Pruned(counts_policy(groups, counts, largest, self.criterion), model.state_dict())


def norm_order(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Channels (C,) of a group by the l2 norm of their filters, the largest first."""
    norms = torch.stack([l2(one) for one in filters_of(model, group)]).sum(0)
    return shared(norms, group.block).argsort(descending=True, stable=True)


@torch.no_grad()
def zero_filters(model: nn.Module, groups: ChannelGroups, policy: Policy) -> None:
    """Zero the filters, and their biases, of the channels that a policy drops, in place."""
    for group in groups.prunable:
        dropped = policy.dropped(group)
        for producer in group.producers:
            module = model.get_submodule(producer)
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[dropped] = 0
                if module.bias is not None:
                    module.bias[dropped] = 0
