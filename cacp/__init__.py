"""Channel pruning of trained CNNs: groups, cost, budgets, slicing, scoring, export."""

from cacp.cost import CostModel
from cacp.exporting import load_pruned
from cacp.graph import trace
from cacp.importance import channel_importance, channel_orders
from cacp.schema import Budget, Policy
from cacp.scoring import PolicyScorer
from cacp.slicing import counts_policy, slice_model

__all__ = [
    "Budget",
    "CostModel",
    "Policy",
    "PolicyScorer",
    "channel_importance",
    "channel_orders",
    "counts_policy",
    "load_pruned",
    "slice_model",
    "trace",
]
