"""SFP (He et al., IJCAI 2018): soft pruning of the filters with the smallest l2 norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cacp.importance import channel_importance, channel_orders
from cacp.methods.soft import soft_pruning
from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget


@dataclass(frozen=True)
class SFP:
    """The published training: 200 epochs at 0.1, times 0.2 at 60, 120 and 160."""

    method_epochs: int = 200
    method_lr: float = 0.1
    method_schedule: str = "x0.2@60,120,160/200"

    def __call__(self, subject: Subject, budget: Budget) -> Pruned:
        def orders(model: nn.Module, counts: tuple[int, ...]) -> dict[str, Tensor]:
            return channel_orders(channel_importance(model, subject.groups, "l2"))

        return soft_pruning(subject, budget, "l2", orders, self.method_epochs, self.method_lr, self.method_schedule)
