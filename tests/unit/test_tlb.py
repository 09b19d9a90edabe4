"""TLB statistics: a model that runs along, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shadowkvm as sk
from shadowkvm.pagetables import make_rows
from shadowkvm.workloads import get


def test_nothing_is_counted_unless_asked_for(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    assert vm.tlb is None
    vm.follow_tlb()
    assert vm.tlb == (0, 0, 0, 0, 0)
    assert sk.TlbStatistics(0, 0, 0, 0, 0).miss_rate == sk.TlbStatistics(0, 0, 0, 0, 0).references_per_miss == 0.0
    vm.follow_tlb(False)
    assert vm.tlb is None


def test_a_pass_over_more_pages_than_entries_misses_always(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    pages = make_rows(sk.Op.READ, np.tile(np.arange(64) << 12, 3))
    for entries, misses in ((64, 64), (32, 192), (0, 192)):
        vm.follow_tlb(entries=entries, ways=None if entries else 1, walk_caches=None)
        vm.run(pages)
        assert vm.tlb is not None
        assert (vm.tlb.accesses, vm.tlb.misses, vm.tlb.references) == (192, misses, 4 * misses)


def test_a_cr3_load_empties_it_and_invlpg_takes_one_page(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.follow_tlb()
    touch = make_rows(sk.Op.READ, np.arange(8) << 12)
    vm.run(np.concatenate((touch, make_rows([sk.Op.CR3], value=[0x1000]), touch)))
    assert vm.tlb is not None
    assert (vm.tlb.misses, vm.tlb.hits) == (16, 0)
    flushes = vm.tlb.flushes
    assert flushes == vm.counters["tlb_flush"] > 0
    before = vm.tlb
    vm.run(np.concatenate((make_rows([sk.Op.INVLPG], [0x3000]), touch)))
    assert vm.tlb.hits - before.hits in {0, 7}  # all of them go if KVM asked for a flush, too
    assert (vm.tlb.hits - before.hits == 0) == (vm.tlb.flushes > flushes)


@pytest.mark.parametrize("name", ["context_switch", "fork_exit", "jit_flip", "page_cache_scan"])
def test_a_workload_comes_to_the_same_with_it(name: str) -> None:
    scenario = get(name).build(scale=0.02)
    plain, followed = scenario.vm(), scenario.vm()
    followed.follow_tlb()
    one, two = scenario.run(plain), scenario.run(followed)
    assert dict(one.counters) == dict(two.counters)
    assert plain.state_hash() == followed.state_hash()
    assert followed.tlb is not None
    assert followed.tlb.accesses == followed.tlb.hits + followed.tlb.misses > 0
    assert followed.tlb.misses <= followed.tlb.references <= 4 * followed.tlb.misses
    assert followed.tlb.flushes <= followed.counters["tlb_flush"]


def test_copies_and_snapshots_hold_none(one_frame_guest: Callable[[], sk.Vm]) -> None:
    vm = one_frame_guest()
    vm.follow_tlb()
    vm.run(make_rows(sk.Op.READ, [0]))
    assert copy.copy(vm).tlb is None
    vm.restore(vm.snapshot())
    assert vm.tlb is not None
    assert vm.tlb.accesses == 1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"entries": 100}, "12 ways do not divide 100"),
        ({"entries": 1 << 24, "ways": None}, "the limit is"),
        ({"walk_caches": (1, 2)}, "three sizes"),
        ({"entries": -1}, "entries"),
    ],
)
def test_impossible_sizes_are_refused_and_change_nothing(
    sizes: dict[str, Any], text: str, one_frame_guest: Callable[[], sk.Vm]
) -> None:
    vm = one_frame_guest()
    vm.follow_tlb()
    with pytest.raises(sk.ConfigError, match=text):
        vm.follow_tlb(**sizes)
    assert vm.tlb == (0, 0, 0, 0, 0)
