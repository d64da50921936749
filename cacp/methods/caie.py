"""CAIE (Wu et al., CVPRW 2020): channels go a few at a time while the weights train, the least important for what they
cost first, until every target is met.

Importance is Taylor's, of the gates behind the batch norms, from the mini-batches that train the weights anyway. It is
divided by rho = sum over the costs t of o_t r_t / |o|: r_t is the part of cost t that one channel fewer saves, and o_t
the part of it that is still too much, so that a target that is met drops out. Residual streams are pruned as well.

Differences from the released code: costs by the closed form, instead of a network cut anew for every group and step; of
the last step no more goes than it takes, and what it took beyond that comes back, the most important channels first,
then those that went last before it, as far as they fit; every step draws its mini-batches anew.

Letters: C channels of a group, G prunable groups, T targets.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cacp.budget import meets_targets
from cacp.cost import CostModel
from cacp.importance import batch_norms, channel_orders, shared, taylor_change
from cacp.methods.gates import Gates
from cacp.methods.subject import Pruned, Subject
from cacp.methods.threshold import filled_up
from cacp.recipe import Recipe, sgd_optimizer
from cacp.schema import COSTS, Budget, ChannelGroups, Policy
from cacp.slicing import counts_policy
from cacp.steps import Learner, Stretch, check_finite, train
from cacp.training import EpochRecord, FitState

Norms = dict[str, list[nn.BatchNorm2d]]  # those of every prunable group


class Removal(NamedTuple):
    """Channels of a group that go together: one, or as many as its keep count goes down by."""

    group: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class CAIE:
    """`channels_per_step` go after every `batches_per_step` mini-batches, which train the weights at `method_lr`;
    `constraint_aware` False ranks them by their importance alone.
    """

    constraint_aware: bool = True
    channels_per_step: int = 25
    batches_per_step: int = 30
    method_lr: float = 0.001

    def __call__(self, subject: Subject, budget: Budget) -> Pruned:
        model = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
        gates = Gates(model, subject.groups)
        recipe = replace(subject.training.recipe, epochs=1, lr=self.method_lr, schedule="constant")
        # the step in which each channel went; 0: it is here
        gone = {name: torch.zeros(len(gate)) for name, gate in gates.open.items()}
        state = FitState(Learner(model, sgd_optimizer(model, recipe)), extras=gone)
        most = math.ceil(sum(subject.cost_model.channels) / self.channels_per_step)
        norms = batch_norms(model, subject.groups)
        subject.training.track(self._steps(subject, budget, recipe, state, gates, norms), most)
        gates.remove()
        policy = final_policy(state.extras, subject.groups, subject.cost_model, budget)
        return Pruned(policy, model.state_dict(), {"steps": len(state.records)})

    def _steps(
        self, subject: Subject, budget: Budget, recipe: Recipe, state: FitState, gates: Gates, norms: Norms
    ) -> Iterator[EpochRecord]:
        """Train and prune until the budget is met: a record a step, its checkpoint on disk before."""
        training, cost_model = subject.training, subject.cost_model
        settings = {
            **asdict(recipe),
            **asdict(self),
            "budget": dict(budget.targets),
            "seed": training.seed,
            "train_images": len(training.images),
        }
        state.load(training.folder, settings)
        for name, steps in state.extras.items():
            gates.close(name, steps.nonzero().flatten().tolist())
        yield from tuple(state.records)
        while not meets_targets(cost_model.cost(_counts(gates, cost_model)), cost_model.dense, budget):
            record, importance = self._train(subject, recipe, state, norms)
            state.records.append(record)
            removals = self.removals(importance, gates, cost_model, budget)
            assert removals, "a reachable budget is met before all groups are at their minimum"
            for place, removal in enumerate(removals):
                name = cost_model.names[removal.group]
                gates.close(name, removal.channels)
                state.extras[name][list(removal.channels)] = len(state.records) + place / len(removals)
            state.save(training.folder, settings)
            yield record

    def _train(
        self, subject: Subject, recipe: Recipe, state: FitState, norms: Norms
    ) -> tuple[EpochRecord, dict[str, Tensor]]:
        """The mini-batches of a step, and the Taylor importance (C,) of every group's channels from their gradients."""
        start, training, step = time.perf_counter(), subject.training, len(state.records) + 1
        sums = {name: torch.zeros_like(group[0].weight.detach()) for name, group in norms.items()}

        def add_importance() -> None:
            for name, group in norms.items():
                sums[name] += shared(_change(group), subject.groups[name].block) ** 2

        batches = self.batches_per_step
        stretch = Stretch(subject.normalisation, recipe, training.seed, step, batches)
        totals = train(state.learner, training.images, stretch, add_importance)
        check_finite(totals.loss, state.learner.model, stretch, state.learner.optimizer)
        seconds = time.perf_counter() - start
        speed = batches * min(recipe.batch_size, len(training.images)) / seconds
        record = EpochRecord(step, self.method_lr, totals.loss, totals.top1, None, None, seconds, speed)
        return record, {name: (total / batches).cpu() for name, total in sums.items()}

    def removals(
        self, importance: dict[str, Tensor], gates: Gates, cost_model: CostModel, budget: Budget
    ) -> list[Removal]:
        """What goes in one step: the channels that are least important for what they cost, until the budget is met.

        Args:
            importance: (C,) of the channels of every prunable group, of closed ones as well.
            gates: which channels are there; left as they are.
            cost_model: of the groups.
            budget: whose targets are not met yet.
        """
        counts = _counts(gates, cost_model)
        usefulness = useful_parts(cost_model, counts, budget) if self.constraint_aware else np.ones(len(counts))
        scores = [importance[name].double().numpy() for name in cost_model.names]
        weakest = [
            sorted(kept, key=values.__getitem__) for kept, values in zip(gates.kept().values(), scores, strict=True)
        ]
        taken: list[Removal] = []
        while sum(len(removal.channels) for removal in taken) < self.channels_per_step:
            candidates = []
            for group, channels in enumerate(weakest):
                lower = cost_model.previous_count(counts, group)
                if lower < counts[group] and usefulness[group] > 0:
                    going = tuple(channels[: counts[group] - lower])
                    candidates.append((scores[group][list(going)].mean() / usefulness[group], Removal(group, going)))
            if not candidates:
                return taken
            removal = min(candidates)[1]
            taken.append(removal)
            counts[removal.group] -= len(removal.channels)
            del weakest[removal.group][: len(removal.channels)]
            if meets_targets(cost_model.cost(counts), cost_model.dense, budget):
                break
        return taken


def useful_parts(cost_model: CostModel, counts: np.ndarray, budget: Budget) -> np.ndarray:
    """rho (G,): what one channel fewer of each group saves of the costs that are above their target.

    Args:
        cost_model: of the groups.
        counts: (G,) kept channels.
        budget: at least one of its targets is not met.
    """
    columns = [COSTS.index(cost) for cost in budget.targets]  # (T,)
    now = cost_model.costs(counts.astype(np.float64))[columns]  # (T,)
    fewer = cost_model.costs(counts - np.eye(len(counts)))[:, columns]  # (G, T)
    limits = np.array(list(budget.targets.values())) * np.array(cost_model.dense)[columns]
    excess = np.maximum((now - limits) / now, 0)  # (T,)
    return (now - fewer) / now @ excess / np.linalg.norm(excess)


def final_policy(gone: dict[str, Tensor], groups: ChannelGroups, cost_model: CostModel, budget: Budget) -> Policy:
    """The channels that are here, and of the others what the budget still has room for, that which went last first.

    Args:
        gone: group name -> (C,), when each channel went, 0 for one that is here.
        groups: of the network.
        cost_model: of the groups.
        budget: met by what is here.
    """
    last = {name: steps.where(steps > 0, torch.inf) for name, steps in gone.items()}
    here = tuple(int((gone[name] == 0).sum()) for name in cost_model.names)
    return counts_policy(groups, filled_up(here, last, cost_model, budget), channel_orders(last), "taylor")


def _change(norms: list[nn.BatchNorm2d]) -> Tensor:
    """First-order change (C,) of the loss when channels are gated off behind these batch norms, from `.grad`."""
    sides = [[norm.weight for norm in norms], [norm.bias for norm in norms]]
    gamma, beta = (torch.stack([parameter.detach() for parameter in side]) for side in sides)
    slopes = [torch.stack([parameter.grad for parameter in side if parameter.grad is not None]) for side in sides]
    return taylor_change(gamma, beta, *slopes)


def _counts(gates: Gates, cost_model: CostModel) -> np.ndarray:
    """(G,) open channels of every prunable group."""
    kept = gates.kept()
    return np.array([len(kept[name]) for name in cost_model.names])
