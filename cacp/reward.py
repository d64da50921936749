"""Score x target -> reward of an episode."""

import math

from cacp.schema import Score

LEAST_LOSS = 1e-3  # nats; what lies below counts as this


def log_loss_reward(score: Score, target: float) -> float:
    """Minus the logarithm of the loss; the target takes no part.

    CACP's reward is top-1. With batch norm recalibrated, the loss before fine-tuning ranks policies more as top-1 after
    it does, above all among those that a search prefers (results/score_quality.json). Its logarithm makes a tenth less
    loss worth the same at every target, so that all can be learned together.

    >>> from cacp.schema import Cost
    >>> [round(log_loss_reward(Score(0.9, loss, Cost(1, 1)), 0.5), 2) for loss in (2.0, 1.0, 0.1, 0.0)]
    [-0.69, -0.0, 2.3, 6.91]
    """
    return -math.log(max(score.loss, LEAST_LOSS))
