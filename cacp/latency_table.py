"""How long a pruned network takes, from a table of its layers: latency as a cost like macs and params.

A layer, with what goes with it (batch norm, activation, addition, pooling), takes a non-negative combination of 1,
n_in, n_out and n_in * n_out of its channels, so that latency never falls when a count grows, and is a polynomial of
second degree as macs are. `cacp.timing` measures the table, and how far it is off.

Not known: steps at certain channel counts. Where they matter the errors show it, and `note` says what multiples of 8
give.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from cacp import operators
from cacp.cost import CostModel
from cacp.parsing import check_shape, shortened
from cacp.schema import Axis, ChannelGroups, LayerTime, UserError

FORMAT, FILE = 1, "latency.json"  # in a run folder
WHOLE = "whole network"  # what the layers alone cannot see
LARGEST_PS = 2.0**53  # 2.5 hours; sums stay exact
COEFFICIENTS = LayerTime._fields[3:]
REMEDY = "delete it, and the policies and search that were made with it, to measure again"


class Checked(NamedTuple):
    """A network that the fit has not seen: parts of the dense network's macs and latency."""

    policy: str
    macs: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured)


@dataclass(frozen=True)
class LatencyTable:
    """Picoseconds of every layer as a function of its channels, and how well they predict.

    `groups` has channels, least keep count and multiple of every prunable group that was varied. `fit_error` is what
    the layers' times differ from their fit, in all, as a part of the dense network's: the median over the networks.
    """

    device: str
    threads: int
    torch: str
    batch: int  # images
    input_shape: tuple[int, ...]  # (C, H, W)
    groups: Mapping[str, tuple[int, ...]]
    dense_ps: float  # by the table
    measured_dense_ps: float
    layers: Mapping[str, Mapping[str, float]]  # name -> fixed_ps, per_in_ps, per_out_ps, per_pair_ps
    fit_error: float
    checked: tuple[Checked, ...]
    note: str = ""

    @property
    def median_error(self) -> float:
        return statistics.median(one.error for one in self.checked)

    @property
    def largest_error(self) -> float:
        return max(one.error for one in self.checked)

    def to_json(self) -> dict[str, Any]:
        errors = {"median_error": self.median_error, "largest_error": self.largest_error}
        return {"format": FORMAT, **asdict(self), "checked": [one._asdict() for one in self.checked], **errors}

    @classmethod
    def from_json(cls, data: Any, source: str) -> LatencyTable:
        """Read what `to_json` wrote.

        Raises:
            UserError: naming `source` and what is wrong.
        """
        try:
            check_shape(data, _TABLE_FILE)
            if data["format"] != FORMAT or not data["checked"]:
                raise ValueError(f"it must have format {FORMAT} and checked networks")
            fields = {name: data[name] for name in cls.__dataclass_fields__}
            fields["checked"] = tuple(Checked(*(one[name] for name in Checked._fields)) for one in data["checked"])
            fields["groups"] = {name: tuple(numbers) for name, numbers in data["groups"].items()}
            fields["input_shape"] = tuple(data["input_shape"])
            table = cls(**fields)
            wrong = [
                f"{name!s:.80}: {shortened(dict(time))}"
                for name, time in table.layers.items()
                if not all(0 <= float(value) <= LARGEST_PS for value in time.values())
            ]
            if wrong:
                raise ValueError(f"picoseconds must lie in [0, 2**53], but not in {', '.join(wrong[:5])}")
        except (ValueError, OverflowError) as error:
            raise UserError(f"{source} is no latency table: {error}; {REMEDY}") from error
        return table

    def applied(self, groups: ChannelGroups, graph: fx.Graph, source: str) -> ChannelGroups:
        """The groups with latency as a third cost.

        Args:
            groups: of the network.
            graph: of the same network.
            source: of the table, for the message.

        Raises:
            UserError: if the table is of another network or other groups.
        """
        terms = layer_terms(groups, graph)
        if list(self.layers) != [*(term.name for term in terms), WHOLE] or dict(self.groups) != ranges(groups):
            raise UserError(
                f"{source} was measured for another network, or another scope, ignore, min_keep or channel_multiple; "
                f"{REMEDY}"
            )
        timed = with_times(groups, terms, self.layers)
        dense_ps = CostModel(timed).dense.latency_ps
        if not 0 < dense_ps <= LARGEST_PS or dense_ps != self.dense_ps:
            raise UserError(
                f"{source} says that the dense network takes {self.dense_ps!r} ps, but its layers sum up to "
                f"{dense_ps!r}; {REMEDY}"
            )
        return timed


_TABLE_FILE = {
    "format": int,
    "device": str,
    "threads": int,
    "torch": str,
    "batch": int,
    "input_shape": [int],
    "groups": {str: [int]},
    "dense_ps": float,
    "measured_dense_ps": float,
    "layers": {str: dict.fromkeys(COEFFICIENTS, float)},
    "fit_error": float,
    "checked": [{"policy": str, "macs": float, "predicted": float, "measured": float}],
    "note": str,
}


def ranges(groups: ChannelGroups) -> dict[str, tuple[int, ...]]:
    """Channels, least keep count and multiple of every prunable group."""
    return {group.name: (group.channels, group.min_keep, group.multiple) for group in groups.prunable}


def with_times(
    groups: ChannelGroups, terms: Sequence[Term], layers: Mapping[str, Mapping[str, float]]
) -> ChannelGroups:
    """The groups with the coefficients of `layers`, those of the terms and of the whole network, as a third cost."""
    axes = [*((term.inputs, term.outputs) for term in terms), (None, None)]
    times = [
        LayerTime(name, *pair, *(float(layers[name][key]) for key in COEFFICIENTS))
        for name, pair in zip([*(term.name for term in terms), WHOLE], axes, strict=True)
    ]
    return replace(groups, latency=tuple(times))


# what is timed --------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """A layer with what goes with it: axes, None where the time does not depend on channels, and nodes of the graph."""

    name: str
    inputs: Axis | None
    outputs: Axis | None
    nodes: list[str]


def layer_terms(groups: ChannelGroups, graph: fx.Graph) -> list[Term]:
    """The terms of a network's graph, in forward order: a node goes with the layer before it while it has its
    channels.

    Args:
        groups: from `cacp.graph.trace`.
        graph: of the same network.
    """
    reads = {axis.module: axis for axis in groups.axes if axis.role == "in"}
    makes = {layer.module: layer.outputs for layer in groups.layers}
    makes |= {axis.module: axis for axis in groups.axes if axis.role != "in"}
    layers = {*reads, *(layer.module for layer in groups.layers if layer.kind != "batchnorm")}
    terms: dict[str, Term] = {}
    owners: dict[fx.Node, Term] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        sources = [owners[source] for source in node.all_input_nodes if source in owners]
        module = str(node.target) if node.op == "call_module" else ""
        if module in layers:
            term = Term(module, reads.get(module), makes[module], [])
        else:
            term = _following(node, module, sources, makes)
        owners[node] = terms.setdefault(term.name, term)
        owners[node].nodes.append(node.name)
    return list(terms.values())


def _following(node: fx.Node, module: str, sources: Sequence[Term], makes: Mapping[str, Axis]) -> Term:
    """The term of a node that is no layer: that before it, or one of its own where it has other channels."""
    if not sources:
        return Term(node.name, None, None, [])
    outputs = makes.get(module, sources[0].outputs)
    if operators.KIND_OF.get(node.target) == "cat":
        outputs = Axis(node.name, "out", tuple(name for one in sources if one.outputs for name in one.outputs.segments))
    same = outputs == sources[0].outputs or (
        outputs and sources[0].outputs and outputs.segments == sources[0].outputs.segments
    )
    return sources[0] if same else Term(node.name, None, outputs, [])
