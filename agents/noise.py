"""Exploration noise: the truncated normal distribution, sampled exactly, and how its width falls over episodes.

Actions live in [low, high]; clipping a normal sample would pile probability up at the bounds, so samples are drawn from
the normal distribution conditioned on the interval, by its inverse CDF: x = mean + sigma * ndtri(u), u uniform between
ndtr((low - mean) / sigma) and ndtr((high - mean) / sigma). Nothing here knows of agents or environments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cacp.schema import UserError


def truncated_normal(
    mean: ArrayLike, sigma: float, low: float, high: float, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Sample N(mean, sigma^2) conditioned on [low, high], one uniform number a sample.

    Args:
        mean: centre before truncation, a number or an array of any shape, within [low, high].
        sigma: standard deviation before truncation, > 0.
        low: lower bound of the samples.
        high: upper bound of the samples, > low.
        generator: the only source of randomness.

    Returns:
        Samples, float64, with the shape of `mean`.

    Raises:
        UserError: for a mean outside [low, high] (its samples could not be told apart in float64), a sigma that is
            not positive, or an empty interval.
    """
    centre = np.asarray(mean, dtype=np.float64)
    if not low < high or not sigma > 0 or not np.all((centre >= low) & (centre <= high)):
        raise UserError(
            "truncated_normal needs low < high, sigma > 0 and low <= mean <= high, "
            f"but got {low=}, {high=}, {sigma=}, {mean=}; clip the mean first"
        )
    bounds = np.stack([(low - centre) / sigma, (high - centre) / sigma])  # (2, ...)
    lower, upper = torch.special.ndtr(torch.from_numpy(bounds)).numpy()
    uniform = lower + (upper - lower) * generator.random(centre.shape)
    standard = torch.special.ndtri(torch.as_tensor(uniform, dtype=torch.float64)).numpy()
    # ndtri(0) and ndtri(1) are infinite; clipping brings these (probability 1e-16) and rounding errors back.
    return np.clip(centre + sigma * standard, low, high)


@dataclass(frozen=True)
class NoiseSchedule:
    """Standard deviation of the exploration noise, by episode: sigma * decay^episodes, at least floor.

    >>> NoiseSchedule(sigma=0.5, decay=0.9, floor=0.1)(2)
    0.405

    Raises:
        UserError: unless 0 < floor <= sigma and 0 < decay <= 1.
    """

    sigma: float = 0.4
    decay: float = 0.99
    floor: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.floor <= self.sigma and 0 < self.decay <= 1):
            raise UserError(
                f"noise needs 0 < floor <= sigma and 0 < decay <= 1, but got {self}; a decay of 1 keeps sigma constant"
            )

    def __call__(self, episodes_after_warmup: int) -> float:
        """Sigma of the episode that follows `episodes_after_warmup` finished ones; constant during warm-up (<= 0)."""
        return max(self.floor, self.sigma * self.decay ** max(episodes_after_warmup, 0))
