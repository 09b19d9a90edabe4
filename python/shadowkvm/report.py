"""What a replay came to: as tables for people, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import Box
from rich.cells import cell_len
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from shadowkvm.counters import COUNTER_INFO
from shadowkvm.events import EVENT_INFO
from shadowkvm.faults import Access, Kind, Result
from shadowkvm.ops import Op
from shadowkvm.replay import Replay

__all__ = ["RUN_SCHEMA", "Rate", "as_csv", "as_dict", "as_json", "as_tables", "rate_text", "rates", "table"]

RUN_SCHEMA: Final = "shadowkvm.run/1"

_RESULTS: Final = {
    Result.FIXED: "fixed",
    Result.EMULATED: "emulated",
    Result.SPURIOUS: "spurious",
    Result.GUEST: "guest's own",
    Result.MMIO: "mmio",
}
_KINDS: Final = {
    Kind.USER_CODE: "user code",
    Kind.USER_DATA: "user data",
    Kind.KERNEL_CODE: "kernel code",
    Kind.KERNEL_DATA: "kernel data",
    Kind.TABLE_1: "page table (level 1)",
    Kind.TABLE_2: "page table (level 2)",
    Kind.TABLE_3: "page table (level 3)",
    Kind.TABLE_4: "page table (level 4)",
    Kind.TABLE_5: "page table (level 5)",
    Kind.DEVICE: "device",
}
# A rule under the head and nothing else, so that lines can be cut and pasted.
_RULE: Final = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
_SPACES_SHOWN: Final = 8


class Rate(NamedTuple):
    """How often something happened."""

    name: str
    """Key in JSON."""
    label: str
    """For people; leading spaces show what is a part of what."""
    total: int
    counter: str
    """The counter it is, empty if it was counted from events or rows."""


def _events(replay: Replay, name: str) -> int:
    return int(replay.breakdown.events[EVENT_INFO[name].code])


def rates(replay: Replay) -> list[Rate]:
    """What shadow paging did, in the order of the report."""
    counters, breakdown = replay.result.counters, replay.breakdown

    def of(label: str, counter: str) -> Rate:
        return Rate(counter, label, counters[counter], counter)

    synced = breakdown.sync_ops
    at_load, at_invlpg = int(synced[Op.CR3]), int(synced[Op.INVLPG])
    made_by_recording = int(breakdown.zap_ops[Op.PAGE])
    return [
        of("VM exits", "exits"),
        Rate("pf_exits", "  #PF exits", _events(replay, "kvm_page_fault"), ""),
        of("    shadow repaired", "pf_fixed"),
        of("    emulated", "pf_emulate"),
        of("    spurious", "pf_spurious"),
        of("    reflected to the guest", "pf_guest"),
        of("    answered by an MMIO entry", "x_mmio_faults"),
        Rate("cr3_loads", "  CR3 loads", int(breakdown.ops[Op.CR3]), ""),
        of("  INVLPG", "invlpg"),
        of("emulated stores to memory", "mmu_pte_write"),
        Rate("unsync", "tables gone unsync", _events(replay, "kvm_mmu_unsync_page"), ""),
        Rate("synced_cr3", "  resynced at a CR3 load", at_load, ""),
        Rate("synced_invlpg", "  resynced at INVLPG", at_invlpg, ""),
        Rate("synced_other", "  resynced otherwise", int(synced.sum()) - at_load - at_invlpg, ""),
        Rate("unsync_zapped", "  zapped while unsync", breakdown.sync_zapped, ""),
        of("shadow pages made", "mmu_cache_miss"),
        of("shadow pages zapped", "mmu_shadow_zapped"),
        of("  by flooding", "mmu_flooded"),
        of("  by recycling", "mmu_recycled"),
        Rate("zapped_page_rows", "  by rewritten tables (PAGE rows)", made_by_recording, ""),
        of("TLB flush requests", "remote_tlb_flush_requests"),
        of("TLB flushes at entry", "tlb_flush"),
    ]


def _per(replay: Replay, total: int) -> dict[str, float | None]:
    """Rates per 1,000 guest instructions, per 1,000 rows, per CR3 load; None where there is nothing to divide by."""
    loads = int(replay.breakdown.ops[Op.CR3])
    instructions, rows = replay.result.instructions, replay.result.rows
    return {
        "per_1000_instructions": 1000 * total / instructions if instructions else None,
        "per_1000_rows": 1000 * total / rows if rows else None,
        "per_cr3_load": total / loads if loads else None,
    }


def _checks(replay: Replay) -> dict[str, Any]:
    result, checks = replay.result, replay.breakdown.checks
    return {
        "faults_matched": result.faults_matched,
        "faults_missed": result.faults_missed,
        "faults_unexpected": result.faults_unexpected,
        "first_mismatch": result.first_mismatch,
        "translations_compared": checks.translations,
        "translations_wrong": checks.wrong,
        "first_wrong_translation": checks.first_wrong,
    }


def as_dict(replay: Replay) -> dict[str, Any]:
    """The whole replay in the types of JSON. All but ``time`` is the same in every run and on every machine."""
    result, breakdown = replay.result, replay.breakdown
    counters = result.counters
    return {
        "schema": RUN_SCHEMA,
        "version": version("shadowkvm"),
        "model_version": replay.model,
        "trace": replay.trace,
        "settings": replay.settings,
        "rows": result.rows,
        "instructions": result.instructions,
        "ops": {op.name: int(breakdown.ops[op]) for op in Op if breakdown.ops[op]},
        "status": dict(result.status),
        "faults": [
            {"user": bool(user), "access": access.name.lower(), **_results(breakdown.faults[user, access])}
            for user in (1, 0)
            for access in Access
        ],
        "kinds": [
            {"kind": kind.name.lower(), **_results(breakdown.kinds[kind]), "unsync": int(breakdown.kind_unsync[kind])}
            for kind in Kind
        ],
        "rates": {rate.name: {"total": rate.total, **_per(replay, rate.total)} for rate in rates(replay)},
        "address_spaces": [space.to_dict() for space in breakdown.spaces],
        "counters": {
            name: {"value": value, "kind": COUNTER_INFO[name].kind, "scope": COUNTER_INFO[name].scope}
            for name, value in counters.items()
        },
        "recorded": replay.recorded,
        "checks": _checks(replay),
        "time": {
            "seconds": replay.elapsed,
            "engine_seconds": result.seconds,
            "rows_per_second": result.ops_per_second,
        },
    }


def _results(row: NDArray[np.int64]) -> dict[str, int]:
    return {result.name.lower(): int(row[result]) for result in Result} | {"exits": int(row.sum())}


def as_json(replay: Replay) -> str:
    """`as_dict` as text, one key a line."""
    return json.dumps(as_dict(replay), indent=1) + "\n"


def as_csv(replay: Replay) -> str:
    """The counters: counter, value, kind, scope, and rates of those that are cumulative."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rate_names = tuple(_per(replay, 0))
    writer.writerow(("counter", "value", "kind", "scope", *rate_names))
    for name, value in replay.result.counters.items():
        info = COUNTER_INFO[name]
        per = _per(replay, value) if info.kind == "cumulative" else dict.fromkeys(rate_names)
        rest = ("" if rate is None else f"{rate:.6g}" for rate in per.values())
        writer.writerow((name, value, info.kind, info.scope, *rest))
    return out.getvalue()


# -- for people -------------------------------------------------------------------------------------------------------


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Group:
    """A table under a title: the first ``left`` columns to the left, numbers to the right."""
    out = Table(
        box=_RULE,
        show_edge=False,
        header_style="",
        pad_edge=False,
        padding=(0, 1),
    )
    for number, head in enumerate(heads):
        # Names and numbers are not cut in two, whatever the width; what is told may be.
        whole = number == 0 or number >= left
        lines = [line for cell in (head, *(row[number] for row in rows)) for line in cell.split("\n")]
        width = max(map(cell_len, lines)) if whole else None
        justify: JustifyMethod = "left" if number < left else "right"
        out.add_column(Text(head), justify=justify, no_wrap=whole, overflow="fold", min_width=width)
    for row in rows:
        out.add_row(*map(Text, row))
    return Group(Text(title, style="bold"), out) if title else Group(out)


def _number(value: int) -> str:
    return f"{value:,}" if value else "-"


def rate_text(value: float | None) -> str:
    """A rate for people: three digits, or as many as are before the point."""
    if not value:
        return "-"
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def _fault_table(replay: Replay) -> Group:
    faults = replay.breakdown.faults
    rows = [
        [f"{'user' if user else 'kernel':6} {access.name.lower()}", *_fault_cells(faults[user, access])]
        for user in (1, 0)
        for access in Access
    ]
    rows.append(["all", *_fault_cells(faults.sum((0, 1)))])
    return table("#PF exits by who and how", ("", "exits", *_RESULTS.values()), rows)


def _fault_cells(row: NDArray[np.int64]) -> list[str]:
    return [_number(int(row.sum())), *(_number(int(row[result])) for result in _RESULTS)]


def _kind_table(replay: Replay) -> Group:
    breakdown = replay.breakdown
    rows = [
        [label, *_fault_cells(breakdown.kinds[kind]), _number(int(breakdown.kind_unsync[kind]))]
        for kind, label in _KINDS.items()
        if breakdown.kinds[kind].any()
    ]
    return table("... by kind of page", ("", "exits", *_RESULTS.values(), "gone unsync"), rows)


def _rate_table(replay: Replay) -> Group:
    heads = ("", "total", "per 1,000 instr.", "per 1,000 rows", "per CR3 load")
    rows = [
        [rate.label, _number(rate.total), *(rate_text(value) for value in _per(replay, rate.total).values())]
        for rate in rates(replay)
        # What never happened is not worth a line, unless it is what people look for.
        if rate.total or not rate.label.startswith("  ")
    ]
    return table("What shadow paging did", heads, rows)


def _space_table(replay: Replay) -> Group:
    spaces = replay.breakdown.spaces
    fields = ("loads", "rows", "faults", "guest", "emulated", "unsync", "synced", "zapped")
    heads = ("CR3", "loads", "rows", "#PF exits", "guest's own", "emulated", "unsync", "resynced", "zapped")
    rows = [
        [f"{space.cr3:#x}" if space.cr3 >= 0 else "others", *(_number(getattr(space, name)) for name in fields)]
        for space in spaces[:_SPACES_SHOWN]
    ]
    rest = spaces[_SPACES_SHOWN:]
    if rest:
        rows.append([f"{len(rest):,} more", *(_number(sum(getattr(s, name) for s in rest)) for name in fields)])
    return table("... by address space (CR3)", heads, rows)


def _head(replay: Replay) -> Iterator[str]:
    about, settings, ops = replay.trace, replay.settings, replay.breakdown.ops
    quota = "" if settings["quota"] is None else f", quota {settings['quota']:,} shadow pages"
    yield f"{replay.model}, policy {settings['policy']}, profile {settings['profile']}{quota}"
    if about["guest"]:
        yield about["guest"]
    parts = [f"{replay.result.rows:,} rows"]
    if replay.result.instructions:
        parts.append(f"{replay.result.instructions:,} instructions")
    parts += [f"{int(ops[Op.CR3]):,} CR3 loads", f"{int(ops[Op.INVLPG]):,} INVLPG"]
    parts += [f"{about['memory'] >> 10:,} KiB" if about["memory"] % (1 << 20) else f"{about['memory'] >> 20:,} MiB"]
    yield f"{', '.join(parts)}, {about['mode']}"


def _verdict(replay: Replay) -> Iterator[Text]:
    result, checks = replay.result, replay.breakdown.checks
    odd = [f"{count:,} {name}" for name, count in result.status.items() if count and name not in {"done", "page_fault"}]
    if odd:
        yield Text(
            f"Outcomes: {result.status['done']:,} done, {result.status['page_fault']:,} page_fault, {', '.join(odd)}"
        )
    if replay.recorded:
        good = result.faults_missed + result.faults_unexpected == 0
        where = "" if result.first_mismatch is None else f", first at row {result.first_mismatch:,}"
        yield Text.assemble(
            "Guest's own faults: ",
            (f"{result.faults_matched:,} as recorded", "green" if good else "red"),
            f", {result.faults_missed:,} missed, {result.faults_unexpected:,} unexpected{where}",
        )
        where = "" if checks.first_wrong is None else f", first at row {checks.first_wrong:,}"
        yield Text.assemble(
            "Translations: ",
            (f"{checks.translations - checks.wrong:,} as recorded", "red" if checks.wrong else "green"),
            f", {checks.wrong:,} wrong{where}",
        )
    speed = f"{result.ops_per_second / 1e6:.1f} million rows/s"
    yield Text(f"Replayed in {replay.elapsed:.2f} s, {result.seconds:.2f} s of them in the engine ({speed})")


def as_tables(replay: Replay) -> RenderableType:
    """The report for people, something that a rich console prints."""
    title = Text(f"{replay.trace['name'] or 'trace'} under KVM's shadow MMU", style="bold")
    tables: list[RenderableType] = [
        _fault_table(replay),
        _kind_table(replay),
        _rate_table(replay),
        _space_table(replay),
    ]
    spaced = [part for each in tables for part in (Text(), each)]
    return Group(title, *(Text(line) for line in _head(replay)), *spaced, Text(), *_verdict(replay))
