"""What the workloads cost, derived from their parameters and from the rules of the shadow MMU, not copied from a run.

Each test says why a number must be what it is. P is a number of pages.
"""

from __future__ import annotations

from typing import Any

import pytest

from shadowkvm.workloads import Phase, ScenarioResult, get

NEIGHBOURS = 8  # entries that one fault maps (the prefetch window)
CEILING = 33  # pages that are flushed one by one


def run(name: str, *, policy: str | None = None, **parameters: Any) -> ScenarioResult:
    result = get(name).build(**parameters).run(policy=policy)
    assert result.mismatches == 0
    return result


def phase(result: ScenarioResult, name: str) -> Phase:
    return result.phases[name]


def after_start(result: ScenarioResult, counter: str) -> int:
    return result.counters[counter] - result.phases["start"].counters[counter]


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_mmap_cycle_two_faults_a_page_and_a_few_for_unmapping() -> None:
    chunks, pages = 6, 512
    result = run("mmap_cycle", total=chunks * pages * 4096, chunk=pages * 4096)
    touch, unmap = phase(result, "touch"), phase(result, "unmap")
    # Entries come one at a time, so nothing can be prefetched: the guest's fault and the shadow's, for each page.
    assert touch.counters["pf_guest"] == chunks * pages
    assert touch.counters["x_faults_user"] == 2 * chunks * pages
    # Clearing 512 entries of an unsync table is free: what exits are the entries above it, and the flush.
    assert unmap.counters["exits"] / chunks < 6
    tenfold = phase(run("mmap_cycle", total=10 * chunks * pages * 4096, chunk=10 * pages * 4096), "unmap")
    # Ten tables: each goes unsync once; the directory above floods at the third.
    assert tenfold.counters["exits"] / chunks < 6 + 2 * 10
    assert unmap.counters["invlpg"] == 0
    small = run("mmap_cycle", total=64 * 16 * 4096, chunk=16 * 4096)
    assert small.counters["invlpg"] == 64 * 16, "up to the ceiling each page is flushed by itself"


def test_mmap_cycle_cold_frames_and_a_cold_host() -> None:
    chunks, pages = 6, 512
    size: dict[str, Any] = {"total": chunks * pages * 4096, "chunk": pages * 4096}
    warm, cold, absent = (
        run("mmap_cycle", **size, **more).counters["pf_fixed"] / chunks
        for more in ({}, {"reuse_gpa": False}, {"reuse_gpa": False, "host": "absent"})
    )
    # A fresh frame is zeroed through a direct map that the shadow does not have yet: a fault for each eight pages ...
    first_round = pages / NEIGHBOURS / chunks
    assert cold - warm == pytest.approx(pages / NEIGHBOURS - first_round, rel=0.1)
    # ... and for each single page where the host has none yet, for only what it has can be prefetched.
    assert absent - cold == pytest.approx(pages - pages / NEIGHBOURS, rel=0.05)


def test_mmap_cycle_without_unsync_each_store_to_a_table_exits() -> None:
    chunks, pages = 4, 512
    size: dict[str, Any] = {"total": chunks * pages * 4096, "chunk": pages * 4096}
    kvm, never = run("mmap_cycle", **size), run("mmap_cycle", **size, policy="no_unsync")
    for name in ("touch", "unmap"):
        more = phase(never, name).counters["pf_emulate"] - phase(kvm, name).counters["pf_emulate"]
        assert more == pytest.approx(chunks * pages, rel=0.01), name


def test_jit_flip_costs_its_flushes_and_nothing_else() -> None:
    flips, pages = 30, 8
    result = run("jit_flip", flips=flips, pages=pages)
    # The table went unsync at the first store and stays so: stores to it are free. Each INVLPG drops an entry that is
    # present (a flush) and fetches it again (no fault follows).
    assert result.counters["invlpg"] == 2 * pages * flips
    assert after_start(result, "tlb_flush") == 2 * pages * flips
    assert after_start(result, "pf_taken") < 10
    assert result.counters["pf_guest"] == 0


def test_jit_flip_of_many_pages_compares_the_table_instead() -> None:
    flips, pages = 30, CEILING + 1
    result = run("jit_flip", flips=flips, pages=pages)
    assert result.counters["invlpg"] == 0
    assert result.ops["CR3"] == 2 * flips
    # In step again after each load: the next store to it is a fault, which takes it out of step.
    assert after_start(result, "pf_taken") == pytest.approx(2 * flips, abs=10)


def test_gc_compaction_traps_once_and_faults_once() -> None:
    result = run("gc_compaction", heap=64, live=0.5, cycles=3)
    evacuate = phase(result, "evacuate").counters
    assert evacuate["pf_guest"] == 2 * 32 * 3
    # ... and the shadow's own fault for the new page.
    assert evacuate["x_faults_write"] == pytest.approx(2 * 32 * 3, abs=20)
    assert phase(result, "allocate").counters["pf_guest"] == 32 * 3, "the pages that nobody copied"


def test_pde_flood_is_over_after_three_stores() -> None:
    rounds, tables = 5, 40
    result = run("pde_flood", rounds=rounds, tables=tables)
    unlink, link = phase(result, "unlink").counters, phase(result, "link").counters
    assert unlink["mmu_flooded"] == rounds
    # Two are emulated, the third floods, the rest are ordinary stores; one more where the directory itself was linked.
    assert unlink["mmu_pte_write"] == (3 + 1) * rounds
    # With the directory go the page tables below it that are unsync. All are, since their own entries were just
    # cleared; but the first two hang there no more.
    assert unlink["mmu_shadow_zapped"] == rounds * (1 + tables - 2)
    assert unlink["pf_fixed"] == pytest.approx(rounds * tables, rel=0.1), "each table goes unsync when its entry goes"
    assert link["mmu_flooded"] == 0, "a use between two stores starts the count anew"
    assert link["mmu_pte_write"] == pytest.approx(rounds * tables, rel=0.1)


def test_huge_pages_on_small_and_on_huge_host_pages() -> None:
    cycles, pages = 3, 4
    small = phase(run("huge_pages", cycles=cycles, pages=pages), "touch").counters
    large = phase(run("huge_pages", cycles=cycles, pages=pages, host="huge-2m", split=False), "touch").counters
    assert small["pf_guest"] == large["pf_guest"] == cycles * pages
    per_page = 512 // NEIGHBOURS
    assert small["x_faults_user"] == cycles * pages * (per_page + 1), "the guest's fault, then eight entries a fault"
    assert large["x_faults_user"] == 2 * cycles * pages, "the guest's fault, then one entry for 2 MiB"


def test_working_set_exits_for_its_changes_only() -> None:
    rounds, changes = 3, 5
    result = run("working_set", pages=512, accesses=4000, changes=changes, rounds=rounds)
    assert phase(result, "access").counters["exits"] == 0
    change = phase(result, "change").counters
    assert change["pf_guest"] == change["invlpg"] == changes * rounds
    # The guest's fault, the page's own, the frame's in the direct map; the table goes unsync once and stays it.
    assert change["pf_taken"] <= 4 * changes * rounds + 30
    assert phase(run("working_set", pages=512, accesses=4000, changes=0, rounds=2), "access").counters["exits"] == 0


# -- processes --------------------------------------------------------------------------------------------------------


def test_fork_exit_copies_what_is_written_and_loads_cr3_four_times() -> None:
    forks, child, parent = 8, 5, 7
    result = run("fork_exit", forks=forks, child_writes=child, parent_writes=parent, pages=64)
    # fork's flush; to the child; away from the dying address space; to the parent.
    assert result.ops["CR3"] == 4 * forks
    # The child copies (cleared, flushed, stored); the parent, alone again, only gets its right back.
    assert result.counters["invlpg"] == child * forks
    assert result.counters["pf_guest"] == (child + parent) * forks
    # The tables of the last child are zapped when their frames become those of the next: none in the first fork.
    assert phase(result, "fork").counters["x_retries"] > 0
    first = run("fork_exit", forks=1, pages=64)
    assert phase(first, "fork").counters["mmu_shadow_zapped"] == 0
    assert phase(first, "fork").counters["x_retries"] == 0


def test_fork_exit_in_frames_that_rest_zaps_nothing() -> None:
    """Freed table frames that are not used again keep their shadow pages: nothing is zapped, everything is made."""
    rested = run("fork_exit", forks=8, reuse="fifo", parent_writes=0)
    assert phase(rested, "fork").counters["mmu_shadow_zapped"] == 0
    reused = run("fork_exit", forks=8, parent_writes=0)
    assert phase(reused, "fork").counters["mmu_shadow_zapped"] > 8


def test_exec_storm_loads_cr3_six_times() -> None:
    execs, text = 4, 160
    result = run("exec_storm", execs=execs, text=text)
    # fork's flush, child, new address space, moved stack, dying one, shell.
    assert result.ops["CR3"] == 6 * execs
    # Code that is cached comes 16 pages a fault of the guest, and 8 a fault of the shadow.
    fetches = phase(result, "run").counters["x_faults_fetch"]
    assert fetches == pytest.approx(execs * (text / 16 + text / NEIGHBOURS), abs=2 * execs)


def test_cow_storm_one_copy_one_flush_one_guest_fault() -> None:
    pages, children, rounds = 48, 2, 3
    result = run("cow_storm", pages=pages, children=children, rounds=rounds)
    copies = pages * children * rounds
    assert result.units == copies
    assert phase(result, "copy").counters["invlpg"] == copies
    assert phase(result, "copy").counters["pf_guest"] == copies
    reuse = phase(result, "reuse").counters
    assert (reuse["pf_guest"], reuse["invlpg"]) == (pages * rounds, 0)


@pytest.mark.parametrize(
    ("more", "exits", "flushes"),
    [
        ({}, 1, 1),
        # The ways out of and into the kernel load CR3, too.
        ({"kpti": True}, 3, 3),
        # Six PCIDs for eight processes in turn: each is gone when it is wanted. For four of them no flush is left.
        ({"pcid": True}, 1, 1),
        ({"pcid": True, "processes": 4}, 1, 0),
        ({"pcid": True, "processes": 4, "kpti": True}, 3, 0),
    ],
    ids=["plain", "kpti", "pcid-8", "pcid-4", "pcid-kpti"],
)
def test_context_switch_costs_its_cr3_loads(more: dict[str, Any], exits: int, flushes: int) -> None:
    count = 64
    result = run("context_switch", switches=count, **more)
    switch = phase(result, "switch").counters
    assert switch["pf_taken"] == 0, "all that is touched was shadowed in phase start"
    assert (switch["exits"], switch["tlb_flush"]) == (exits * count, flushes * count)


@pytest.mark.parametrize(("kpti", "pcid"), [(False, False), (True, False), (True, True)])
def test_syscalls_cost_nothing_or_two_cr3_loads(kpti: bool, pcid: bool) -> None:
    calls = 256
    counters = phase(run("syscall_storm", calls=calls, kpti=kpti, pcid=pcid), "call").counters
    # The kernel's pages that a call uses come in with the first calls.
    warming = counters["pf_taken"]
    assert warming < 24
    assert counters["exits"] - warming == (2 * calls if kpti else 0)
    assert counters["tlb_flush"] == (2 * calls if kpti and not pcid else 0)


def test_shootdown_flushes_everywhere_and_drops_once() -> None:
    flushes, pages, cpus = 6, 12, 3
    result = run("shootdown", flushes=flushes, pages=pages, cpus=cpus)
    drop, use = phase(result, "drop").counters, phase(result, "use").counters
    assert drop["invlpg"] == flushes * pages * cpus
    assert drop["io_exits"] == flushes * (cpus - 1)
    # The first CPU's INVLPG finds the entry present: a request each. The others find nothing. Each request flushes the
    # CPU that made it; the others take all of them in one at their next entry.
    assert drop["remote_tlb_flush_requests"] == flushes * pages
    assert drop["tlb_flush"] == flushes * (pages + cpus - 1)
    # Whoever comes first takes both faults; the tables are shared.
    assert use["pf_guest"] == flushes * pages
    assert use["x_faults_user"] == 2 * flushes * pages


# -- the kernel and the host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "faults"), [(8, 1), (4, 4)], ids=["at-a-window", "behind-a-hole"])
def test_kernel_map_change_is_paid_by_the_next_switch(processes: int, faults: int) -> None:
    changes = 20
    result = run("kernel_map_change", changes=changes, processes=processes, lazy_vfree=0, pages=4)
    change, switch = phase(result, "change").counters, phase(result, "switch").counters
    assert change["mmu_unsync"] == changes
    assert switch["mmu_unsync"] == -changes
    assert switch["exits"] == changes
    # Bringing one table in step is two requests: its page write-protected, entries dropped or changed.
    assert switch["remote_tlb_flush_requests"] == 2 * changes
    # One fault takes the table out of step. Kernel stacks of four pages and a hole come first: behind eight of them the
    # four pages begin a window of eight, and one fault brings all. Behind four a hole is in their window, where
    # prefetching stops: it goes from the window's start upwards.
    assert change["pf_fixed"] == pytest.approx((1 + faults) * changes, abs=4)


def test_page_cache_scan_faults_around() -> None:
    pages, processes = 256, 2
    result = run("page_cache_scan", pages=pages, processes=processes, passes=1, reclaimed=0.0)
    scan = phase(result, "scan").counters
    # The mapping may begin inside a window of 16 pages.
    assert scan["pf_guest"] == pytest.approx(processes * pages / 16, abs=processes)
    # The guest's fault; then the shadow's, which maps eight of the sixteen.
    shadow = processes * pages / NEIGHBOURS
    assert scan["x_faults_read"] == pytest.approx(scan["pf_guest"] + shadow, abs=processes * 4)
    again = run("page_cache_scan", pages=pages, processes=processes, passes=2, reclaimed=0.0)
    second = phase(again, "scan").counters["x_faults_read"] - scan["x_faults_read"]
    # Entries whose A was cleared were dropped at the flush between the processes, and are not prefetched.
    assert second == pytest.approx(processes * pages, rel=0.1)


def test_mmio_poll_makes_one_entry() -> None:
    polls = 50
    result = run("mmio_poll", polls=polls)
    counters = phase(result, "poll").counters
    assert counters["mmio_exits"] == counters["x_mmio_faults"] == counters["insn_emulation"] == polls
    assert result.counters["pf_mmio_spte_created"] == 1
    changed = run("mmio_poll", polls=polls, every=10, slots=True)
    # Stale after each change but the last, which no poll follows; a stale entry's access takes the long way.
    assert changed.counters["pf_mmio_spte_created"] == 1 + 4
    assert phase(changed, "poll").counters["x_mmio_faults"] == polls - 4
    assert phase(changed, "slot").counters["mmu_shadow_zapped"] > 0


def test_nested_tables_load_cr3_twice() -> None:
    exits = 20
    result = run("nested_tables", exits=exits, zap_every=0)
    assert result.ops["CR3"] == 2 * exits
    inside = phase(result, "exit").counters
    assert inside["exits"] - inside["pf_taken"] == 2 * exits
    # Its table goes unsync at the first store, and is compared when its root is loaded.
    assert inside["x_faults_write"] >= exits * 0.9
    assert inside["mmu_unsync"] <= 1


def test_live_migration_faults_once_for_each_page_and_round() -> None:
    rounds, dirtied = 4, 100
    result = run("live_migration", rounds=rounds, dirtied=dirtied, memory_pages=512)
    # No neighbour is prefetched: it is writable and dirty, and the log must see its own first store.
    assert phase(result, "round").counters["pf_fixed"] == rounds * dirtied
    assert phase(result, "get log").answer == rounds * dirtied
    assert phase(result, "log on").counters["remote_tlb_flush_requests"] == 1
