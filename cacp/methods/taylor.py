"""One global threshold on Taylor scores (Molchanov et al., CVPR 2019): the least important channels of the whole model
go, until the budget is met; where that overshoots, those that still fit come back. No group falls below its minimum."""

from cacp.importance import channel_orders
from cacp.methods.subject import Pruned, Subject
from cacp.methods.threshold import most_important_counts
from cacp.schema import Budget
from cacp.slicing import counts_policy


def taylor(subject: Subject, budget: Budget) -> Pruned:
    """The policy that drops the fewest channels, in the order of their Taylor scores, that meets the budget."""
    importance = subject.importance("taylor")
    counts = most_important_counts(importance, subject.cost_model, budget)
    return Pruned(counts_policy(subject.groups, counts, channel_orders(importance), "taylor"))
