"""Rows, sections and reports of benches."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

__all__ = ["Report", "Row", "Section", "Skipped", "machine"]

SCHEMA: Final = "shadowkvm.bench/1"


class Skipped(Exception):  # noqa: N818  # no error: the report says why
    """A section cannot be measured here."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    """"instructions", "M/s", "ns", "bytes", "x" (a ratio)."""
    other: float | None = None
    """What real KVM takes for the same (instructions), or the tool that is compared with."""
    asked: float | None = None
    """What the project asks of itself: at most, or at least for rates ("M/s", and "x" where more is better)."""
    at_least: bool = False
    """``asked`` is a lower bound."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """This package's figure over the other's."""
        return self.value / self.other if self.other else None

    @property
    def met(self) -> bool | None:
        """Whether it is as good as asked; None if nothing is."""
        if self.asked is None:
            return None
        return self.value >= self.asked if self.at_least else self.value <= self.asked


@dataclass(frozen=True, slots=True)
class Section:
    """A kind of bench."""

    name: str
    title: str
    doc: str
    """What is measured and how, in a few sentences."""
    rows: Callable[[bool], Iterator[Row]]
    """Measures; the argument is whether it is to be quick. Raises Skipped."""


@dataclass(slots=True)
class Report:
    """What was measured."""

    machine: dict[str, str]
    quick: bool
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    """By section."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Sections that could not be measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Everything in the types of JSON; "schema" is shadowkvm.bench/1."""
        rows = {
            name: [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows]
            for name, rows in self.rows.items()
        }
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "quick": self.quick,
            "sections": rows,
            "skipped": self.skipped,
        }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    return {
        "cpu": cpu,
        "cpus": str(os.cpu_count() or 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "shadowkvm": version("shadowkvm"),
    }
