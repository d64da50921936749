"""The measurements of `benchmarks.search_speed`, summed up and shown.

Letters: P policies, R repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.peers import Shape
from cacp.evaluation import dtype_name
from cacp.reporting import console, percent, table
from cacp.schema import Cost, Policy

OURS, OURS_FP32 = "ours", "ours fp32"
OURS_LOADED = "ours, and loaded into the fused network"  # the slicing phase of a search


class Drawn(NamedTuple):
    """A policy, its macs target, and its cost."""

    policy: Policy
    target: float
    cost: Cost


class Observation(NamedTuple):
    """One policy scored once by one system."""

    seconds: float
    phases: dict[str, float]  # seconds of slicing, recalibration and evaluation
    top1: float


def floor_seconds(macs: float, images: int, rate: float) -> float:
    """Least seconds of a forward pass of `images` at `macs` each, on a machine of `rate` MACs a second.

    >>> floor_seconds(64e6, 3000, 400e9)
    0.48
    """
    return macs * images / rate


class Measured(NamedTuple):
    """All measurements of a run."""

    drawn: list[Drawn]  # P
    images: dict[str, int]  # that a system runs for a score
    observations: dict[str, list[Observation]]  # R * P of every system, repeat by repeat
    slicing: list[float]  # (R * P,) seconds of slice_model
    rates: dict[Shape, float]  # MACs a second

    @property
    def targets(self) -> list[float]:
        return [one.target for one in self.drawn]

    @property
    def rate(self) -> float:
        return max(self.rates.values())

    def seconds(self, name: str) -> np.ndarray:
        """(P,): the median over repeats."""
        return self.medians([one.seconds for one in self.observations[name]])

    def phase(self, name: str, phase: str) -> np.ndarray:
        return self.medians([one.phases.get(phase, 0.0) for one in self.observations[name]])

    def medians(self, values: Sequence[float]) -> np.ndarray:
        return np.median(np.array(values).reshape(-1, len(self.drawn)), axis=0)

    def top1(self, name: str) -> np.ndarray:
        """(P,): of the first repeat; the others are equal."""
        return np.array([one.top1 for one in self.observations[name][: len(self.drawn)]])

    def floor(self, name: str) -> np.ndarray:
        """(P,) seconds."""
        images = self.images[name]
        return np.array([floor_seconds(one.cost.macs, images, self.rate) for one in self.drawn])

    def by_target(self, values: np.ndarray) -> dict[str, np.ndarray]:
        return by_target(np.array(self.targets), values)

    def described(self, values: np.ndarray) -> dict[str, Any]:
        """Median and interquartile range of values (P,), overall and by target."""
        parts = {target: spread(part) for target, part in self.by_target(values).items()}
        return spread(values) | {"by_target": parts}


def by_target(targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The values (P, ...) of every target; targets: (P,)."""
    return {str(target): values[targets == target] for target in sorted(set(targets.tolist()))}


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and interquartile range.

    >>> spread([1.0, 2.0, 3.0, 4.0, 10.0])
    {'median': 3.0, 'iqr': 2.0}
    """
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "iqr": high - low}


def summary(measured: Measured) -> dict[str, Any]:
    best = max(measured.rates, key=lambda shape: measured.rates[shape])
    slicing = {OURS: measured.medians(measured.slicing)}
    slicing |= {name: measured.phase(name, "slicing") for name in ("A", "B") if name in measured.images}
    slicing[OURS_LOADED] = measured.phase(OURS, "slicing")
    return {
        "systems": {name: system_row(measured, name) for name in measured.images},
        "times_as_fast": {
            ours: {name: compared(measured, ours, name) for name in measured.images if name not in (OURS, OURS_FP32)}
            for ours in (OURS, OURS_FP32)
        },
        "slicing_ms": {name: measured.described(1000 * seconds) for name, seconds in slicing.items()},
        "slicing_times_as_fast": {name: spread(slicing[name] / slicing[OURS]) for name in slicing if name != OURS},
        "floor": {
            "gmacs_per_second": measured.rate / 1e9,
            "shape": best._asdict() | {"dtype": dtype_name(best.dtype)},
            "best_by_dtype": {
                dtype_name(dtype): max(rate for shape, rate in measured.rates.items() if shape.dtype == dtype) / 1e9
                for dtype in {shape.dtype: None for shape in measured.rates}
            },
            "seconds_of_a_policy": measured.described(measured.floor(OURS)),
        },
    }


def system_row(measured: Measured, name: str) -> dict[str, Any]:
    seconds, images = measured.seconds(name), measured.images[name]
    median = float(np.median(seconds))
    phases = ("slicing", "recalibration", "evaluation")
    return {
        "seconds_a_policy": measured.described(seconds) | {"total": float(seconds.sum())},
        "policies_per_second": {"from_median": 1 / median, "from_total": len(seconds) / float(seconds.sum())},
        "images_a_policy": images,
        "images_per_second": images / median,
        "part_of_floor": measured.described(measured.floor(name) / seconds),
        "phase_seconds": {phase: spread(measured.phase(name, phase)) for phase in phases},
        "mean_top1": {target: float(top1.mean()) for target, top1 in measured.by_target(measured.top1(name)).items()},
    }


def compared(measured: Measured, ours: str, other: str) -> dict[str, Any]:
    """How many times as fast ours is: the other's seconds divided by ours, of the medians and policy by policy."""
    first, second = measured.seconds(ours), measured.seconds(other)
    return {"of_medians": float(np.median(second) / np.median(first)), "of_pairs": measured.described(second / first)}


def agreements(measured: Measured, plain: Sequence[float]) -> dict[str, Any]:
    """How far apart the top-1 of the systems are; plain PyTorch in fp32 scored the first policies only."""
    top1 = {name: measured.top1(name) for name in measured.images}
    pairs = [(OURS, OURS_FP32), *((OURS, name) for name in ("A", "B", "A stale") if name in top1)]
    found = {f"{a} and {b}": agreement(top1[a], top1[b], measured.targets) for a, b in pairs}
    for name in (OURS, OURS_FP32):
        found[f"{name} and plain fp32"] = agreement(top1[name][: len(plain)], np.array(plain), measured.targets)
    return found


def agreement(first: np.ndarray, second: np.ndarray, targets: Sequence[float]) -> dict[str, Any]:
    """Differences of top-1 and rank correlations (Kendall's tau-b, Spearman's rho), overall and within each target.

    Args:
        first: (P,) top-1 in [0, 1].
        second: (P,), of the same policies.
        targets: of the policies; more are not looked at.
    """
    difference, target_of = np.abs(first - second), np.array(targets[: len(first)])
    pairs = by_target(target_of, np.stack([first, second], axis=1))  # (P of the target, 2) each
    within = {target: rank_correlations(*pair.T) for target, pair in pairs.items()}
    return {
        "policies": len(first),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        **rank_correlations(first, second),
        "within_target": within,
    }


def rank_correlations(first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    """Kendall's and Spearman's of two scores (P,); None where one has a single value: there is no order to agree on."""
    if min(len(set(first.tolist())), len(set(second.tolist()))) < 2:
        return {"kendall": None, "spearman": None}
    correlations = stats.kendalltau(first, second), stats.spearmanr(first, second)
    return dict(zip(("kendall", "spearman"), (float(one.statistic) for one in correlations), strict=True))


def raw(measured: Measured, plain: Sequence[float]) -> dict[str, Any]:
    """Every single measurement; seconds are repeat by repeat (R * P,), the rest (P,)."""
    return {
        "target": measured.targets,
        "macs": [one.cost.macs for one in measured.drawn],
        "keep_counts": [list(one.policy.counts.values()) for one in measured.drawn],
        "seconds": {name: [round(one.seconds, 6) for one in seen] for name, seen in measured.observations.items()},
        "slicing_phase_seconds": {
            name: [round(one.phases["slicing"], 6) for one in seen] for name, seen in measured.observations.items()
        },
        "slice_model_seconds": [round(seconds, 6) for seconds in measured.slicing],
        "top1": {name: measured.top1(name).tolist() for name in measured.images} | {"plain fp32": list(plain)},
        "gmacs_per_second": {
            f"{dtype_name(shape.dtype)} {shape.channels} channels, {shape.pixels} px, batch {shape.batch}": round(
                rate / 1e9, 1
            )
            for shape, rate in measured.rates.items()
        },
    }


# showing --------------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    """The tables of a result."""
    targets = list(result["systems"][OURS]["seconds_a_policy"]["by_target"])
    rows = []
    for name, row in result["systems"].items():
        seconds = row["seconds_a_policy"]
        faster = result["times_as_fast"][OURS].get(name)
        rows.append(
            [
                name,
                f"{row['policies_per_second']['from_median']:.2f}",
                f"{row['images_per_second']:,.0f}",
                f"{seconds['median']:.3f} ({seconds['iqr']:.3f})",
                *(f"{seconds['by_target'][target]['median']:.3f}" for target in targets),
                percent(row["part_of_floor"]["median"]),
                f"{faster['of_medians']:.2f}, {faster['of_pairs']['median']:.2f}" if faster else "-",
            ]
        )
    columns = ["system", "policies/s", "images/s", "s a policy (IQR)", *(f"at {target}" for target in targets)]
    count, images = result["settings"]["policies"], result["systems"][OURS]["images_a_policy"]
    title = f"{count} policies, {images} images each on {result['settings']['device']}; ours is so many times as fast"
    console.print(table(title, [*columns, "of floor, %", "ours: medians, pairs"], rows))
    show_details(result)


def show_details(result: Mapping[str, Any]) -> None:
    floor, convolved = result["floor"], result["convolutions_only"]
    shape = ", ".join(f"{key} {value}" for key, value in floor["shape"].items())
    console.print(f"floor: {floor['gmacs_per_second']:.0f} GMAC/s ({shape})")
    steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in convolved["seconds_a_policy"].items())
    console.print(f"seconds a policy, median of {convolved['policies']}: {steps}")
    phases = result["systems"][OURS]["phase_seconds"]
    console.print("ours, s: " + ", ".join(f"{phase} {found['median']:.4f}" for phase, found in phases.items()))
    slicing = ", ".join(f"{name} {found['median']:.2f}" for name, found in result["slicing_ms"].items())
    console.print(f"slicing alone, ms: {slicing}")
    rows = [
        [
            pair,
            found["policies"],
            percent(found["mean_difference"]),
            percent(found["largest_difference"]),
            *(
                ", ".join("-" if one[key] is None else f"{one[key]:.2f}" for key in ("kendall", "spearman"))
                for one in (found, *found["within_target"].values())
            ),
        ]
        for pair, found in result["agreement"].items()
    ]
    within = next(iter(result["agreement"].values()))["within_target"]
    columns = ["top-1 of", "policies", "mean, %", "largest, %", "tau, rho", *(f"at {target}" for target in within)]
    console.print(table("agreement of scores: differences and rank correlations", columns, rows))
    for name, reason in result["left_out"].items():
        console.print(f"{name} left out: {reason}")
