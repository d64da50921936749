"""Soft filter pruning (He et al., SFP, IJCAI 2018): filters that are zeroed after every epoch train on, and may come
back; those that are zero after the last one are pruned.

Differences from the released code: it starts from the trained weights of the run; channels inside blocks, not the sums
of residual streams, whose filters it zeroes without being able to cut them out; the rate follows from the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cacp.budget import uniform_counts
from cacp.importance import channel_importance, channel_orders
from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget, ChannelGroups, Policy
from cacp.slicing import counts_policy
from cacp.training import fit


def soft_pruning(
    subject: Subject,
    budget: Budget,
    criterion: str,
    orders: Callable[[nn.Module, tuple[int, ...]], dict[str, Tensor]],
    epochs: int,
    lr: float,
    schedule: str,
) -> Pruned:
    """Train with soft pruning; every group keeps the same ratio of its channels, as the budget allows.

    Args:
        subject: what to prune.
        budget: must be reachable.
        criterion: the name of what ranks the filters.
        orders: (network, keep counts of the prunable groups) -> group name -> (C,) channels, the most important first.
        epochs: of the training.
        lr: highest learning rate.
        schedule: of the learning rate.
    """
    groups, training = subject.groups, subject.training
    counts = uniform_counts(subject.cost_model, budget)
    model = copy.deepcopy(subject.model)

    def prune_softly(model: nn.Module) -> None:
        zero_filters(model, groups, counts_policy(groups, counts, orders(model, counts), criterion))

    prune_softly(model)
    recipe = replace(training.recipe, epochs=epochs, lr=lr, schedule=schedule)
    records = fit(
        model, training.images, None, subject.normalisation, recipe, training.seed, training.folder, prune_softly
    )
    training.track(records, epochs)
    largest = channel_orders(channel_importance(model, groups, "l2"))  # the others are zero
    return Pruned(counts_policy(groups, counts, largest, criterion), model.state_dict())


@torch.no_grad()
def zero_filters(model: nn.Module, groups: ChannelGroups, policy: Policy) -> None:
    """Zero the filters, and their biases, of the channels that a policy drops, in place."""
    for group in groups.prunable:
        dropped = sorted(set(range(group.channels)) - set(policy.keep[group.name]))
        for producer in group.producers:
            module = model.get_submodule(producer)
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[dropped] = 0
                if module.bias is not None:
                    module.bias[dropped] = 0
