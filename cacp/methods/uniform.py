"""Uniform pruning: every group keeps the same ratio of its channels, ranked by the criterion."""

from cacp.budget import uniform_counts
from cacp.importance import channel_orders
from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget
from cacp.slicing import counts_policy


def uniform(subject: Subject, budget: Budget) -> Pruned:
    """The policy of an even share for every group, within the budget."""
    orders = channel_orders(subject.importance(subject.criterion))
    counts = uniform_counts(subject.cost_model, budget)
    return Pruned(counts_policy(subject.groups, counts, orders, subject.criterion))
