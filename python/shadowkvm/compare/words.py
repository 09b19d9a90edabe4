"""How a comparison is told, in tables and on pages alike: times, ratios, sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from shadowkvm.compare.runs import Comparison, Ran
from shadowkvm.costs import CAUSES, Cause
from shadowkvm.report import rate_text

__all__ = [
    "CROSSED",
    "EXACT",
    "REACH",
    "against",
    "called",
    "causes",
    "crossing_lines",
    "per_unit",
    "sentence",
    "time_rows",
    "what_ran",
]

EXACT: Final = (
    (
        "exact",
        "exits, faults, emulated stores, resyncs, zaps: each follows from the guest's own accesses and KVM's rules",
    ),
    ("modelled", "TLB misses and what a walk reads: caches of the usual sizes, least recently used goes first"),
    ("modelled", "time: events times what each takes by the cost table; the guest's own work is not in it"),
)
"""What of a comparison is measured and what is not."""

CROSSED: Final = {"exit": "an exit and entry", "walk_reference": "an entry that a page walk reads"}
"""The costs that crossings are looked for in, and how they are called."""
REACH: Final = (1.0, 1e6)
"""Cycles within which they are told: beyond is what no machine takes."""

_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which a time is a number from 1 on: (its seconds, its name)."""
    return next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])


def against(base: float, value: float) -> str:
    """How a value stands to the first variant's."""
    if value == base:
        return "="
    if not base:
        return "new"
    if not value:
        return "gone"
    ratio = value / base
    if ratio < 0:
        return ""
    if ratio >= 2:
        return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
    return f"{ratio - 1:+.1%}" if abs(ratio - 1) >= 0.0005 else "~"


def causes(comparison: Comparison) -> list[Cause]:
    """The causes that anything went to."""
    return [cause for cause in CAUSES if any(run.account.share(cause.name) for run in comparison.runs)]


def per_unit(comparison: Comparison, value: float) -> float | None:
    """A value for each unit of a workload's work; None of a trace."""
    units = comparison.about.get("units")
    return value / units if units else None


def what_ran(comparison: Comparison) -> str:
    """What was run, in one line."""
    about = comparison.about
    words = [f"{about['rows']:,} rows", about["mode"]]
    if "units" in about:
        words = [f"{about['units']:,g} x {about['unit']}", *words, f"scale {about['scale']:g}, seed {about['seed']}"]
        words += ["without phase start"] if about["steady"] else []
    return f"{about['name']}: {', '.join(words)}"


def sentence(comparison: Comparison) -> str:
    """The answer in a sentence."""
    names = comparison.names()
    order = sorted(range(len(names)), key=lambda i: comparison.runs[i].account.cycles)
    best, worst = order[0], order[-1]
    if len(names) == 1:
        return f"{names[0]} takes {_time(comparison.runs[0])}, {_most(comparison.runs[0])}."
    told = f"Cheapest is {names[best]} with {_time(comparison.runs[best])}"
    if comparison.runs[best].account.cycles == comparison.runs[worst].account.cycles:
        return f"All take {_time(comparison.runs[best])}, {_most(comparison.runs[best])}."
    if comparison.runs[best].account.cycles:
        ratio = comparison.runs[worst].account.cycles / comparison.runs[best].account.cycles
        told += f"; {names[worst]} takes {_time(comparison.runs[worst])}, {ratio:,.3g} times as long"
    else:
        told += f"; {names[worst]} takes {_time(comparison.runs[worst])}"
    return f"{told}, {_most(comparison.runs[worst])}."


def _time(run: Ran) -> str:
    size, unit = time_unit(run.account.seconds)
    return f"{run.account.seconds / size:.3g} {unit}"


def _most(run: Ran) -> str:
    top = max(run.account.shares, key=lambda share: share.cycles)
    return (
        f"most of it ({run.account.share(top.cause.name):.0%}) for {top.cause.label}"
        if top.cycles
        else "no time at all"
    )


def crossing_lines(comparison: Comparison, cost: str, limit: int | None = None) -> Iterator[str]:
    """A sentence for each place where two variants change places as a cost changes, the nearest first."""
    names = comparison.names()
    here = comparison.costs[cost]
    found = [(i, j, x) for i, j, x in comparison.crossings(cost) if REACH[0] <= x <= REACH[1]]
    found.sort(key=lambda item: abs(math.log(item[2] / here)) if here else item[2])
    for i, j, x in found[:limit]:
        at = f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        yield f"{names[i]} and {names[j]} change places at {at} cycles: below, {names[i]} is the cheaper one"


def called(comparison: Comparison, cost: str) -> str:
    """How a cost is called, with what goes with it."""
    ratio = comparison.costs["nested_exit"] / comparison.costs["exit"] if comparison.costs["exit"] else 1.0
    if cost != "exit" or ratio == 1 or all(run.nested is None for run in comparison.runs):
        return CROSSED[cost]
    return f"{CROSSED[cost]} (under nested paging {ratio:.3g} times as much)"


def time_rows(comparison: Comparison) -> tuple[str, list[tuple[list[str], list[float]]]]:
    """The unit of modelled time, and what the table of it has for each variant.

    That is its cells (name, exits, exits for each unit of work if there is one, time, against the first), and what part
    of its time each cause takes.
    """
    runs, shown = comparison.runs, causes(comparison)
    size, unit = time_unit(max(run.account.seconds for run in runs))
    rows = []
    for name, run in zip(comparison.names(), runs, strict=True):
        each = per_unit(comparison, run.exits)
        cells = [name, f"{run.exits:,}", *([] if each is None else [rate_text(each)])]
        cells += [f"{run.account.seconds / size:.3g}", against(runs[0].account.cycles, run.account.cycles)]
        rows.append((cells, [run.account.share(cause.name) for cause in shown]))
    return unit, rows
