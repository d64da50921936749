"""Criterion-driven methods: (subject, budget) -> policy, without episodes. One file each."""

from collections.abc import Callable

from cacp.methods.sensitivity import sensitivity
from cacp.methods.subject import Subject
from cacp.methods.taylor import taylor
from cacp.methods.uniform import uniform
from cacp.schema import Budget, Policy

METHODS: dict[str, Callable[[Subject, Budget], Policy]] = {
    "uniform": uniform,
    "taylor": taylor,
    "sensitivity": sensitivity,
}

__all__ = ["METHODS", "Subject", "sensitivity", "taylor", "uniform"]
