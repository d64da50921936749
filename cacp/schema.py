"""The data that modules hand to each other: frozen, comparable, JSON both ways.

Vocabulary: a *group* is a set of tensors' channel axes that must shrink together; a *policy* says which channels of
every prunable group stay; a *budget* is the set of targets (kept fractions of a dense cost) that one policy must meet;
a *score* is what the evaluation of a policy returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cacp.parsing import check_shape, shortened

COSTS = ("macs", "params", "latency")  # in the order of Cost
PS_PER_MS = 1e9
TARGET_TOLERANCE = (
    0.005  # a policy uses a target up when its cost lies in [target - tolerance, target] of the dense cost
)


class UserError(ValueError):
    """A mistake of the caller's; the message names the parameter, the rule, the received value and the remedy."""


def listed(wrong: Sequence[str], separator: str = "\n  ", most: int = 300) -> str:
    """All that is wrong, for a message; a file that is wrong in thousands of places does not fill the screen.

    >>> listed(["a", "b", "c"], ", ", most=2)
    'a, b and 1 more'
    """
    return separator.join(wrong[:most]) + (f" and {len(wrong) - most} more" if len(wrong) > most else "")


class Normalisation(NamedTuple):
    """Per-channel mean and standard deviation of images in [0, 1] that a model's weights expect."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Cost(NamedTuple):
    """Multiply-accumulates of conv and linear layers for one image, the number of parameters, and picoseconds of a
    batch by a latency table; 0 without one."""

    macs: int
    params: int
    latency_ps: float = 0.0

    def __str__(self) -> str:
        latency = f", latency {self.latency_ps / PS_PER_MS:.3f} ms" if self.latency_ps else ""
        return f"macs {self.macs}, params {self.params}{latency}"

    @property
    def counted(self) -> Cost:
        """Without the latency: what a model has on any device."""
        return self._replace(latency_ps=0.0)

    def to_json(self) -> dict[str, float]:
        """All that is known."""
        return {name: value for name, value in self._asdict().items() if value or name != "latency_ps"}

    @classmethod
    def from_json(cls, data: Any) -> Cost:
        """Read what `to_json` wrote; ValueError for anything else."""
        check_shape(data, {"macs": int, "params": int}, "a cost")
        check_shape(data, {key: float for key in data if key == "latency_ps"}, "a cost")
        return cls(data["macs"], data["params"], float(data.get("latency_ps", 0.0)))


class Score(NamedTuple):
    """Evaluation of a policy: top1 in [0, 1], mean cross-entropy loss in nats, mean probability of the true class in
    [0, 1], cost of the sliced model."""

    top1: float
    loss: float
    probability: float
    cost: Cost

    def to_json(self) -> dict[str, float]:
        """All but the cost."""
        return {"top1": self.top1, "loss": self.loss, "probability": self.probability}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], cost: Cost) -> Score:
        return cls(float(data["top1"]), float(data["loss"]), float(data["probability"]), cost)


class Axis(NamedTuple):
    """One channel axis of one module, described by the groups that it is made of, in channel order.

    `role` is "out" (a layer's outputs), "in" (its inputs) or "features" (batch norm and other per-channel modules;
    outputs of depthwise and grouped convolutions, whose inputs go with them). Every channel of `segments` covers
    `repeat` consecutive entries of the axis (a flattened feature map has height x width entries a channel).
    """

    module: str
    role: str
    segments: tuple[str, ...]
    repeat: int = 1


class Layer(NamedTuple):
    """What the cost of one module is made of.

    macs = macs_per_pair * n_in * n_out and params = params_per_pair * n_in * n_out + params_per_out * n_out, where
    n_in and n_out are the kept entries of its axes; a per-channel module (batch norm, depthwise conv, grouped conv,
    which shrinks by whole groups) has no `n_in`: its `inputs` is None and n_in counts as 1.
    """

    module: str
    kind: str
    inputs: Axis | None
    outputs: Axis
    macs_per_pair: int
    params_per_pair: int
    params_per_out: int
    height: int  # of the output feature map, pixels
    width: int
    kernel: int
    stride: int


class LayerTime(NamedTuple):
    """Picoseconds that a layer, and what goes with it, takes of a batch: fixed_ps + per_in_ps * n_in + per_out_ps *
    n_out + per_pair_ps * n_in * n_out, none of them negative. n_in and n_out are the kept entries of its axes, 1
    without an axis.
    """

    name: str
    inputs: Axis | None
    outputs: Axis | None
    fixed_ps: float
    per_in_ps: float
    per_out_ps: float
    per_pair_ps: float


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must shrink together, named after the first layer that produces them.

    `fixed_reason` says why the group stays whole (empty for a prunable group). Keep counts are multiples of `multiple`,
    or all channels. `block` channels in a row stay or go together: those of one group of a grouped convolution.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    min_keep: int = 1
    fixed_reason: str = ""
    multiple: int = 1
    block: int = 1

    @property
    def prunable(self) -> bool:
        return not self.fixed_reason


@dataclass(frozen=True)
class ChannelGroups(Sequence[ChannelGroup]):
    """All groups of a model in forward order, with the axes that slicing cuts and the layers that cost counts.

    `unknown` names operators that tracing did not know, each with the place where it stands; the groups they touch
    are whole. `latency` is of a `cacp.latency_table.LatencyTable`; with it, latency is a cost like the others.
    """

    groups: tuple[ChannelGroup, ...]
    axes: tuple[Axis, ...]
    layers: tuple[Layer, ...]
    fixed_macs: int  # of layers that tracing does not know
    fixed_params: int  # parameters outside conv, linear and batch norm
    unknown: tuple[str, ...] = ()
    latency: tuple[LayerTime, ...] = ()
    _by_name: dict[str, ChannelGroup] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({group.name: group for group in self.groups})

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __getitem__(self, key: Any) -> Any:
        """A group by position or by name."""
        return self._by_name[key] if isinstance(key, str) else self.groups[key]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if group.prunable)

    def __str__(self) -> str:
        rows = [("group", "channels", "min", "producers", "consumers", "prunable")]
        for group in self.groups:
            rows.append(
                (
                    group.name,
                    str(group.channels),
                    str(group.min_keep) + (f", by {group.multiple}" if group.multiple > 1 else ""),
                    _shortened(group.producers),
                    _shortened(group.consumers),
                    "yes" if group.prunable else f"no: {group.fixed_reason}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"not known, kept whole: {name}" for name in self.unknown)])


def _shortened(names: Sequence[str], most: int = 2) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


@dataclass(frozen=True)
class Budget:
    """The targets that one policy must meet together: cost name -> kept fraction of the dense cost, in (0, 1].

    Raises:
        UserError: for an unknown cost, a target outside (0, 1], or no target at all.

    >>> Budget({"macs": 0.5}).name
    'macs-0.50'
    """

    targets: Mapping[str, float]

    def __post_init__(self) -> None:
        wrong = [
            f"{cost!s:.80}={shortened(target)}"
            for cost, target in self.targets.items()
            if cost not in COSTS or isinstance(target, bool) or not _is_fraction(target)
        ]
        if wrong or not self.targets:
            raise UserError(
                f"a budget maps {' or '.join(COSTS)} to the kept fraction of the dense cost, in (0, 1], "
                f"but got {listed(wrong, ', ') or 'no target'}; macs 0.5 keeps at most half of the MACs"
            )

    @property
    def name(self) -> str:
        """Folder-safe name: two decimals, more where needed."""
        return "_".join(f"{cost}-{_decimals(target)}" for cost, target in self.targets.items())

    @property
    def mean_target(self) -> float:
        """The target that stands for the budget: its only one, or the mean of several."""
        return sum(self.targets.values()) / len(self.targets)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1


def _decimals(target: float) -> str:
    short = f"{target:.2f}"
    return short if math.isclose(float(short), target, abs_tol=1e-9) else f"{target:.6f}".rstrip("0")


@dataclass(frozen=True)
class Policy:
    """For every prunable group the sorted indices of the channels that stay, and the criterion that ranked them."""

    keep: Mapping[str, tuple[int, ...]]
    criterion: str

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(indices) for name, indices in self.keep.items()}

    def dropped(self, group: ChannelGroup) -> list[int]:
        """The channels of a group that go, sorted."""
        return sorted(set(range(group.channels)) - set(self.keep[group.name]))

    def validate(self, groups: ChannelGroups) -> None:
        """Check the policy against the groups of a model.

        Raises:
            UserError: listing every group that is missing, unknown, empty, unsorted, duplicated or out of range.
        """
        prunable = {group.name: group for group in groups.prunable}
        wrong = [f"{name}: missing" for name in prunable if name not in self.keep]
        wrong += [f"{name!s:.80}: not a prunable group" for name in self.keep if name not in prunable]
        for name, indices in self.keep.items():
            fault = _fault(indices, prunable[name]) if name in prunable else ""
            wrong += [f"{name!s:.80}: {fault}, got {shortened(indices)}"] if fault else []
        if wrong:
            raise UserError("the policy does not fit the model:\n  " + listed(wrong))


def _fault(indices: Sequence[int], group: ChannelGroup) -> str:
    """What is wrong with the kept indices of a group; empty for nothing."""
    if not _is_sorted_subset(indices, group.channels):
        return f"indices must be sorted, different and in [0, {group.channels})"
    blocks = {index // group.block for index in indices}
    if len(indices) != group.block * len(blocks):
        return f"every {group.block} channels of a grouped convolution's group must stay or go together"
    return ""


def _is_sorted_subset(indices: Sequence[int], channels: float) -> bool:
    whole = all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    return (
        bool(indices)
        and whole
        and indices[0] >= 0
        and indices[-1] < channels
        and all(a < b for a, b in itertools.pairwise(indices))
    )


_SCORE = {"top1": float, "loss": float, "probability": float}
_POLICY_FILE = {
    "budget": {str: float},
    "method": str,
    "episode": int,
    "scope": str,
    "weights_sha256": str,
    "details": {str: float},
    "criterion": str,
    "cost": {},
    "score": _SCORE,
    "search_score": _SCORE,
    "keep": {str: [int]},
}


@dataclass(frozen=True)
class PolicyRecord:
    """A policy file: the policy, the budget it was found for, its score, and where it came from.

    `score` was measured in fp32 on the second half of the validation images; `search_score` on the first.
    """

    policy: Policy
    budget: Budget
    score: Score
    search_score: Score
    method: str  # the agent or method that found it
    episode: int  # 0 for a method without episodes
    scope: str = "inner"
    weights_sha256: str = ""  # of NAME.safetensors beside it, from a method that trains; empty: the dense model's serve
    details: Mapping[str, float] = field(default_factory=dict)  # figures of the method's

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": dict(self.budget.targets),
            "method": self.method,
            "episode": self.episode,
            "scope": self.scope,
            "weights_sha256": self.weights_sha256,
            "details": dict(self.details),
            "criterion": self.policy.criterion,
            "cost": self.score.cost.to_json(),
            "score": self.score.to_json(),
            "search_score": self.search_score.to_json(),
            "keep_counts": self.policy.counts,
            "keep": {name: list(indices) for name, indices in self.policy.keep.items()},
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "policy") -> PolicyRecord:
        """Read what `to_json` wrote.

        Raises:
            UserError: naming `source` and the entry that is missing or of the wrong kind.
        """
        try:
            check_shape(data, _POLICY_FILE)
            wrong = [name for name, indices in data["keep"].items() if not _is_sorted_subset(indices, math.inf)]
            if wrong:
                raise ValueError(f"kept indices must be sorted, different and at least 0, but not in {listed(wrong)}")
            cost = Cost.from_json(data["cost"])
            scores = [Score.from_json(data[key], cost) for key in ("score", "search_score")]
            return cls(
                policy=Policy({name: tuple(indices) for name, indices in data["keep"].items()}, data["criterion"]),
                budget=Budget(data["budget"]),
                score=scores[0],
                search_score=scores[1],
                method=data["method"],
                episode=data["episode"],
                scope=data["scope"],
                weights_sha256=data["weights_sha256"],
                details={name: float(value) for name, value in data["details"].items()},
            )
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{source} is not a policy file: {error}; write it again with search.py or prune.py"
            ) from error
