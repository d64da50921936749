"""Score x target -> reward of an episode.

CACP's reward is the validation top-1 of the policy; what a target of 0.3 can reach differs from what 0.7 can, and the
agent subtracts a moving baseline of that target, so the reward itself stays plain and comparable.
"""

from cacp.schema import Score


def top1_reward(score: Score, target: float) -> float:
    """Top-1 in [0, 1] of a policy that meets the target (every policy of the env does)."""
    return score.top1
