"""GFI-AP (Mondal et al., CVIU 2022): one global quantile over the importance of all filters.

The quantile p of their importance (`cacp.gfi`) gives a threshold; what is not above it goes, and of a group that lies
below it altogether the part p + (1 - p) / 2. Residual streams are pruned as well: their channels have the mean
importance of their filters.

Differences from the released code: one pass over the images for all layers, not one a layer; a macs target takes the
least quantile that meets it, then takes back the most important channels that still fit; the channels of a stream
count once in the quantile, not once a convolution; layer-wise retraining at one learning rate, not in proportion to the
accuracy lost on the test set. With scope all, 0.41 removes twice the MACs that are published for it: results/LOG.md.

Letters: C channels of a group, G prunable groups, F channels of all groups.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cacp.budget import meets_targets
from cacp.cost import CostModel
from cacp.importance import channel_orders
from cacp.methods.gates import Gates
from cacp.methods.subject import Pruned, Subject
from cacp.methods.threshold import filled_up
from cacp.schema import Budget, Policy
from cacp.slicing import counts_policy
from cacp.training import EpochRecord, fit


@dataclass(frozen=True)
class GFIAP:
    """A `quantile` that is given prunes by it, whatever the budget. After every group, in forward order, the network is
    retrained for `method_epochs` (0: not at all) at `method_lr`.
    """

    quantile: float | None = None
    method_epochs: int = 0
    method_lr: float = 0.008

    def __call__(self, subject: Subject, budget: Budget) -> Pruned:
        importance = subject.importance("gfi")
        ranks = GlobalQuantile(importance, subject.cost_model)
        quantile = ranks.least(budget) if self.quantile is None else self.quantile
        counts = ranks.counts(quantile)
        if self.quantile is None:
            counts = filled_up(counts, importance, subject.cost_model, budget)
        policy = counts_policy(subject.groups, counts, channel_orders(importance), "gfi")
        at_minimum = int((np.array(counts) == subject.cost_model.min_keep).sum())
        details = {"quantile": quantile, "threshold": ranks.threshold(quantile), "groups_at_minimum": at_minimum}
        weights = self._retrained(subject, policy) if self.method_epochs else None
        return Pruned(policy, weights, details)

    def _retrained(self, subject: Subject, policy: Policy) -> dict[str, Tensor]:
        """State dict of the network after its groups were pruned and retrained one after another."""
        training, model = subject.training, copy.deepcopy(subject.model)
        gates, names = Gates(model, subject.groups), subject.cost_model.names
        epochs = self.method_epochs * len(names)
        recipe = replace(training.recipe, epochs=epochs, lr=self.method_lr, schedule="constant")

        def group_by_group() -> Iterator[EpochRecord]:
            records = fit(model, training.images, None, subject.normalisation, recipe, training.seed, training.folder)
            for name in names:
                gates.close(name, policy.dropped(subject.groups[name]))
                yield from itertools.islice(records, self.method_epochs)

        training.track(group_by_group(), epochs)
        gates.remove()
        return model.state_dict()


class GlobalQuantile:
    """Keep counts by a quantile of the importance of all filters.

    Args:
        importance: scores (C,) of every prunable group, comparable over groups.
        cost_model: of the same groups.
    """

    def __init__(self, importance: dict[str, Tensor], cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._scores = [np.sort(importance[name].numpy()) for name in cost_model.names]
        self._merged = np.sort(np.concatenate(self._scores))  # (F,)

    def threshold(self, quantile: float) -> float:
        """The importance that this part of all filters does not exceed."""
        return float(self._merged[int(quantile * len(self._merged))])

    def counts(self, quantile: float) -> tuple[int, ...]:
        """Keep counts (G,) for a quantile in (0, 1); no group falls below its minimum."""
        channels, threshold = self._cost_model.channels, self.threshold(quantile)
        below = np.array([np.searchsorted(values, threshold, side="right") for values in self._scores])  # (G,)
        wholly = ((quantile + (1 - quantile) / 2) * channels).astype(np.int64)
        kept = channels - np.where(below == channels, wholly, below)
        return tuple(self._cost_model.rounded_down(np.maximum(kept, self._cost_model.min_keep)).tolist())

    def least(self, budget: Budget) -> float:
        """The least quantile that meets a reachable budget.

        Not by bisection: a group that falls below the threshold altogether keeps more than it did just before. At the
        largest, all groups are at their minimum.
        """
        model, filters = self._cost_model, len(self._merged)
        quantiles = (rank / filters for rank in range(filters))
        return next(one for one in quantiles if meets_targets(model.cost(self.counts(one)), model.dense, budget))
