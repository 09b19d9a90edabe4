"""The workloads of this package."""

from __future__ import annotations

from typing import Final

from shadowkvm.workloads.builtin.kernel import KERNEL
from shadowkvm.workloads.builtin.mapping import MAPPING
from shadowkvm.workloads.builtin.processes import PROCESSES
from shadowkvm.workloads.workload import Workload

__all__ = ["BUILTIN"]

BUILTIN: Final[tuple[Workload, ...]] = (*MAPPING, *PROCESSES, *KERNEL)
"""In the order in which they are listed."""
