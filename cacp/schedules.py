"""Learning rates over a training, by the name of a schedule."""

from __future__ import annotations

import math
import re

from cacp.schema import UserError

NAMED = ("constant", "paper", "step", "cosine")
SCHEDULE_HELP = (
    "constant, paper (x0.1 every 20 epochs), step (x0.1 at half and three quarters), cosine, or drops like "
    "x0.2@60,120,160/200 (times 0.2, any factor below 1, at these of 200 epochs, in proportion for another length)"
)
WARMUP_FRACTION = 0.05  # of the whole length, "cosine" only
_DROPS = re.compile(r"x(\d+\.?\d*|\.\d+)@(\d+(?:,\d+)*)/([1-9]\d*)")


def is_schedule(name: str) -> bool:
    """Whether a name is one of NAMED or describes drops, within their length."""
    drops = _DROPS.fullmatch(name)
    if drops is None:
        return name in NAMED
    places = [int(place) for place in drops[2].split(",")]
    return 0 < float(drops[1]) < 1 and min(places) > 0 and max(places) < int(drops[3])


def learning_rate(schedule: str, base_lr: float, epoch: float, epochs: int) -> float:
    """The learning rate after `epoch` (may be fractional, 0 at the start) of `epochs` epochs.

    "paper": x0.1 every 20 epochs, whatever the length. "step": x0.1 at 50 % and again at 75 % of the length.
    "cosine": linear from 0 over the first 5 % of the length, then half a cosine down to 0. `fit` asks in the middle of
    every step, so that no step is taken with 0, and a run of at most 10 steps has no warm-up that could be noticed.
    "x0.2@60,120,160/200": the epochs of a published schedule and its length; another length has them in proportion.

    Raises:
        UserError: for an unknown schedule.

    >>> [round(learning_rate("step", 0.1, epoch, 40), 6) for epoch in (0, 19.9, 20, 30)]
    [0.1, 0.1, 0.01, 0.001]
    >>> [round(learning_rate("x0.2@60,120,160/200", 0.1, epoch, 20), 6) for epoch in (5.9, 6, 12, 16)]
    [0.1, 0.02, 0.004, 0.0008]
    """
    progress = epoch / epochs
    if schedule == "constant":
        return base_lr
    if schedule == "paper":
        return base_lr * 0.1 ** (epoch // 20)
    if schedule == "step":
        return base_lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        if progress < WARMUP_FRACTION:
            return base_lr * progress / WARMUP_FRACTION
        return base_lr * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)))
    if drops := _DROPS.fullmatch(schedule):
        factor, places, length = float(drops[1]), drops[2].split(","), int(drops[3])
        return base_lr * factor ** sum(progress >= int(place) / length for place in places)
    raise UserError(f"schedule must be {SCHEDULE_HELP}, but got {schedule!r}")
