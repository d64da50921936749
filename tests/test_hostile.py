"""Files, budgets, settings and command lines that anybody may have written: whatever they hold, they are read or
refused in one message; nothing ends in another error, nor hangs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml
from conftest import Net, lively, random_policy, resnet20
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from agents import make_agent
from cacp.checkpoint import NEWEST, PREVIOUS, load_json, load_state, load_tensors, pack, save_state, save_tensors
from cacp.config import experiment_from, parse
from cacp.cost import CostModel
from cacp.exporting import ARCHITECTURE, WEIGHTS, Architecture, load_pruned, save_pruned
from cacp.graph import trace
from cacp.history import Episode, History
from cacp.models.weights import load_weights
from cacp.page import markup, page
from cacp.parsing import LARGEST_JSON, parse_json, parse_settings, read_text
from cacp.policies import load_policies, save_policy
from cacp.records import resume
from cacp.runfolder import read_run
from cacp.schema import Budget, ChannelGroups, Cost, Normalisation, Policy, PolicyRecord, Score, UserError
from cacp.slicing import slice_model
from cacp.sweep import SweepRow, load_sweep
from envs import ChannelPruningEnv

LONGEST_S = 30  # of one input: a hang

# inputs ---------------------------------------------------------------------------------------------------------------

HUGE = st.sampled_from([2**31, 2**63, 10**12, -(10**12), 10**400, 1e308, -0.0, 5e-324, math.inf, -math.inf, math.nan])
WORDS = st.sampled_from(
    ["", "macs", "../../etc/passwd", "/dev/zero", "\ud800", "\x00", "[/b]", "os:system", "resnet20", "0.3:0.8", "nan",
     "1e999", "[" * 3000, "{" * 3000, "a" * 3000, "${HOME}", "!!python/object:os.system", "0:1:1e-12", "-1", "null",
     "9" * 5000, "../x", "%s%n", "x" * 200 + ":y", "package.module:function", "inner", "all", "*a", "&a [*a]"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | HUGE | st.text(max_size=20) | WORDS
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | WORDS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A document of plain data with some of its values replaced, removed, or said again."""
    data = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(list(places(data))))
        value = draw(PLAIN)
        if not where:
            return value
        holder = data
        for key in where[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del holder[where[-1]]
        elif change == "add" and isinstance(holder, list):
            holder.insert(where[-1], holder[draw(st.integers(0, len(holder) - 1))])
        elif change == "add":
            holder[draw(st.text(max_size=5) | WORDS)] = value
        else:
            holder[where[-1]] = value
    return data


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(data, dict | list):
        for key, item in data.items() if isinstance(data, dict) else enumerate(data[:8]):
            yield from places(item, (*at, key))


@st.composite
def altered_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with bytes flipped, cut out, put in or doubled; mostly near its beginning, where headers stand."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)) | st.integers(0, min(len(data), 400)))
        change = draw(st.sampled_from(["flip", "cut", "put", "double", "end"]))
        if change == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif change == "put":
            data[at:at] = draw(st.binary(max_size=12) | st.sampled_from([b"9" * 12, b"[" * 5000, b"\xff" * 8]))
        elif change == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at:]
    return bytes(data)


def dumped(data: Any) -> bytes:
    """JSON as a stranger may write it: NaN and lone surrogates included."""
    try:
        return json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of too many digits
        return b"[" + b"9" * 5000 + b"]"


@contextmanager
def no_hang() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(examples: int, strategy: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
    """Read `examples` inputs: each is taken or refused, in one message that is no book."""
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def check(value: Any) -> None:
        with no_hang():
            try:
                read(value)
            except UserError as error:
                assert 0 < len(str(error)) < 60_000
                outcomes["refused"] += 1
            except SystemExit as error:  # jsonargparse has said what is wrong
                assert error.code in (0, 2)
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1

    check()
    assert sum(outcomes.values()) >= examples and outcomes["refused"] > 0.2 * examples


MANY = pytest.mark.parametrize("examples", [25, pytest.param(1600, marks=pytest.mark.slow)])

# subjects -------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return lively(
        Net(
            lambda m, x: m.out(torch.flatten(m.pool(m.norm(m.b(torch.relu(m.a(x))))), 1)),
            a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3), norm=nn.BatchNorm2d(5), pool=nn.AdaptiveAvgPool2d(1),
            out=nn.Linear(5, 4),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> ChannelGroups:
    return trace(small(), torch.zeros(1, 3, 16, 16))


def record(groups: ChannelGroups) -> PolicyRecord:
    policy = random_policy(groups, 0)
    cost = CostModel(groups).cost([policy.counts[group.name] for group in groups.prunable])
    score = Score(0.5, 1.0, 0.4, cost)
    return PolicyRecord(policy, Budget({"macs": 0.5}), score, score, "search cacp", 3)


def exported(folder: Path, model: nn.Module, name: str, classes: int) -> None:
    groups = trace(model, torch.zeros(1, 3, 16, 16))
    policy, cost_model = random_policy(groups, 1), CostModel(groups)
    counts = [policy.counts[group.name] for group in groups.prunable]
    normalisation = Normalisation((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    cost, dense = cost_model.cost(counts), cost_model.dense
    names = tuple("abcdefghij"[:classes])
    architecture = Architecture(name, names, (3, 16, 16), normalisation, "inner", policy.counts, cost, dense)
    save_pruned(folder, slice_model(model, groups, policy), architecture)


# properties -----------------------------------------------------------------------------------------------------------


@MANY
def test_policies(examples: int, tmp_path: Path, groups: ChannelGroups) -> None:
    valid = record(groups)
    save_policy(tmp_path, valid)
    (path,) = (tmp_path / "policies").iterdir()
    model = small()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        (found,) = load_policies(tmp_path)
        found.policy.validate(groups)
        slice_model(model, groups, found.policy)

    survives(examples, altered(valid.to_json()).map(dumped) | altered_bytes(path.read_bytes()), read)


@MANY
def test_policies_in_memory(examples: int, groups: ChannelGroups) -> None:
    indices = st.lists(st.integers(-2, 8) | SCALARS, max_size=7).map(tuple)
    keep = st.dictionaries(st.sampled_from([*groups._by_name, "other"]) | WORDS, indices, max_size=4)
    survives(examples, keep, lambda kept: Policy(kept, "l1").validate(groups))


@MANY
def test_budgets(examples: int, groups: ChannelGroups) -> None:
    names, targets = st.sampled_from(["macs", "params"]) | WORDS, st.floats() | SCALARS

    def read(budget: dict[str, Any]) -> None:
        assert "/" not in Budget(budget).name

    survives(examples, st.dictionaries(names, targets, max_size=3), read)


@MANY
def test_architectures_and_weights(examples: int, tmp_path: Path) -> None:
    exported(tmp_path, small(), "own:net", 4)
    files = {name: (tmp_path / name).read_bytes() for name in (ARCHITECTURE, WEIGHTS)}

    def read(change: tuple[str, bytes]) -> None:
        name, content = change
        (tmp_path / name).write_bytes(content)
        try:
            load_pruned(tmp_path, small)
        finally:
            (tmp_path / name).write_bytes(files[name])

    plain = altered(json.loads(files[ARCHITECTURE])).map(dumped) | altered_bytes(files[ARCHITECTURE])
    changes = plain.map(lambda content: (ARCHITECTURE, content))
    survives(examples, changes | altered_bytes(files[WEIGHTS]).map(lambda content: (WEIGHTS, content)), read)


@pytest.mark.parametrize("examples", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_architectures_of_networks_by_name(examples: int, tmp_path: Path) -> None:
    exported(tmp_path, resnet20(), "resnet20", 10)
    path = tmp_path / ARCHITECTURE

    def read(data: Any) -> None:
        path.write_bytes(dumped(data))
        load_pruned(tmp_path)

    survives(examples, altered(json.loads(path.read_text())), read)


@MANY
def test_checkpoints(examples: int, tmp_path: Path) -> None:
    state = pack({"weights": {"a": torch.ones(3), 0: torch.zeros(2, 2)}, "epochs": [1, 2], "best": (1.0, math.inf)})
    save_state(tmp_path, *state)
    content = (tmp_path / NEWEST).read_bytes()

    def read(altered: bytes) -> None:
        (tmp_path / NEWEST).write_bytes(altered)
        (tmp_path / PREVIOUS).unlink(missing_ok=True)
        found = load_state(tmp_path)
        assert found is not None and found.data == state.data  # unless it is refused

    survives(examples, altered_bytes(content), read)


@MANY
def test_states_of_agents(examples: int, tmp_path: Path) -> None:
    """Whole checkpoints, by their checksum, of something else."""
    env = toy()
    agent = make_agent("random", env, [0.5], seed=0)
    agent.run(3, lambda end: None)
    tensors, data = agent.state()

    def read(changed: Any) -> None:
        try:
            save_state(tmp_path / "checkpoint", tensors, changed)
        except (UserError, ValueError):  # not JSON: such a checkpoint cannot be
            raise UserError("not JSON") from None
        resume(tmp_path, make_agent("random", env, [0.5], seed=0), 10)

    survives(examples, altered({"episode": 3, "agent": data}), read)


def toy() -> ChannelPruningEnv:
    groups = trace(small(), torch.zeros(1, 3, 16, 16))
    cost_model = CostModel(groups)
    return ChannelPruningEnv(
        groups, lambda counts: Score(0.5, 1.0, 0.5, cost_model.cost(counts)), lambda score, target: 0.5, [0.5]
    )


@MANY
def test_tables(examples: int, tmp_path: Path) -> None:
    path, dense = tmp_path / "episodes.csv", Cost(1000, 100)
    history = History(path, dense, [Budget({"macs": 0.5})])
    for number in (1, 2, 3):
        history.append(Episode(number, 0.5, 0.1, 0.5, 1.0, 0.4, 500, 50, "best", 0.2, (3, 4)))
    episodes = path.read_bytes()
    (tmp_path / "sweep").mkdir()
    row = ",".join(map(str, SweepRow(0.4, 0.1, "macs-0.50", 0.5, 0.6, 0.7, 3.0)))
    sweep = f"{','.join(SweepRow._fields)}\r\n{row}\r\n".encode()

    def read(change: tuple[bool, bytes]) -> None:
        if change[0]:
            path.write_bytes(change[1])
            History(path, dense, [Budget({"macs": 0.5})], 3)
        else:
            (tmp_path / "sweep" / "sweep.csv").write_bytes(change[1])
            assert all("/" not in one.policy for one in load_sweep(tmp_path))

    both = st.sampled_from([(True, episodes), (False, sweep)])
    survives(examples, both.flatmap(lambda one: altered_bytes(one[1]).map(lambda content: (one[0], content))), read)


@pytest.mark.parametrize("examples", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_pages(examples: int, tmp_path: Path, groups: ChannelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page shows what it can, and names the files that it cannot read."""
    monkeypatch.setattr(markup, "svg", lambda figure, transparent: "<svg></svg>")  # to draw takes a second
    policy = record(groups)
    times = {"batch 1": {name: {"median": 2.0} for name in ("dense", "pruned")}}
    why = {"torch, batch 1": {"why": "calls"}}
    files: dict[str, Any] = {
        "environment.json": [{"packages": {"torch": "2"}, "command": ["search.py", "--seed=1"]}],
        "dense/result.json": {"validation_top1": 0.9, "mean": [0.5], "std": [0.5], "classes": ["a"]},
        "policies/macs-0.50.json": policy.to_json(),
        "finetune/macs-0.50/result.json": {"test_top1": {"dense": 0.9, "before": 0.5, "after": 0.8}, "test_images": 9},
        "export/macs-0.50/report.json": {
            "policy": policy.to_json(), "dense": {"macs": 10**6, "params": 10**4, "holdout_top1": 0.9},
            "latency_ms": times, "latency_conditions": {"threads": 1}, "latency_why": why,
        },
    }  # fmt: skip
    tables = {
        "dense/epochs.csv": "epoch,train_top1,train_loss,seconds\n1,0.5,1.5,2.5\n",
        "search/tradeoff.csv": "macs_kept,macs,top1,loss,probability,episode\n0.5,500,0.5,1.0,0.4,1\n",
        "search/episodes.csv": "episode,target,reward,top1,loss,probability,macs,params,source,seconds,counts\n"
        "1,0.5,0.1,0.5,1.0,0.4,500,50,best,0.2,3-4\n",
    }
    whole = {name: dumped(data) for name, data in files.items()} | {name: one.encode() for name, one in tables.items()}
    whole["config.yaml"] = b"model: resnet20\ndataset: digits\n"
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def read(change: tuple[str, bytes]) -> None:
        name, content = change
        (tmp_path / name).write_bytes(content)
        try:
            run = read_run(tmp_path)
            page([run])
        finally:
            (tmp_path / name).write_bytes(whole[name])
        if run.problems:
            raise UserError(run.problems[0])

    plain = st.sampled_from(list(files)).flatmap(
        lambda name: altered(files[name]).map(lambda data: (name, dumped(data)))
    )
    raw = st.sampled_from(list(whole)).flatmap(
        lambda name: altered_bytes(whole[name]).map(lambda content: (name, content))
    )
    survives(examples, plain | raw, read)


SETTINGS = [
    "model", "weights", "targets", "macs", "params", "episodes", "seed", "ignore", "min_keep", "quantiles", "mean",
    "std", "workers", "image_size", "batch_size", "finetune_schedule", "agent", "method", "criterion",
    "channel_multiple", "method_lr", "constraint_aware", "precision", "device", "config", "output", "run", "ask",
    "__class__", "a.b",
]  # fmt: skip


@MANY
def test_config_files(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    known = Path("configs/digits_resnet56.yaml").read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        capsys.readouterr()
        experiment_from(parse("search", "", ["--config", str(path), "--output", str(tmp_path / "run")]))

    values = st.dictionaries(st.sampled_from(SETTINGS) | WORDS, PLAIN, max_size=4)
    survives(examples, values.map(yaml_dumped) | altered_bytes(known), read)
    assert not (tmp_path / "run").exists()


def yaml_dumped(data: Any) -> bytes:
    try:
        return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return dumped(data)


@MANY
def test_command_lines(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = SCALARS.map(shown) | st.lists(SCALARS.map(shown), max_size=3).map(" ".join)
    words = st.tuples(st.sampled_from(SETTINGS), values, st.booleans()).map(
        lambda one: [f"--{one[0]}={one[1]}"] if one[2] else [f"--{one[0]}", *one[1].split()]
    )

    def read(lines: list[list[str]]) -> None:
        capsys.readouterr()
        experiment_from(parse("search", "", [*itertools.chain.from_iterable(lines), "--output", str(tmp_path / "run")]))

    survives(examples, st.lists(words, min_size=1, max_size=3), read)


def shown(value: Any) -> str:
    try:
        return str(value).replace("\x00", "").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except ValueError:  # too many digits, or what no command line can hold
        return "9" * 5000


# files that name huge sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200, '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}',
     '{"a": 1, "a": 2}', '{"a": -1e19}', '{"a": 1' + 30 * "0" + "}", "9" * 100_000, " " * (LARGEST_JSON + 1), ""],
)  # fmt: skip
def test_json_that_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with no_hang(), pytest.raises(UserError, match=r"x\.json cannot be read as one"):
        load_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    ["[" * 30_000, "a: [" * 8_000, "- " * 15_000, "[\n" * 15_000, "a: " + "[1, " * 5000, "a: &a [1]\nb: *a",
     "a: !!python/object:os.system x", "a: 2020-99-99", "a: !!bool maybe", "a: !!timestamp x", "a: {b: c}", "1: 2",
     "a: 0x" + "f" * 1000, "a: " + "b" * 5000, "a: [[1]]", "a: [" + "1," * 1500 + "]", "? [a]\n: b"],
)  # fmt: skip
def test_settings_that_are_refused(text: str) -> None:
    with no_hang(), pytest.raises(ValueError, match=r"."):
        parse_settings(text)


def test_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    for name in ("x.json", "x.safetensors", NEWEST):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**30)  # sparse: it takes no space
    with no_hang(), pytest.raises(UserError, match=f"more than {LARGEST_JSON} bytes"):
        load_json(tmp_path / "x.json")
    with no_hang(), pytest.raises(UserError, match=r"x\.safetensors is damaged"):
        load_tensors(tmp_path / "x.safetensors")
    with no_hang(), pytest.raises(UserError, match="a checkpoint must be whole"):
        load_state(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("x.json", NEWEST, "x.safetensors", "x.pt"):
        os.mkfifo(tmp_path / name)
    with no_hang(), pytest.raises(UserError, match="it is no file"):
        load_json(tmp_path / "x.json")
    with no_hang():
        assert load_state(tmp_path) is None
    for name in ("x.safetensors", "x.pt"):
        with no_hang(), pytest.raises(UserError, match="does not exist"):
            load_weights(small(), tmp_path / name)
    with no_hang(), pytest.raises(ValueError, match="it is no file"):
        read_text(Path("/dev/zero"), 10)


HEADERS = {
    "offsets beyond the file": {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
    "a shape that overflows": {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}},
    "a shape larger than its bytes": {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}},
    "bytes twice": {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
    "an unknown type": {"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}},
    "a hundred thousand tensors": {
        str(index): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(100_000)
    },
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies(tmp_path: Path, name: str) -> None:
    header = json.dumps(HEADERS[name]).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with no_hang(), pytest.raises(UserError) as caught:
        load_weights(small(), path)
    assert len(str(caught.value)) < 60_000
    path.write_bytes((2**63).to_bytes(8, "little") + header)
    with no_hang(), pytest.raises(UserError, match="is damaged"):
        load_weights(small(), path)


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    for dtype in (torch.complex64, torch.int64, torch.float8_e4m3fn, torch.bool):
        save_tensors(tmp_path / "x.safetensors", {**state, "a.weight": torch.zeros(6, 3, 3, 3, dtype=dtype)})
        with pytest.raises(UserError, match=rf"wrong type: a\.weight {dtype}, the model has torch\.float32"):
            load_weights(small(), tmp_path / "x.safetensors")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_tensors(tmp_path / "x.safetensors", half)
    load_weights(small(), tmp_path / "x.safetensors")


def test_a_compressed_weights_file_is_refused_unread(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    load_weights(small(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="a compressed file, which"):
        load_weights(small(), tmp_path / "bomb.pt")
