"""The outcome of one op."""

from __future__ import annotations

from dataclasses import dataclass, field

DONE, PAGE_FAULT, MMIO, GENERAL_PROTECTION, STOPPED = range(5)


@dataclass
class Result:
    """What KVM did with one op. For MMIO, `mmio` lists (gpa, length, is_write) of the exits."""

    status: int
    err: int
    value: int
    addr: int
    mmio: list = field(default_factory=list)
    stats: dict = field(default_factory=dict)
