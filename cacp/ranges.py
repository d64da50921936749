"""Numbers on a command line: kept fractions, quantiles, and ranges of them as they are written."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence

MOST_STEPS = 1000  # of a range of quantiles


class NoSuchNumber(ArgumentTypeError, ValueError):
    """What is wrong with a number: argparse prints it for a flag, jsonargparse for an entry of a config file."""


def quantile(text: float | str) -> float | str:
    """A quantile, or LOW:HIGH:STEP as it is written.

    Raises:
        NoSuchNumber: if it is neither.
    """
    try:
        if not isinstance(text, str) or ":" not in text:
            return float(text)
        low, high, step = map(float, text.split(":"))
    except ValueError as error:
        raise NoSuchNumber(f"a quantile is a number or LOW:HIGH:STEP, like 0.3:0.7:0.1, but got {text!r}") from error
    if not (0 < step < math.inf and -math.inf < low <= high < math.inf):
        raise NoSuchNumber(f"LOW:HIGH:STEP must rise by a STEP above 0, like 0.3:0.7:0.1, but got {text!r}")
    if (high - low) / step > MOST_STEPS:
        raise NoSuchNumber(f"LOW:HIGH:STEP must have at most {MOST_STEPS} steps, but got {text!r}")
    return f"{low:g}:{high:g}:{step:g}"


def quantile_list(quantiles: Sequence[float | str]) -> list[float]:
    """The quantiles one by one, ascending."""
    found = []
    for given in quantiles:
        if isinstance(given, str):
            low, high, step = map(float, given.split(":"))
            found += [low + index * step for index in range(math.floor((high - low) / step + 1e-6) + 1)]
        else:
            found.append(float(given))
    return sorted({round(one, 6) for one in found})


def macs_target(text: float | str) -> float | str:
    """A macs target, or a range LOW:HIGH of them as it is written.

    Raises:
        NoSuchNumber: if it is neither.
    """
    if isinstance(text, str) and ":" in text:
        try:
            low, high = map(float, text.split(":"))
        except ValueError as error:
            raise NoSuchNumber(f"a range of targets is LOW:HIGH, like 0.3:0.8, but got {text!r}") from error
        return f"{low:g}:{high:g}"
    return kept_fraction(text)


def kept_fraction(text: float | str) -> float:
    """A target in (0, 1].

    Raises:
        NoSuchNumber: if it is none.
    """
    try:
        target = float(text)
    except (TypeError, ValueError):
        target = math.nan
    if not 0 < target <= 1:
        raise NoSuchNumber(f"targets must be kept fractions in (0, 1], but got {text!r}; 0.5 keeps half of the MACs")
    return target


def range_ends(target: float | str) -> tuple[float, float] | None:
    """LOW and HIGH of a range; None for anything else."""
    if not isinstance(target, str):
        return None
    low, high = map(float, target.split(":"))
    return low, high
