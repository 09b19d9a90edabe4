"""What a workload is, and what running one came to: as tables for people, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from shadowkvm.counters import COUNTER_INFO
from shadowkvm.report import rate_text, table
from shadowkvm.workloads import START, Parameter, ScenarioResult, Workload

__all__ = ["RUN_SCHEMA", "SHOW_SCHEMA", "about", "about_json", "as_csv", "as_json", "as_tables"]

RUN_SCHEMA: Final = "shadowkvm.workload-run/1"
SHOW_SCHEMA: Final = "shadowkvm.workload/1"

# Label, and the counter that it is or the op whose rows it counts. What is indented is a part of what is above it.
_LINES: Final = (
    ("VM exits", "exits"),
    ("  #PF exits", "pf_taken"),
    ("    shadow repaired", "pf_fixed"),
    ("    emulated", "pf_emulate"),
    ("    spurious", "pf_spurious"),
    ("    reflected to the guest", "pf_guest"),
    ("  answered by an MMIO entry", "x_mmio_faults"),
    ("  CR3 loads", "CR3"),
    ("  INVLPG", "invlpg"),
    ("  to user space for MMIO", "mmio_exits"),
    ("  to user space for I/O", "io_exits"),
    ("instructions tried again, their table unprotected", "x_retries"),
    ("emulated stores to memory", "mmu_pte_write"),
    ("shadow pages made", "mmu_cache_miss"),
    ("shadow pages zapped", "mmu_shadow_zapped"),
    ("  by flooding", "mmu_flooded"),
    ("  by recycling", "mmu_recycled"),
    ("TLB flush requests", "remote_tlb_flush_requests"),
    ("TLB flushes at entry", "tlb_flush"),
)
_PHASE_COLUMNS: Final = {
    "exits": "exits",
    "fixed": "pf_fixed",
    "emulated": "pf_emulate",
    "guest's": "pf_guest",
    "INVLPG": "invlpg",
    "made": "mmu_cache_miss",
    "zapped": "mmu_shadow_zapped",
    "flushes": "tlb_flush",
}


# -- what a workload is -----------------------------------------------------------------------------------------------


def parameter_rows(workload: Workload, parameters: list[Parameter]) -> list[list[str]]:
    """Name, default at scale 1, limits, meaning."""
    return [
        [
            parameter.name,
            parameter.show(workload.default(parameter.name)) + (" x scale" if parameter.scaled else ""),
            _limits(parameter),
            parameter.doc,
        ]
        for parameter in parameters
    ]


def _limits(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(parameter.choices)
    if isinstance(parameter.default, bool):
        return "true, false"
    low, high = (None if limit is None else parameter.show(limit) for limit in (parameter.low, parameter.high))
    return f"{low if low is not None else ''} ...{f' {high}' if high is not None else ''}".strip()


def about(workload: Workload) -> RenderableType:
    """What it stresses, its parameters, what to look for."""
    heads = ("parameter", "default", "limits", "what")
    mine = list(workload.parameters)
    common = [parameter for parameter in workload.all_parameters.values() if parameter not in mine]
    return Group(
        Text(f"{workload.name}: {workload.summary}", style="bold"),
        Text(),
        Text(workload.stresses),
        Text(),
        Text("What to look for", style="bold"),
        *(Text(f"  - {line}") for line in workload.look_for),
        Text(),
        table(f"Parameters (work is counted as: {workload.unit})", heads, parameter_rows(workload, mine), left=4),
        Text(),
        table("... of every guest", heads, parameter_rows(workload, common), left=4),
    )


def about_json(workload: Workload) -> str:
    """The same for programs."""
    parameters = [
        {
            "name": parameter.name,
            "doc": parameter.doc,
            "type": type(parameter.default).__name__,
            "default": workload.default(parameter.name),
            "low": parameter.low,
            "high": parameter.high,
            "choices": list(parameter.choices),
            "scaled": parameter.scaled,
            "unit": parameter.unit,
        }
        for parameter in workload.all_parameters.values()
    ]
    what = {
        "schema": SHOW_SCHEMA,
        "name": workload.name,
        "summary": workload.summary,
        "stresses": workload.stresses,
        "look_for": list(workload.look_for),
        "unit": workload.unit,
        "parameters": parameters,
    }
    return json.dumps(what, indent=1) + "\n"


# -- what running it came to ------------------------------------------------------------------------------------------


def as_json(result: ScenarioResult) -> str:
    """The result as text. All but ``time`` is the same in every run and on every machine."""
    head = {"schema": RUN_SCHEMA, "version": version("shadowkvm"), "model_version": result.model_version}
    return json.dumps({**head, **result.to_dict()}, indent=1) + "\n"


def as_csv(result: ScenarioResult) -> str:
    """Counters by phase: phase, counter, value, kind, per_1000_rows, per_unit; phase "all" is the sum."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("phase", "counter", "value", "kind", "per_1000_rows", "per_unit"))
    phases = {"all": (result.rows, result.counters)}
    phases |= {name: (phase.rows, phase.counters) for name, phase in result.phases.items()}
    for name, (rows, counters) in phases.items():
        for counter, value in counters.items():
            kind = COUNTER_INFO[counter].kind
            per = (_per(value, rows / 1000), _per(value, result.units)) if kind == "cumulative" else (None, None)
            writer.writerow((name, counter, value, kind, *("" if rate is None else f"{rate:.6g}" for rate in per)))
    return out.getvalue()


def _per(value: float, count: float) -> float | None:
    return value / count if count else None


def as_tables(result: ScenarioResult) -> RenderableType:
    """The result for people, something that a rich console prints."""
    return Group(
        *_head(result), Text(), _counter_table(result), Text(), _phase_table(result), Text(), *_verdict(result)
    )


def _head(result: ScenarioResult) -> Iterator[Text]:
    scenario, workload = result.scenario, result.scenario.workload
    yield Text(f"{workload.name}: {workload.summary}", style="bold")
    yield Text(f"{result.model_version}, policy {result.policy}, profile {result.profile}")
    chosen = [
        f"{name}={parameter.show(scenario.values[name])}"
        for name, parameter in workload.all_parameters.items()
        if name in {p.name for p in workload.parameters} or scenario.values[name] != workload.default(name)
    ]
    yield Text(", ".join(chosen))
    yield Text(f"{result.units:,g} x {workload.unit}, {result.rows:,} rows, seed {scenario.seed}")


def _number(value: float) -> str:
    return f"{value:,}" if value else "-"


def _counter_table(result: ScenarioResult) -> RenderableType:
    start = result.phases.get(START)
    rows = []
    for label, name in _LINES:
        total = result.ops.get(name, 0) if name.isupper() else result.counters[name]
        before = 0 if start is None else start.ops.get(name, 0) if name.isupper() else start.counters[name]
        if not total and label.startswith("  "):
            continue
        rates = (_per(1000 * total, result.rows), _per(total - before, result.units))
        rows.append([label, _number(total), *(rate_text(rate) for rate in rates)])
    heads = ("", "total", "per 1,000 rows", f"per {result.scenario.workload.unit}")
    return table("What shadow paging did (the last column without phase start)", heads, rows)


def _phase_table(result: ScenarioResult) -> RenderableType:
    rows = [
        [name, _number(phase.rows), *(_number(phase.counters[counter]) for counter in _PHASE_COLUMNS.values())]
        for name, phase in result.phases.items()
    ]
    return table("... by phase", ("", "rows", *_PHASE_COLUMNS), rows)


def _verdict(result: ScenarioResult) -> Iterator[Text]:
    answers = sum(phase.answer for phase in result.phases.values())
    if answers:
        yield Text(f"Frames in dirty logs: {answers:,}")
    faults = sum(phase.guest_faults for phase in result.phases.values())
    yield Text.assemble(
        "Guest's own faults: ",
        (f"{faults:,} as its tables say", "red" if result.mismatches else "green"),
        f", {result.mismatches:,} otherwise",
    )
    speed = f"{result.rows / result.seconds / 1e6:.1f} million rows/s" if result.seconds else ""
    yield Text(f"Made and run in {result.elapsed:.2f} s, {result.seconds:.2f} s of them in the engine ({speed})")
