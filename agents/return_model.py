"""What a policy will return, before it is played: a Gaussian process over the keep ratios of all steps.

Kernel (Rasmussen & Williams, 2006): a constant, plus polynomials of each step's pruned part x = 1 - ratio (x, x^2, x^4,
each step with an amplitude of its own), plus a Matern 5/2 kernel over all ratios with a length scale for each. The
polynomials say that what a policy loses is nearly a sum over its steps, the Matern kernel learns what is not. The
hyperparameters are the most probable ones under a Gaussian prior on their logarithms. All is matrix products: a fit to
500 episodes of 27 steps takes milliseconds.

A return belongs to the keep ratios, whatever the target was: episodes of all targets tell about each.

Shapes: N episodes, M candidates, G steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POWERS = (1, 2, 4)
PRIORS = {  # mean and standard deviation of the logarithm
    "constant": (1.0, 1.0),
    "steps": (-1.0, 1.0),  # (G,)
    "powers": (0.0, 1.0),  # (3,)
    "matern": (-0.7, 1.0),
    "inverse_lengths": (-0.5, 0.7),  # (G,)
    "inverse_length": (0.0, 1.0),  # of all together
    "noise": (-2.3, 1.0),
}
LEARNING_RATE = 0.1  # Adam's, for the logarithms
JITTER = 1e-6

Hyperparameters = dict[str, Tensor]


class Prediction(NamedTuple):
    """Mean and standard deviation of the returns of candidates, each (M,)."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


class ReturnModel:
    """A Gaussian process: `condition` it on what was met, then `predict`; now and then `learn` its hyperparameters.

    Args:
        steps: of an episode.
    """

    def __init__(self, steps: int) -> None:
        sizes = {"steps": (steps,), "powers": (len(POWERS),), "inverse_lengths": (steps,)}
        self.parameters: Hyperparameters = {
            name: torch.full(sizes.get(name, ()), mean, dtype=torch.float64) for name, (mean, _) in PRIORS.items()
        }

    def condition(self, ratios: NDArray[np.float64], returns: NDArray[np.float64]) -> None:
        """Take in episodes.

        Args:
            ratios: (N, G) keep ratios in [0, 1].
            returns: (N,) in any unit.
        """
        self._ratios = torch.as_tensor(ratios, dtype=torch.float64)
        self._mean, self._deviation = float(returns.mean()), max(float(returns.std()), 1e-12)
        self._values = torch.as_tensor((returns - self._mean) / self._deviation, dtype=torch.float64)  # (N,)
        self._cholesky = torch.linalg.cholesky(self._covariance(self.parameters))  # (N, N)
        self._weights = torch.cholesky_solve(self._values[:, None], self._cholesky)  # (N, 1)

    def learn(self, steps: int) -> None:
        """Move the hyperparameters towards the most probable ones for the episodes taken in, by steps of Adam."""
        parameters = {name: value.clone().requires_grad_() for name, value in self.parameters.items()}
        optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)
        for _ in range(steps):
            cholesky = torch.linalg.cholesky(self._covariance(parameters))
            weights = torch.cholesky_solve(self._values[:, None], cholesky)[:, 0]
            loss = self._values @ weights / 2 + cholesky.diagonal().log().sum()
            for name, (mean, width) in PRIORS.items():
                loss = loss + ((parameters[name] - mean) / width).square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.parameters = {name: value.detach() for name, value in parameters.items()}

    def predict(self, ratios: NDArray[np.float64]) -> Prediction:
        """Returns to expect of (M, G) keep ratios, in the unit of those taken in."""
        candidates = torch.as_tensor(ratios, dtype=torch.float64)
        shared = _kernel(candidates, self._ratios, self.parameters)  # (M, N)
        explained = torch.linalg.solve_triangular(self._cholesky, shared.T, upper=False).square().sum(0)  # (M,)
        variance = _variance(candidates, self.parameters) - explained
        mean, deviation = (shared @ self._weights)[:, 0].numpy(), variance.clamp_min(1e-12).sqrt().numpy()
        return Prediction(self._mean + self._deviation * mean, self._deviation * deviation)

    def _covariance(self, parameters: Hyperparameters) -> Tensor:
        noise = (2 * parameters["noise"]).exp() + JITTER
        identity = torch.eye(len(self._ratios), dtype=torch.float64)
        return _kernel(self._ratios, self._ratios, parameters) + noise * identity


def _polynomials(ratios: Tensor, parameters: Hyperparameters) -> Tensor:
    """(N, 3 G) features of the steps."""
    pruned = 1 - ratios
    amplitudes = (parameters["steps"] + parameters["powers"][:, None]).exp()  # (3, G)
    return torch.cat([pruned**power * amplitudes[index] for index, power in enumerate(POWERS)], dim=-1)


def _kernel(left: Tensor, right: Tensor, parameters: Hyperparameters) -> Tensor:
    """(M, N) covariances of (M, G) and (N, G)."""
    scale = (parameters["inverse_lengths"] + parameters["inverse_length"]).exp()  # (G,)
    left_scaled, right_scaled = left * scale, right * scale
    squares = left_scaled.square().sum(-1)[:, None] + right_scaled.square().sum(-1) - 2 * left_scaled @ right_scaled.T
    distance = math.sqrt(5) * squares.clamp_min(1e-10).sqrt()
    matern = (1 + distance + distance.square() / 3) * (-distance).exp()
    additive = _polynomials(left, parameters) @ _polynomials(right, parameters).T
    return (2 * parameters["constant"]).exp() + additive + (2 * parameters["matern"]).exp() * matern


def _variance(ratios: Tensor, parameters: Hyperparameters) -> Tensor:
    """(M,) the kernel of every candidate with itself."""
    additive = _polynomials(ratios, parameters).square().sum(-1)
    return (2 * parameters["constant"]).exp() + additive + (2 * parameters["matern"]).exp()
