"""A comparison as tables for people, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from shadowkvm.compare.runs import Comparison, Ran
from shadowkvm.compare.words import CROSSED, against, called, causes, crossing_lines, per_unit, time_rows, what_ran
from shadowkvm.report import table

__all__ = ["SCHEMA", "as_csv", "as_json", "as_tables"]

SCHEMA: Final = "shadowkvm.compare/2"
_CROSSINGS: Final = 4

_STAGE_COLUMNS: Final = {
    "stage faults": "stage_faults",
    "dirty": "dirty_faults",
    "fills": "shadow_fills",
    "table stores": "table_stores",
    "guest #PF": "reflected_faults",
    "CR3": "cr3_exits",
    "to nested": "to_nested",
    "back": "to_shadow",
}


def as_tables(comparison: Comparison) -> RenderableType:
    """What people read: modelled time by cause, where variants change places, walks, exits, counters."""
    lines = [what_ran(comparison)]
    lines += [f"the same everywhere: {same}"] if (same := comparison.common()) else []
    parts: list[RenderableType] = [Text(line) for line in lines]
    for part in (
        _time_table(comparison),
        *_crossings(comparison),
        _walk_table(comparison),
        _stage_table(comparison),
        _counter_table(comparison),
    ):
        parts += [Text(), part] if part is not None else []
    return Group(*parts)


def _time_table(comparison: Comparison) -> RenderableType:
    unit, found = time_rows(comparison)
    each = [] if per_unit(comparison, 1) is None else ["each"]
    heads = ["", "exits", *each, unit, "vs 1st", *(cause.name for cause in causes(comparison))]
    rows = [cells + [_percent(part) for part in parts] for cells, parts in found]
    costs = comparison.costs
    return table(f"Modelled time by cause (costs: {costs.name}, {costs.title})", heads, rows)


def _percent(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 else "<1%" if part else "-"


def _crossings(comparison: Comparison) -> Iterator[RenderableType]:
    for cost in CROSSED:
        lines = list(crossing_lines(comparison, cost, _CROSSINGS))
        if lines:
            here = f"here {comparison.costs[cost]:,.0f} cycles"
            title = Text(f"Were {called(comparison, cost)} of another cost ({here})", style="bold")
            yield Group(title, *(Text(f"  {line}") for line in lines))


def _walk_table(comparison: Comparison) -> RenderableType | None:
    rows = []
    for name, run in zip(comparison.names(), comparison.runs, strict=True):
        found = run.nested or run.tlb
        if found is None:
            return None
        parts = (run.nested.shadow_references, run.nested.guest_references, run.nested.host_references) if run.nested \
            else (found.references, 0, 0)  # fmt: skip
        numbers = [f"{part:,}" if part else "-" for part in parts]
        rows.append([name, f"{found.accesses:,}", f"{found.misses:,}", f"{found.references_per_miss:.2f}", *numbers])
    heads = ("", "accesses", "TLB misses", "entries each", "shadow", "guest's", "second stage")
    return table("Page walks (of the TLB model)", heads, rows)


def _stage_table(comparison: Comparison) -> RenderableType | None:
    found = [(name, run.nested) for name, run in zip(comparison.names(), comparison.runs, strict=True) if run.nested]
    columns = {label: key for label, key in _STAGE_COLUMNS.items() if any(getattr(n, key) for _, n in found)}
    if not columns:
        return None
    rows = [[name, *(f"{getattr(nested, key):,}" for key in columns.values())] for name, nested in found]
    return table("Exits and tables moved, nested and agile paging", ["", *columns], rows)


def _counter_table(comparison: Comparison) -> RenderableType | None:
    if not comparison.shadow_runs:
        return None
    names = comparison.names()
    mine = [name for name, run in zip(names, comparison.runs, strict=True) if run.nested is None]
    first, *others = ("\n".join(name.replace("linux-", "").split(" ")) for name in mine)
    heads = ["", first, *(head for name in others for head in (name, "vs 1st"))]
    rows = []
    for name, values in comparison.counters().items():
        cells = [f"{values[0]:,}"]
        for value in values[1:]:
            cells += [f"{value:,}", against(values[0], value)]
        rows.append([name, *cells])
    return table("KVM's counters under shadow paging", heads, rows)


def as_json(comparison: Comparison) -> str:
    """The comparison with the schema ``shadowkvm.compare/2``. It is the same in every run and on every machine."""
    out = {
        "schema": SCHEMA,
        "trace": comparison.about,
        "rows": comparison.about["rows"],
        "costs": comparison.costs.to_dict(),
        "variants": [_variant(run) for run in comparison.runs],
        "crossings": {
            cost: [{"below": i, "above": j, "cycles": x} for i, j, x in comparison.crossings(cost)] for cost in CROSSED
        },
    }
    return json.dumps(out, indent=1) + "\n"


def _variant(run: Ran) -> dict[str, Any]:
    variant = run.variant
    shadow = {"model_version": variant.model_version, "policy": variant.policy_name} if run.nested is None else {}
    return {
        "mmu": str(variant.mmu),
        **shadow,
        "profile": variant.profile,
        "exits": run.exits,
        "mismatches": run.mismatches,
        "account": run.account.to_dict(),
        "tlb": run.tlb._asdict() if run.tlb else None,
        "nested": run.nested._asdict() if run.nested else None,
        "counters": dict(run.counters),
    }


def as_csv(comparison: Comparison) -> str:
    """One line a number, one column a variant: exits, cycles by cause, counts of walks, KVM's counters."""
    runs = comparison.runs
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "name", *map(str, comparison.variants)])
    writer.writerow(["total", "exits", *(run.exits for run in runs)])
    writer.writerow(["total", "cycles", *(round(run.account.cycles) for run in runs)])
    for cause in causes(comparison):
        parts = [next(share for share in run.account.shares if share.cause is cause) for run in runs]
        writer.writerow(["cycles", cause.name, *(round(part.cycles) for part in parts)])
    for name in dict.fromkeys(name for run in runs for name in run.account.events.counts):
        counts = [run.account.events.counts.get(name, 0) for run in runs]
        if any(counts):
            writer.writerow(["event", name, *counts])
    for name in comparison.counters():
        writer.writerow(["counter", name, *(run.counters[name] if run.nested is None else "" for run in runs)])
    return out.getvalue()
