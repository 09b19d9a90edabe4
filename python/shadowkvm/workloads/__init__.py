"""Workloads: kinds of load on a guest that stress one path of shadow paging each.

>>> from shadowkvm.workloads import get
>>> scenario = get("fork_exit").build(seed=1, scale=0.1)
>>> scenario
<Scenario fork_exit: 256 MiB, 1 vCPU, 5 x fork, scale 0.1, seed 1>
>>> result = scenario.run(policy="no_unsync")
>>> result.mismatches
0

`entries` lists them, `get` has one, ``get(name).build(...)`` makes a `Scenario`, which runs on any `Vm`. Other packages
add theirs in the entry point group "shadowkvm.workloads". docs/workloads.md has them all.
"""

from __future__ import annotations

from shadowkvm.workloads.parameter import Parameter, Values
from shadowkvm.workloads.registry import GROUP, Entry, entries, get
from shadowkvm.workloads.scenario import Phase, Scenario, ScenarioResult, rows_by_op
from shadowkvm.workloads.step import START, HostAct, Step
from shadowkvm.workloads.workload import GUEST_PARAMETERS, Workload

__all__ = [
    "GROUP",
    "GUEST_PARAMETERS",
    "START",
    "Entry",
    "HostAct",
    "Parameter",
    "Phase",
    "Scenario",
    "ScenarioResult",
    "Step",
    "Values",
    "Workload",
    "entries",
    "get",
    "rows_by_op",
]
