"""Score x target -> reward of an episode."""

import math

from cacp.schema import Score

LEAST = 1e-3  # probabilities nearer to 0 or 1 count as this near


def log_odds_reward(score: Score, target: float) -> float:
    """Log odds of the mean probability of the true class, in [-6.9, 6.9]; the target takes no part.

    CACP's reward is top-1. The probability is top-1 with an answer counted by its certainty, so with less noise: what
    is best by it on the search's images is best on others. A search by the loss, which a few images with certain and
    wrong answers decide, finds policies of equal loss and less top-1 there (results/LOG.md). The log odds put half the
    errors at 0.95 on a par with half the errors at 0.5, so that all targets can be learned together.

    >>> from cacp.schema import Cost
    >>> [round(log_odds_reward(Score(0.9, 0.3, p, Cost(1, 1)), 0.5), 2) for p in (0.0, 0.5, 0.9)]
    [-6.91, 0.0, 2.2]
    """
    probability = min(max(score.probability, LEAST), 1 - LEAST)
    return math.log(probability / (1 - probability))
