"""Many vCPUs: shared roots, requests to all, and an order that the trace's rows alone decide."""

from __future__ import annotations

import numpy as np
import pytest
from tests.guest import guest

import shadowkvm as sk

MANY = 64


def test_a_root_is_shared_and_counted() -> None:
    vm = guest(vcpus=MANY)
    for cpu in vm.vcpus:
        assert cpu.read(0x5000).status == "done"
    (root,) = {view.page.id: view.page for view in vm.shadow().roots if view.page}.values()
    assert root.root_count == MANY
    assert vm.counters["pf_taken"] == 1  # all others find what the first one had made
    assert vm.counters["mmu_cache_miss"] == 4
    vm.audit()


def test_a_flush_request_reaches_every_vcpu() -> None:
    vm = guest(vcpus=MANY)
    for cpu in vm.vcpus:
        cpu.write(0x5000, 1)
    before = [cpu.counters["tlb_flush"] for cpu in vm.vcpus]
    vm.set_dirty_log(0, True)
    for cpu in vm.vcpus:
        cpu.read(0x5000)
    assert [cpu.counters["tlb_flush"] - old for cpu, old in zip(vm.vcpus, before, strict=True)] == [1] * MANY
    assert vm.counters["remote_tlb_flush_requests"] == 1


def test_a_zapped_root_is_let_go_by_each_vcpu_at_its_next_entry() -> None:
    vm = guest(vcpus=MANY)
    for cpu in vm.vcpus:
        cpu.read(0x5000)
    vm.add_slot(1, 1 << 30, 4096)
    vm.delete_slot(1)
    counts = []
    for cpu in vm.vcpus:
        cpu.read(0x5000)
        counts.append(sorted(page.root_count for page in vm.shadow().pages if page.root_count))
    assert counts[0] == [1, MANY - 1]
    assert counts[-1] == [MANY]
    vm.audit()


@pytest.mark.parametrize("seed", range(3))
def test_the_vcpu_column_is_the_interleaving(seed: int) -> None:
    """A run is a loop over its rows, whichever vCPU each names, and gives the same every time."""
    random = np.random.default_rng(seed)
    rows = np.zeros(2000, sk.TRACE_DTYPE)
    rows["op"] = random.choice([sk.Op.READ, sk.Op.WRITE, sk.Op.CR3, sk.Op.INVLPG], len(rows), p=[0.5, 0.4, 0.05, 0.05])
    rows["size"], rows["vcpu"] = 8, random.integers(0, MANY, len(rows))
    rows["addr"] = random.integers(0, 256, len(rows)) << 12
    rows["value"] = np.where(rows["op"] == sk.Op.CR3, 0x1000, rows["addr"] | 0x67)

    def run(pieces: int) -> tuple[object, ...]:
        vm = guest(vcpus=MANY, events=True)
        for piece in np.array_split(rows, pieces):
            vm.run(piece)
        vm.audit()
        each = [tuple(cpu.counters.items()) for cpu in vm.vcpus]
        return vm.counter_values(), each, vm.event_text(), vm.shadow_pages(), vm.roots()

    assert run(1) == run(1) == run(2000)
