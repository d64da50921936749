"""Uniform pruning: every group keeps the same ratio of its channels, ranked by the criterion."""

from cacp.budget import uniform_counts
from cacp.importance import channel_orders
from cacp.methods.subject import Subject
from cacp.schema import Budget, Policy
from cacp.slicing import counts_policy


def uniform(subject: Subject, budget: Budget) -> Policy:
    """The policy of an even share for every group, within the budget."""
    orders = channel_orders(subject.importance(subject.criterion))
    return counts_policy(subject.groups, uniform_counts(subject.cost_model, budget), orders, subject.criterion)
