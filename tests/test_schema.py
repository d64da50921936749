"""Frozen data: names, validation with every fault listed, JSON both ways."""

import json
import math

import pytest

from cacp.checkpoint import dump_json
from cacp.schema import (
    Budget,
    ChannelGroup,
    ChannelGroups,
    Cost,
    Policy,
    PolicyRecord,
    Score,
    UserError,
)

GROUPS = ChannelGroups(
    groups=(
        ChannelGroup("image", 3, (), ("a",), fixed_reason="the model's input"),
        ChannelGroup("a", 4, ("a",), ("b",), min_keep=1),
        ChannelGroup("b", 20, ("b", "c", "d"), ("e",), min_keep=2),
    ),
    axes=(),
    layers=(),
    fixed_macs=0,
    fixed_params=0,
    unknown=("cumsum at node cumsum",),
)


def record() -> PolicyRecord:
    cost = Cost(500, 60)
    return PolicyRecord(
        policy=Policy({"a": (0, 2), "b": (1,)}, "l1"),
        budget=Budget({"macs": 0.5, "params": 0.6}),
        score=Score(0.75, 0.9, 0.7, cost),
        search_score=Score(0.8, 0.85, 0.72, cost),
        method="cacp",
        episode=17,
        scope="all",
    )


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        ({"macs": 0.5}, "macs-0.50"),
        ({"macs": 1}, "macs-1.00"),
        ({"macs": 0.425}, "macs-0.425"),
        ({"macs": 0.1 + 0.2}, "macs-0.30"),
        ({"macs": 0.5, "params": 0.6}, "macs-0.50_params-0.60"),
    ],
)
def test_budget_names_are_two_decimals_and_more_where_needed(targets: dict[str, float], name: str) -> None:
    assert Budget(targets).name == name


@pytest.mark.parametrize("target", [0, -0.1, 1.01, math.nan, math.inf, True, "0.5", None])
def test_budget_refuses_a_target_outside_the_unit_interval(target: object) -> None:
    with pytest.raises(UserError, match=r"in \(0, 1\], but got macs="):
        Budget({"macs": target})  # type: ignore[dict-item]


def test_budget_lists_all_wrong_targets_and_refuses_none_at_all() -> None:
    with pytest.raises(UserError, match=r"but got macs=2, flops=0\.5;"):
        Budget({"macs": 2, "params": 0.5, "flops": 0.5})
    with pytest.raises(UserError, match="but got no target"):
        Budget({})


def test_groups_are_found_by_position_and_name_and_print_as_a_table() -> None:
    assert len(GROUPS) == 3
    assert GROUPS[1] is GROUPS["a"]
    assert [group.name for group in GROUPS.prunable] == ["a", "b"]
    assert str(GROUPS).split("\n") == [
        "group  channels  min  producers        consumers  prunable",
        "image  3         1                     a          no: the model's input",
        "a      4         1    a                b          yes",
        "b      20        2    b, c and 1 more  e          yes",
        "not known, kept whole: cumsum at node cumsum",
    ]


def test_policy_validation_lists_every_fault() -> None:
    Policy({"a": (0, 3), "b": (19,)}, "l1").validate(GROUPS)
    with pytest.raises(UserError) as caught:
        Policy({"image": (0,), "a": (1, 1)}, "l1").validate(GROUPS)
    assert str(caught.value).split("\n") == [
        "the policy does not fit the model:",
        "  b: missing",
        "  image: not a prunable group",
        "  a: indices must be sorted, different and in [0, 4), got (1, 1)",
    ]


@pytest.mark.parametrize("indices", [(), (2, 1), (0, 0), (-1, 0), (0, 4), (0.0,), (True,), ("0",)])
def test_policy_refuses_indices_that_are_no_sorted_subset(indices: tuple) -> None:
    with pytest.raises(UserError, match=r"a: indices must be sorted, different and in \[0, 4\)"):
        Policy({"a": indices, "b": (0,)}, "l1").validate(GROUPS)


def test_policy_record_round_trip() -> None:
    data = record().to_json()
    assert data["keep_counts"] == {"a": 2, "b": 1}
    assert data["cost"] == {"macs": 500, "params": 60}
    assert PolicyRecord.from_json(json.loads(dump_json(data))) == record()


def test_a_latency_is_a_part_of_the_cost_where_it_is_known() -> None:
    cost = Cost(500, 60, 2.5e9)
    assert cost.to_json() == {"macs": 500, "params": 60, "latency_ps": 2.5e9}
    assert Cost.from_json(json.loads(dump_json(cost.to_json()))) == cost
    assert Cost.from_json({"macs": 500, "params": 60}) == cost.counted == Cost(500, 60)
    assert Budget({"macs": 0.5, "params": 0.6, "latency": 0.7}).name == "macs-0.50_params-0.60_latency-0.70"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("budget", {"macs": 3}, "but got macs=3"),
        ("budget", {"../../macs": 0.5}, "but got ../../macs=0.5"),
        ("budget", {"macs": 10**400}, "but got macs=1000"),
        ("cost", None, "cost must be an object, but got None"),
        ("cost", {"macs": 1.5, "params": 1}, "macs must be a whole number, but got 1.5"),
        ("cost", {"macs": 1, "params": 1, "latency_ps": "1"}, "latency_ps must be a number, but got '1'"),
        ("cost", {"macs": 1, "params": 1, "latency_ps": 10**400}, "int too large to convert to float"),
        ("keep", [1], "keep must be an object, but got [1]"),
        ("keep", {"a": "0123"}, "a must be a list, but got '0123'"),
        (
            "keep",
            {"a": [0, 1], "b": [2, 1], "c": [1, 1], "d": [-1], "e": []},
            "at least 0, but not in b\n  c\n  d\n  e",
        ),
        ("keep", {"a": [0, math.nan]}, "an entry of a must be a whole number, but got nan"),
        ("score", {"top1": 1}, "score lacks loss"),
        ("score", {"top1": 10**400, "loss": 1, "probability": 1}, "int too large to convert to float"),
        ("episode", "first", "episode must be a whole number, but got 'first'"),
    ],
)
def test_damaged_policy_file_is_named_with_its_fault(key: str, value: object, text: str) -> None:
    with pytest.raises(UserError, match=r"^p\.json is not a policy file") as caught:
        PolicyRecord.from_json({**record().to_json(), key: value}, "p.json")
    assert text in str(caught.value)


def test_policy_file_without_an_entry_is_refused() -> None:
    for key in record().to_json().keys() - {"keep_counts"}:
        data = record().to_json()
        del data[key]
        with pytest.raises(UserError, match=f"it lacks {key};"):
            PolicyRecord.from_json(data, "p.json")


def test_json_keeps_number_lists_on_one_line_and_every_value() -> None:
    data = {"a": [1, -2, 3.5], "b": [], "c": ["x"], "d": {"e": [[1, 2], [3]]}, "f": [1e-07]}
    text = dump_json(data)
    assert '"a": [1, -2, 3.5],\n' in text
    assert text.endswith("}\n")
    assert json.loads(text) == data
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json({"a": math.nan})
