"""Compare a run of the engine with the recording: counters, events, dirty logs, final leaf tables."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from shadowkvm.kvm.tracetext import Normaliser, comparable, same_event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.conformance.corpus import Scenario, Table
    from tests.conformance.driver import Result

# Every counter that the recordings hold, but for exits, io_exits, mmio_exits, irq_exits: they carry timer noise or
# belong to the harness.
COUNTERS = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_guest", "pf_mmio_spte_created",
    "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss",
    "mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits", "remote_tlb_flush_requests", "tlb_flush",
    "invlpg", "insn_emulation", "insn_emulation_fail", "max_mmu_rmap_size",
)  # fmt: skip


def moves_frames(scenario: Scenario) -> bool:
    """Whether the host replaced pages during the run: which frame it took then is its own affair."""
    return scenario.host == "untouched" or any(
        op.letter == "HOST" and op.address in (6, 7, 10, 11) for op in scenario.ops
    )


def normalise(scenario: Scenario, lines: Iterable[str]) -> list[str]:
    return Normaliser(frames=not moves_frames(scenario)).lines(lines)


class EventDiff(NamedTuple):
    first: int  # index of the first difference, in the normalised streams
    expected: list[str]
    got: list[str]


def diff_events(scenario: Scenario, got: list[str]) -> EventDiff | None:
    expected, mine = normalise(scenario, scenario.events), normalise(scenario, got)
    for index, (one, other) in enumerate(zip_longest(expected, mine)):
        if one is None or other is None or not same_event(one, other):
            return EventDiff(index, expected, mine)
    return None


def diff_counters(expected: dict[str, int], got: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Counters that differ: name -> (recorded, got)."""
    pairs = {name: (expected.get(name, 0), int(got.get(name, 0))) for name in COUNTERS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def diff_stages(scenario: Scenario, result: Result) -> list[str]:
    """Counters after each HOST action and at the end."""
    out = []
    if len(scenario.stages) != len(result.stages):
        out.append(f"{len(result.stages)} stages, recorded {len(scenario.stages)}")
    for number, (expected, got) in enumerate(zip(scenario.stages, result.stages, strict=False), start=1):
        at = "at the end" if number == len(scenario.stages) else f"after HOST action {number}"
        for name, (recorded, mine) in diff_counters(expected, got).items():
            out.append(f"{name} {at}: recorded {recorded}, got {mine}")
    return out


def leaf_tables(vm: Any) -> list[tuple[int, int, bool, list[int]]]:
    """(gfn, level, direct, 512 sptes) of every shadow page. The one place that knows what vm.shadow() looks like."""
    return [
        (int(page.gfn), int(page.role.level), bool(page.role.direct), [page.entries.get(i, 0) for i in range(512)])
        for page in vm.shadow().pages
    ]


def _entries(table: Table, sptes: list[int]) -> dict[int, tuple[int, int]]:
    """Entries that differ: index -> (recorded, got), as flags; MMIO entries whole."""
    out = {}
    truncated = len(table.entries) >= 40  # the harness printed the first 40 entries
    last = max(table.entries) if truncated else 511
    for index in range(last + 1):
        spte = sptes[index]
        if spte and table.level > 1 and not spte & 0x80:
            spte = 0  # a link to a lower table
        got = spte if spte >> 51 & 1 else spte & (1 << 63 | 0xFFF)
        recorded = table.entries.get(index, 0)
        if got != recorded:
            out[index] = (recorded, got)
    return out


def diff_tables(scenario: Scenario, vm: Any) -> list[str]:
    """Each recorded leaf table must be found: same gfn, level, kind, entries (roles may give a gfn several)."""
    pages = leaf_tables(vm)
    out = []
    for table in scenario.tables:
        mine = [page for page in pages if page[:3] == (table.gfn, table.level, table.direct)]
        diffs = sorted((_entries(table, page[3]) for page in mine), key=len)
        what = f"table gfn {table.gfn:x} l{table.level}{' direct' if table.direct else ''}"
        if not diffs:
            out.append(f"{what}: no such shadow page")
        elif diffs[0]:
            changes = [f"[{index}] recorded {a:x} got {b:x}" for index, (a, b) in list(diffs[0].items())[:8]]
            out.append(f"{what}: " + ", ".join(changes))
    return out


def side_by_side(diff: EventDiff, *, before: int = 6, after: int = 10) -> str:
    """The two streams around the first difference."""
    lines = [f"first difference at event {diff.first} (normalised; # = host frame, table numbers by appearance)"]
    start = max(0, diff.first - before)
    width = 92
    lines.append(f"     {'recorded':{width}} | got")
    for index in range(start, diff.first + after):
        one = diff.expected[index] if index < len(diff.expected) else ""
        other = diff.got[index] if index < len(diff.got) else ""
        if one or other:
            lines.append(f"{'  ' if same_event(one, other) else '->'}{index:4} {one[:width]:{width}} | {other[:width]}")
    return "\n".join(lines)


def op_at(scenario: Scenario, result: Result, diff: EventDiff) -> str:
    """The op that the engine was in when it raised the first differing event (needs marks)."""
    if not result.marks:
        return "?"
    count, position = 0, len(result.events)
    for index, text in enumerate(result.events):
        if comparable(text):
            if count == diff.first:
                position = index
                break
            count += 1
    number = max((i for i, mark in enumerate(result.marks) if mark <= position), default=0)
    return f"op {number}: {scenario.ops[number]}" if number < len(scenario.ops) else "the final HLT"
