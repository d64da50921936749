"""Imports go one way: DESIGN.md's ranks, over the syntax trees of all files."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cacp", "envs", "agents")
RANKS = {
    "cacp.schema": 0, "cacp.own": 0, "cacp.checkpoint": 0, "cacp.profiling": 0, "cacp.schedules": 0, "cacp.ranges": 0,
    "cacp.spaces": 0, "cacp.interrupts": 0, "cacp.operators": 0, "cacp.batchnorm": 0, "cacp.locking": 0,
    "cacp.parsing": 0, "cacp.environment": 0,
    "cacp.models": 1, "cacp.propagation": 1, "cacp.graph": 1, "cacp.cost": 1, "cacp.reward": 1, "cacp.policies": 1,
    "cacp.parallel": 1, "cacp.side_by_side": 1, "cacp.command": 2,
    "cacp.gram": 2, "cacp.gfi": 2, "cacp.reconstruction": 2, "cacp.budget": 2, "cacp.importance": 2, "cacp.data": 2,
    "cacp.slicing": 3, "cacp.repair": 3, "cacp.fusion": 3, "cacp.evaluation": 3, "cacp.training": 3,
    "cacp.steps": 3, "cacp.recipe": 3, "cacp.history": 3,
    "cacp.source": 2, "cacp.plain": 2, "cacp.scoring": 4, "cacp.exporting": 4, "cacp.shipping": 4, "cacp.latency": 4,
    "cacp.latency_table": 2, "cacp.timing": 4,
    "cacp.methods": 5, "cacp.figures": 5, "cacp.reporting": 5, "envs": 5, "agents": 5,
    "cacp.experiment": 6, "cacp.config": 6, "cacp.dense": 6, "cacp.records": 6, "cacp.sweep": 6, "cacp.pipeline": 6,
    "cacp.runfolder": 6, "cacp.page": 6,
}  # fmt: skip
ENTRY_POINT_RANK = 7


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LIBRARY = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ENTRY_POINTS = sorted(ROOT.glob("*.py"))
FILES = {module_name(path): path for path in [*LIBRARY, *ENTRY_POINTS] if module_name(path) != "cacp"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def unit(module: str) -> str:
    """The part of the layout that a module belongs to: `cacp.data` for cacp.data.images; a command is its own."""
    if is_command(module):
        return module
    return ".".join(module.split(".")[: 2 if module.startswith("cacp.") else 1])


def is_command(module: str) -> bool:
    """Whether a module is typed: search.py, or `python -m` of a package."""
    return FILES[module].parent == ROOT or FILES[module].name == "__main__.py"


def rank(module: str) -> int:
    return ENTRY_POINT_RANK if is_command(module) else RANKS[unit(module)]


def imported(name: str) -> Iterator[str]:
    """The project's modules that a module imports, wherever in the file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: relative import"
            candidates = [
                full if (full := f"{node.module}.{alias.name}") in FILES else str(node.module) for alias in node.names
            ]
        else:
            continue
        yield from (candidate for candidate in candidates if candidate in FILES)


def test_every_module_has_a_rank_and_every_rank_a_module() -> None:
    units = {unit(name) for name in FILES if not is_command(name)}
    assert units == set(RANKS)
    assert {"search", "prune", "export", "finetune", "pretrain", "report"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_come_from_lower_ranks_or_the_own_one(name: str) -> None:
    higher = [other for other in imported(name) if rank(other) > rank(name)]
    assert not higher
    if rank(name) == ENTRY_POINT_RANK:
        assert not [other for other in imported(name) if rank(other) == ENTRY_POINT_RANK]


def test_the_walk_sees_the_imports() -> None:
    assert set(imported("cacp.cost")) == {"cacp.models.modes", "cacp.schema"}
    assert {"cacp.models", "cacp.models.weights", "cacp.experiment"} <= set(imported("cacp.dense"))
    assert sum(len(set(imported(name))) for name in FILES) > 80


def test_imports_make_no_cycle() -> None:
    graph = {name: set(imported(name)) - {name} for name in FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(FILES)
    units = {unit(name): {unit(other) for other in imported(name)} - {unit(name)} for name in FILES}
    for name in FILES:
        units[unit(name)] |= {unit(other) for other in imported(name)} - {unit(name)}
    assert set(TopologicalSorter(units).static_order()) == {unit(name) for name in FILES}


def test_agents_know_only_schema_and_checkpoint() -> None:
    foreign = {other for name in FILES if unit(name) == "agents" for other in imported(name) if unit(other) != "agents"}
    assert foreign == {"cacp.schema", "cacp.checkpoint"}


def test_the_environment_opens_no_file_data_set_or_agent() -> None:
    foreign = {other for name in FILES if unit(name) == "envs" for other in imported(name) if unit(other) != "envs"}
    assert foreign <= {"cacp.schema", "cacp.cost", "cacp.budget"}


@pytest.mark.parametrize("name", FILES)
def test_no_star_import(name: str) -> None:
    stars = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].parent != ROOT])
def test_the_library_does_not_print(name: str) -> None:
    prints = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_config_stays_at_the_door() -> None:
    readers = {name for name in FILES if {"cacp.config", "cacp.experiment"} & set(imported(name)) and rank(name) < 6}
    assert readers == set()


def test_the_package_list_is_complete() -> None:
    listed = re.search(r"^packages = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in LIBRARY if path.name == "__init__.py"}
    assert set(json.loads(listed[1])) == on_disk
