"""The policy files of a run folder: policies/NAME.json, a budget each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cacp.checkpoint import load_json, save_json, save_tensors, sha256
from cacp.schema import PolicyRecord, UserError, listed


def save_policy(folder: Path, record: PolicyRecord, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write policies/NAME.json of a run folder, and NAME.safetensors first where a method has trained `weights`."""
    if weights is not None:
        save_tensors(weights_path(folder, record.budget.name), weights)
        record = replace(record, weights_sha256=sha256(weights_path(folder, record.budget.name)))
    save_json(folder / "policies" / f"{record.budget.name}.json", record.to_json())


def weights_path(folder: Path, name: str) -> Path:
    """Where the full-size weights of a policy are."""
    return folder / "policies" / f"{name}.safetensors"


def load_policies(folder: Path) -> list[PolicyRecord]:
    """All policies of a run folder, by name.

    Raises:
        UserError: if there are none, or one is damaged.
    """
    paths = sorted((folder / "policies").glob("*.json"))
    if not paths and (folder / "unstructured").is_dir():
        raise UserError(
            f"{folder} holds networks of prune.py --method magnitude: single weights are zero, no channel falls, so "
            "there is nothing to slice; use another method, in another folder"
        )
    if not paths:
        raise UserError(f"{folder} holds no policies; run search.py or prune.py on it first")
    records = [PolicyRecord.from_json(load_json(path), str(path)) for path in paths]
    wrong = [
        f"{path} is for {record.budget.name}"
        for path, record in zip(paths, records, strict=True)
        if record.budget.name != path.stem
    ]
    if wrong:
        raise UserError(f"a policy file must have the name of its budget, but {listed(wrong, ', ')}; rename or delete")
    return records


def missing_policies(folder: Path, names: Sequence[str], method: str) -> list[str]:
    """The names that have no policy file yet.

    Raises:
        UserError: if the folder holds policies of another method.
    """
    there = {record.budget.name: record for record in (load_policies(folder) if has_policies(folder) else [])}
    others = sorted({record.method for record in there.values()} - {method})
    if others:
        raise UserError(f"{folder} holds policies of {', '.join(others)}; give {method} a folder of its own (--output)")
    return [name for name in names if name not in there]


def has_policies(folder: Path) -> bool:
    """Whether a run folder holds any."""
    return any((folder / "policies").glob("*.json"))
