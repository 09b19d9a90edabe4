"""The driver itself, without an engine: its calls must explain every recorded exit, in order."""

from __future__ import annotations

import re

import pytest
from tests.conformance.compare import diff_events, diff_tables, moves_frames, normalise
from tests.conformance.corpus import load, memory_pages
from tests.conformance.driver import run_scenario
from tests.conformance.replayed import Replayed, recorded_exits

CORPUS = load()
RUN = list(CORPUS.scenarios)


@pytest.mark.parametrize("ident", RUN)
def test_calls_explain_every_recorded_exit(ident: str) -> None:
    """Each recorded #PF (RIP, address, kind) and privileged exit is the next one of some call; none is left over."""
    scenario = CORPUS.scenarios[ident]
    result = run_scenario(Replayed(scenario), scenario)
    left = result.vm.vcpus[0].exits
    assert not left, f"first exit that no call explains: {left[0]}"
    end = scenario.end
    assert (result.op, len(result.faults), result.shutdown) == (end["op"], scenario.faults, end["shutdown"])
    if scenario.is_long:  # the 32-bit program keeps no error code
        assert (result.faults or [0])[-1] == end["error"]
    assert (len(result.stages), len(result.dirty)) == (len(scenario.stages), len(scenario.dirty))


@pytest.mark.parametrize("ident", RUN)
def test_recorded_accessed_bits_are_of_pages_that_the_calls_touch(ident: str) -> None:
    """Final A bits of 200..227 (code, IDT, GDT, TSS, stack, op list, user stub) name exactly the pages touched.

    This is what proves the accesses that cause no exit. A second role of the same table splits them (O1-6).
    """
    scenario = CORPUS.scenarios[ident]
    result = run_scenario(Replayed(scenario), scenario)
    touched: set[int] = set()
    for line in result.vm.vcpus[0].log:
        if found := re.match(r"(\w+) rip (\w+) address (\w+)", line):
            touched.update(int(word, 16) >> 12 for word in found.groups()[1:] if word != "None")
    tables = [table for table in scenario.tables if (table.gfn, table.level) == (5, 1)]
    accessed = {0x200 + i for t in tables for i, spte in t.entries.items() if spte & 0x20 and i < 0x28}
    present = {0x200 + i for t in tables for i in t.entries if i < 0x28}
    assert accessed == touched & present


@pytest.mark.parametrize("ident", RUN)
def test_comparison_accepts_the_recording_and_sees_a_change(ident: str) -> None:
    scenario = CORPUS.scenarios[ident]
    assert diff_events(scenario, scenario.events) is None
    for cut in range(0, len(scenario.events), 17):
        if scenario.events[cut].startswith("kvm_mmu"):
            assert diff_events(scenario, scenario.events[:cut] + scenario.events[cut + 1 :]) is not None


def test_normalising_hides_addresses_only() -> None:
    scenario = CORPUS.scenarios["O1-0"]
    assert not moves_frames(scenario)

    def moved(line: str) -> str:
        line = re.sub(r"(?<= pfn )\w+", lambda m: f"{int(m[0], 16) + 0x70:x}", line)
        line = re.sub(r"(?<= spte )\w+", lambda m: f"{int(m[0], 16) + 0x70000:x}", line)
        return re.sub(r"(?<= at )\w+", lambda m: f"{int(m[0], 16) + 0x5000:x}", line)

    elsewhere = [moved(line) for line in scenario.events]
    assert elsewhere != scenario.events
    assert diff_events(scenario, elsewhere) is None
    first = next(line for line in normalise(scenario, scenario.events) if "set_spte" in line)
    assert first == "kvm_mmu_set_spte: gfn 200 spte #0 e63 (rwx-) level 1 at table 0 [0]"


def test_final_tables_are_compared() -> None:
    class Role:
        level, direct = 1, False

    class Page:
        role = Role()

        def __init__(self, gfn: int, entries: dict[int, int]) -> None:
            self.gfn = gfn
            self.entries = dict(entries)

    class Shadow:
        def __init__(self, pages: list[Page]) -> None:
            self.pages = pages

    class Vm:
        def __init__(self, pages: list[Page]) -> None:
            self.pages = pages

        def shadow(self) -> Shadow:
            return Shadow(self.pages)

    scenario = CORPUS.scenarios["O1-1"]
    pages = [Page(table.gfn, {i: spte | 0x1234000 for i, spte in table.entries.items()}) for table in scenario.tables]
    assert diff_tables(scenario, Vm(pages)) == []
    pages[0].entries[0] ^= 0x20
    assert len(diff_tables(scenario, Vm(pages))) == 1
    assert len(diff_tables(scenario, Vm(pages[1:]))) == 1


def test_start_state() -> None:
    pages = memory_pages(CORPUS, CORPUS.scenarios["O1-0"])
    assert sorted(page >> 12 for page in pages) == [1, 2, 3, *range(4, 12), 0x200, 0x201, 0x202, 0x203, 0x210, 0x220]
    assert pages[0x203000][4:12] == (0x206000).to_bytes(8, "little")
    assert pages[0x5000][0x100:0x108] == (0x220067).to_bytes(8, "little")
    assert pages[0x200000][0x20:0x28] == (0x2001D4).to_bytes(8, "little")


def test_recorded_exits_are_read() -> None:
    exits = recorded_exits(CORPUS.scenarios["O1-1"])
    assert [e.kind for e in exits if e.kind != "PF"] == ["invlpg", "load_cr3", "load_cr3", "hlt"]
    assert [e.injected for e in exits if e.injected is not None] == [0]
