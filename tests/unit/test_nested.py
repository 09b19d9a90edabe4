"""Nested paging: the same guest, other costs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shadowkvm as sk
from shadowkvm.pagetables import make_rows
from shadowkvm.workloads import entries, get

COMMON = ("fork_exit", "context_switch", "mmap_cycle", "jit_flip", "live_migration", "cow_storm")


@pytest.mark.parametrize("agile", [False, True], ids=["nested", "agile"])
@pytest.mark.parametrize("name", [entry.name for entry in entries()])
def test_every_workload_sees_what_its_own_tables_say(name: str, agile: bool) -> None:
    scenario = get(name).build(scale=0.02)
    vm = scenario.vm()
    if agile:
        vm.use_agile(interval=500)
    else:
        vm.use_nested()
    result = scenario.run(vm)
    assert result.mismatches == 0
    assert not vm.shadow().pages
    assert vm.nested is not None
    assert vm.nested.accesses == vm.nested.hits + vm.nested.misses > 0
    assert vm.nested.misses <= vm.nested.references <= 24 * vm.nested.misses
    assert (vm.nested.shadow_references > 0) == (vm.nested.shadow_fills > 0) == agile
    assert vm.nested.guest_faults >= sum(phase.guest_faults for phase in result.phases.values())


@pytest.mark.parametrize("name", COMMON)
def test_memory_comes_to_the_same_as_under_the_shadow(name: str) -> None:
    scenario = get(name).build(scale=0.02)
    nested, shadow = scenario.vm(), scenario.vm()
    nested.use_nested()
    scenario.run(nested)
    scenario.run(shadow)
    size = scenario.memory
    mine, other = (np.frombuffer(vm.read_memory(0, size), "<u8") for vm in (nested, shadow))
    # A and D may be set at other moments: a prefetched entry needs no walk of the guest's.
    assert ((mine ^ other) & ~np.uint64(0x60) == 0).all()


def test_a_cold_second_stage_faults_once_a_page_and_a_warm_one_never(one_frame_guest: Callable[[], sk.Vm]) -> None:
    pages = make_rows(sk.Op.READ, np.tile(np.arange(64) << 12, 3))
    exits = {}
    for warm in (False, True):
        vm = one_frame_guest()
        vm.use_nested(warm=warm)
        vm.run(pages)
        assert vm.nested is not None
        exits[warm] = vm.nested.exits
    assert exits == {False: 5, True: 0}  # four tables, and the frame that all pages map
    scenario = get("mmap_cycle").build(scale=0.05)
    small, large = scenario.vm(), scenario.vm()
    small.use_nested()
    large.use_nested(page_size=2 << 20)
    scenario.run(small)
    scenario.run(large)
    assert small.nested is not None
    assert large.nested is not None
    assert small.nested.stage_faults > 20 * large.nested.stage_faults > 0


def test_dropped_pages_fault_again(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.use_nested(warm=True)
    read = make_rows(sk.Op.READ, [0])
    vm.run(read)
    vm.notifier_unmap(0x10000, 0x1000)
    vm.run(read)
    assert vm.nested is not None
    assert vm.nested.stage_faults == 1


def test_agile_paging_exits_less_than_the_shadow_and_walks_less_than_nested_paging() -> None:
    """What the paper is about (ISCA 2016): tables at rest are walked in the shadow, those that change in place."""
    scenario = get("fork_exit").build(scale=0.3)
    shadow, nested, agile = scenario.vm(), scenario.vm(), scenario.vm()
    nested.use_nested(warm=True, walk_caches=None, nested_tlb=0)
    agile.use_agile(warm=True, walk_caches=None, nested_tlb=0)
    for vm in (shadow, nested, agile):
        scenario.run(vm)
    assert agile.nested is not None
    assert nested.nested is not None
    assert 0 < agile.nested.exits < shadow.counters["exits"] / 5
    assert agile.nested.references_per_miss < nested.nested.references_per_miss
    assert agile.nested.to_nested > 0


def test_a_fill_of_agile_paging_maps_eight_pages_in_the_host_too() -> None:
    scenario = get("working_set").build(pages=512, accesses=100, changes=0, rounds=1)
    nested, agile = scenario.vm(), scenario.vm()
    nested.use_nested()
    agile.use_agile()
    scenario.run(nested)
    scenario.run(agile)
    assert nested.nested is not None
    assert agile.nested is not None
    assert nested.nested.exits > 512
    assert agile.nested.exits < 512 / 8 + 50
    assert agile.nested.stage_faults == 0


@pytest.mark.parametrize("agile", [False, True], ids=["nested", "agile"])
def test_what_the_host_takes_away_faults_again(one_frame_guest: Callable[[], sk.Vm], agile: bool) -> None:
    read = make_rows(sk.Op.READ, [0])

    def faults(change: Callable[[sk.Vm], None]) -> int:
        """Exits of a read after a change of the host's, with everything mapped before it."""
        vm = one_frame_guest()
        vm.add_slot(1, 1 << 30, 1 << 20)
        if agile:
            vm.use_agile()
        else:
            vm.use_nested()
        vm.run(read)
        before = vm.nested.exits  # type: ignore[union-attr]
        change(vm)
        vm.run(read)
        return int(vm.nested.exits) - before  # type: ignore[union-attr]

    assert faults(sk.Vm.clear_events) == 0
    assert faults(lambda vm: vm.notifier_unmap(0x10000, 0x1000)) == 1
    assert faults(lambda vm: vm.notifier_change(0x10000, 0x1000)) == 1
    assert faults(lambda vm: vm.notifier_unmap(0x20000, 0x1000)) == 0
    # With a slot everything goes: four tables and the page; of agile paging one exit fills the shadow with both.
    everything = 1 if agile else 5
    assert faults(lambda vm: vm.delete_slot(1)) == everything
    assert faults(lambda vm: vm.move_slot(1, 1 << 31)) == everything


def test_what_is_no_change_costs_nothing(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.add_slot(1, 1 << 30, 1 << 20)
    vm.use_nested()
    write = make_rows(sk.Op.WRITE, [0], 1)

    def exits() -> tuple[int, int]:
        before = vm.nested
        vm.run(write)
        after = vm.nested
        assert before is not None
        assert after is not None
        return after.stage_faults - before.stage_faults, after.dirty_faults - before.dirty_faults

    assert exits() == (5, 0)
    vm.move_slot(1, 1 << 30)
    vm.set_dirty_log(0, False)
    vm.set_nx_huge_pages(False)
    assert exits() == (0, 0)
    vm.set_dirty_log(0, True)
    assert exits() == (0, 5), "the tables, too: a walk may set A in them"
    vm.set_dirty_log(0, True)
    assert exits() == (0, 0)
    vm.set_host_pages(0x10000, 0x1000, "absent")
    assert exits() == (1, 0)
    vm.set_nx_huge_pages(True)
    assert exits() == (5, 0)


def test_dirty_logs_as_kvm_keeps_them(one_frame_guest: Callable[[], sk.Vm]) -> None:
    read, write = make_rows(sk.Op.READ, [0]), make_rows(sk.Op.WRITE, [0], 1)
    vm = one_frame_guest()
    vm.use_nested()
    vm.set_dirty_log(0, True)
    vm.run(read)
    assert vm.get_dirty_log(0) == [1, 2, 3, 4, 16], "a page that comes by a load is writable, and counts as written"
    by_hand = one_frame_guest()
    by_hand.use_nested()
    by_hand.run(read)
    by_hand.set_manual_dirty_log(True, True)
    by_hand.set_dirty_log(0, True)
    by_hand.run(write)
    assert by_hand.nested is not None
    assert by_hand.nested.dirty_faults == 0, "KVM_DIRTY_LOG_INITIALLY_SET protects nothing"
    by_hand.clear_dirty_log(0, [16])
    by_hand.run(write)
    by_hand.run(write)
    assert by_hand.nested.dirty_faults == 1


def test_a_table_that_two_roots_share_stays_in_the_shadow_of_the_other(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.write_memory(0x5000, (0x2007).to_bytes(8, "little"))  # another root
    vm.write_memory(0x4008, (0x1067).to_bytes(8, "little"))  # page 1 is the first root
    vm.use_agile(walk_caches=None, nested_tlb=0, warm=True)
    two_stores = make_rows(sk.Op.WRITE, [0x1F00, 0x1F00])
    read, first, other = (
        make_rows([op], value=value) for op, value in ((sk.Op.READ, 0), (sk.Op.CR3, 0x1000), (sk.Op.CR3, 0x5000))
    )

    def walk(load: NDArray[np.void]) -> tuple[int, int]:
        before = vm.nested
        vm.run(np.concatenate([load, read]))
        after = vm.nested
        assert before is not None
        assert after is not None
        return after.shadow_references - before.shadow_references, after.guest_references - before.guest_references

    assert walk(first) == (4, 0)
    assert walk(other) == (4, 0)
    vm.run(np.concatenate([first, two_stores]))
    assert walk(first) == (0, 4), "its root is in nested mode, and a walk does not come back to the shadow"
    assert walk(other) == (1, 3), "the stores walked in the shadow of the first root last, so its tables went with it"


def test_a_warm_second_stage_of_any_size(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.add_slot(1, 1 << 40, 1 << 41)
    vm.use_nested(warm=True)
    vm.notifier_unmap(1 << 40, 1 << 41)
    assert len(pickle.dumps(vm)) < 100_000, "the range, not its pages"


def test_single_instructions_and_late_changes_are_refused(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.use_nested()
    with pytest.raises(sk.ConfigError, match=r"by Vm\.run only"):
        vm.vcpus[0].read(0)
    assert copy.copy(vm).nested is None
    late = one_frame_guest()
    late.vcpus[0].read(0)
    with pytest.raises(sk.ConfigError, match="has run under the shadow already"):
        late.use_nested()


@pytest.mark.parametrize(
    ("setup", "text"),
    [
        ({"page_size": 8192}, "page_size 8192"),
        ({"ways": 7}, "7 ways do not divide"),
        ({"nested_tlb": -1}, "nested_tlb"),
    ],
)
def test_impossible_setups_are_refused(setup: dict[str, Any], text: str, one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    with pytest.raises(sk.ConfigError, match=text):
        vm.use_nested(**setup)
    assert vm.nested is None


def test_a_slot_of_any_size_comes_and_goes_at_once(one_frame_guest: Callable[[], sk.Vm]) -> None:
    for warm in (False, True):
        vm = one_frame_guest()
        vm.use_nested(warm=warm)
        vm.add_slot(1, 1 << 40, 1 << 41)
        vm.run(make_rows(sk.Op.READ, [0]))
        vm.delete_slot(1)
        assert vm.nested is not None
        assert vm.nested.stage_faults == (0 if warm else 5)
        vm.run(make_rows(sk.Op.READ, [0]))
        assert vm.nested.stage_faults == (5 if warm else 10), "a warm second stage is cold after it"


@pytest.mark.parametrize(
    ("setup", "text"), [({"interval": 0}, "at least 1 row"), ({"roots": -1}, "roots"), ({"page_size": 1}, "page_size")]
)
def test_impossible_setups_of_agile_paging(
    setup: dict[str, Any], text: str, one_frame_guest: Callable[[], sk.Vm]
) -> None:
    vm = one_frame_guest()
    with pytest.raises(sk.ConfigError, match=text):
        vm.use_agile(**setup)
    assert vm.nested is None
