"""The policy files of a run folder: policies/NAME.json, a budget each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cacp.checkpoint import load_json, save_json
from cacp.schema import PolicyRecord, UserError


def save_policy(folder: Path, record: PolicyRecord) -> None:
    """Write policies/NAME.json of a run folder."""
    save_json(folder / "policies" / f"{record.budget.name}.json", record.to_json())


def load_policies(folder: Path) -> list[PolicyRecord]:
    """All policies of a run folder, by name.

    Raises:
        UserError: if there are none, or one is damaged.
    """
    paths = sorted((folder / "policies").glob("*.json"))
    if not paths:
        raise UserError(f"{folder} holds no policies; run search.py or prune.py on it first")
    return [PolicyRecord.from_json(load_json(path), str(path)) for path in paths]


def missing_policies(folder: Path, names: Sequence[str], method: str) -> list[str]:
    """The names that have no policy file yet.

    Raises:
        UserError: if the folder holds policies of another method.
    """
    there = {record.budget.name: record for record in (load_policies(folder) if _has_policies(folder) else [])}
    others = sorted({record.method for record in there.values()} - {method})
    if others:
        raise UserError(f"{folder} holds policies of {', '.join(others)}; give {method} a folder of its own (--output)")
    return [name for name in names if name not in there]


def _has_policies(folder: Path) -> bool:
    return any((folder / "policies").glob("*.json"))
