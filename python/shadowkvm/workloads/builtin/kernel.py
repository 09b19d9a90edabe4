"""Workloads in which the guest's kernel is what changes: its own half, the page cache, devices, an inner hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from shadowkvm.guest import Linux, Mm, pages
from shadowkvm.ops import Op
from shadowkvm.workloads.builtin.common import MIB, PAGE, begin, host_step, resident, some, step, use
from shadowkvm.workloads.parameter import Parameter, Values
from shadowkvm.workloads.step import START, Step
from shadowkvm.workloads.workload import Workload

__all__ = ["KERNEL"]

_AT_ONCE: Final = 64
_DEVICE: Final = 1 << 32
_L2_BASE: Final = 1 << 30


def kernel_map_change(guest: Linux, p: Values) -> Iterator[Step]:
    program = guest.program(text=8, data=4, bss=4)
    processes = [begin(guest, program, start=False) for _ in range(p.processes)]
    guest.start()
    for process in processes:
        guest.switch(process)
        yield use(guest, process)
    for number in range(p.changes):
        gva = guest.vmalloc(p.pages)
        guest.kernel_access(pages(gva, p.pages), write=True)
        guest.vfree(gva, p.pages)
        yield step(guest, "change", units=1)
        process = processes[(number + 1) % p.processes]
        guest.switch(process)
        guest.touch(process, pages(guest.layout.program, 8), fetch=True)
        yield step(guest, "switch")


def page_cache_scan(guest: Linux, p: Values) -> Iterator[Step]:
    program = guest.program(text=8, data=4, bss=4)
    processes = [begin(guest, program, start=False) for _ in range(p.processes)]
    file = guest.file(p.pages)
    areas = []
    for process in processes:
        guest.switch(process)
        areas.append(guest.mmap(process, p.pages * PAGE, file=file, write=False, shared=True))
    guest.start()
    yield use(guest, processes[-1])
    for _ in range(p.passes):
        for process, area in zip(processes, areas, strict=True):
            guest.switch(process)
            guest.touch(process, pages(area.start, p.pages))
            yield step(guest, "scan", units=p.pages)
        guest.age(file)
        yield step(guest, "age")
        count = round(p.pages * p.reclaimed)
        guest.reclaim(file, np.sort(guest.random.permutation(p.pages)[:count]))
        yield step(guest, "reclaim")


def mmio_poll(guest: Linux, p: Values) -> Iterator[Step]:
    begin(guest, start=False)
    device = guest.ioremap(max(_DEVICE, guest.settings.memory) if guest.memory.mode.entry_bytes == 8 else 0xFE00_0000)
    guest.start()
    guest.kernel_access(np.array([device], np.uint64), device=True)
    yield step(guest, START)
    for first in range(0, p.polls, p.every):
        count = min(p.every, p.polls - first)
        guest.kernel_access(np.full(count, device, np.uint64), device=True, write=p.write)
        yield step(guest, "poll", units=count)
        if p.slots:
            # A memslot comes and goes, as with a BAR that is moved or memory that is plugged: MMIO entries are stale.
            slot_gpa = 1 << 34
            yield host_step(guest, "slot", "add_slot", 1, slot_gpa, 2 * MIB)
            yield host_step(guest, "slot", "delete_slot", 1)


def nested_tables(guest: Linux, p: Values) -> Iterator[Step]:
    hypervisor = begin(guest, start=False)
    inner = [L2(guest, p.pages) for _ in range(p.spaces)]
    for space in inner:
        space.fill(p.pages // 2)
    guest.start()
    yield use(guest, hypervisor)
    for number in range(p.exits):
        space = inner[int(guest.random.integers(p.spaces))]
        with guest.syscall(hypervisor, "vcpu_run"):
            space.fill(p.entries)
            space.drop(p.entries // 2)
            if p.zap_every and number % p.zap_every == p.zap_every - 1:
                space.drop(p.pages)
                space.fill(p.pages // 2)
            # Into L2: its shadow tables, made by L1, are what CR3 names; and out again.
            guest.emit(guest.cpu.load(space.mm))
            space.run(p.touched)
            guest.emit(guest.cpu.load(hypervisor.mm))
        yield step(guest, "exit", units=1)


class L2:
    """The tables that an inner hypervisor keeps for its own guest: to the outer one an address space like any other."""

    def __init__(self, guest: Linux, count: int) -> None:
        self._guest, self._count = guest, count
        self.mm: Mm = guest.new_mm()
        self._frames = guest.memory.frames.take(count)
        self._mapped: set[int] = set()

    def fill(self, count: int) -> None:
        """Map pages that are not mapped, by chance."""
        free = np.array(sorted(set(range(self._count)) - self._mapped), np.int64)
        chosen = self._guest.random.permutation(free)[:count]
        with self._guest.stores():
            for page in chosen.tolist():
                gva = _L2_BASE + page * PAGE
                self.mm.space.map(gva, int(self._frames[page]) << 12, PAGE, user=True)
        self._mapped |= set(chosen.tolist())

    def drop(self, count: int) -> None:
        """Unmap mapped pages, by chance; nobody flushes: the CR3 load will."""
        chosen = self._guest.random.permutation(np.array(sorted(self._mapped), np.int64))[:count]
        with self._guest.stores():
            for page in chosen.tolist():
                self.mm.space.unmap(_L2_BASE + page * PAGE, PAGE, tables=False)
        self._mapped -= set(chosen.tolist())

    def run(self, count: int) -> None:
        """The inner guest uses what is mapped."""
        chosen = self._guest.random.permutation(np.array(sorted(self._mapped), np.uint64))[:count]
        self._guest.act(
            Op.READ, np.uint64(_L2_BASE) + chosen * np.uint64(PAGE), size=self._guest.memory.mode.word, flags=1
        )


def live_migration(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    area = resident(guest, shell, p.memory_pages)
    guest.start()
    guest.touch(shell, pages(area.start, p.memory_pages), write=True)
    yield use(guest, shell)
    yield host_step(guest, "log on", "set_dirty_log", 0, True)  # noqa: FBT003 -- as Vm.set_dirty_log has it
    for _ in range(p.rounds):
        guest.touch(shell, some(guest, area, p.dirtied), write=True)
        yield step(guest, "round", units=1)
        yield host_step(guest, "get log", "get_dirty_log", 0)
    yield host_step(guest, "log off", "set_dirty_log", 0, False)  # noqa: FBT003
    guest.touch(shell, pages(area.start, p.memory_pages), write=True)
    yield step(guest, "after")


KERNEL: Final = (
    Workload(
        name="kernel_map_change",
        summary="the kernel maps and unmaps memory of its own while processes exist",
        stresses=(
            "Tables that all address spaces share: a store to a page table of the vmalloc area makes it unsync under "
            "every root, so the next CR3 load, whoever's it is, looks for it and compares it."
        ),
        look_for=(
            "mmu_unsync: up in phase change, down in phase switch: who comes next pays for the comparison",
            "phase change: one fault for the table, one for each page: prefetch stops where vfree left holes",
            "lazy_vfree=0: addresses come back at once, and one fault brings all pages of a change",
        ),
        body=kernel_map_change,
        parameters=(
            Parameter("processes", "processes that take turns", 8, low=1, high=1024),
            Parameter("pages", "pages mapped by each change", 4, low=1, high=4096),
            Parameter("changes", "changes", 200, low=1, scaled=True),
        ),
        unit="change",
        work=lambda p: float(p.changes),
    ),
    Workload(
        name="page_cache_scan",
        summary="mapped files are read, aged and reclaimed",
        stresses=(
            "Fault-around (16 entries stored for one fault), bits A that the kernel clears without a flush, and "
            "reclaim, which takes entries away under all who map the file."
        ),
        look_for=(
            "phase scan: pf_guest of one for each 16 pages; io_exits where pages had been reclaimed",
            "phase age: stores into page tables, free once the tables are unsync",
            "second pass: entries without A are not prefetched: one fault for each page, not for each eight",
        ),
        body=page_cache_scan,
        parameters=(
            Parameter("pages", "pages of the file", 2048, low=16, high=1 << 20),
            Parameter("processes", "processes that map it", 2, low=1, high=256),
            Parameter("reclaimed", "part that is dropped after each pass", 0.25, low=0.0, high=1.0),
            Parameter("passes", "times everybody reads all of it", 2, low=1, scaled=True),
        ),
        unit="page",
        work=lambda p: float(p.passes * p.processes * p.pages),
    ),
    Workload(
        name="mmio_poll",
        summary="a driver polls a register of a device",
        stresses=(
            "MMIO entries: the first access makes one, the others are told by it at once, without a walk of the "
            "guest's tables. Each change of the memslots makes all of them stale."
        ),
        look_for=(
            "mmio_exits and insn_emulation: one for each poll; x_mmio_faults: those that the entry answered",
            "pf_mmio_spte_created: 1, or one for each change of the slots",
            "slots=true: mmu_shadow_zapped in phase slot, because deleting a slot zaps everything",
        ),
        body=mmio_poll,
        parameters=(
            Parameter("polls", "accesses", 1000, low=1, scaled=True),
            Parameter("write", "stores, not loads", default=False),
            Parameter("every", "polls between two changes of the slots", 100, low=1),
            Parameter("slots", "change the memslots at all", default=False),
        ),
        unit="poll",
        work=lambda p: float(p.polls),
    ),
    Workload(
        name="nested_tables",
        summary="an inner hypervisor with shadow tables of its own, on top of ours",
        stresses=(
            "Tables that churn by themselves: at each exit of its guest the inner hypervisor stores a few entries, "
            "now and then clears them all, and loads CR3 twice. The table goes unsync and is compared at once."
        ),
        look_for=(
            "exits: the two CR3 loads, one fault for the table, and those of pages that are new",
            "pages=4096: the comparison costs by the present entry, not by the changed one",
            "zap_every=10: clearing everything is cheap, filling it again is not",
        ),
        body=nested_tables,
        parameters=(
            Parameter("spaces", "address spaces of the inner guest", 4, low=1, high=256),
            Parameter("pages", "pages of each", 256, low=4, high=1 << 16),
            Parameter("entries", "entries stored at each exit", 4, low=0, high=512),
            Parameter("touched", "pages that the inner guest uses between two exits", 16, low=0),
            Parameter("zap_every", "exits between two times that all entries are cleared; 0: never", 50, low=0),
            Parameter("exits", "exits of the inner guest", 200, low=1, scaled=True),
        ),
        unit="inner exit",
        work=lambda p: float(p.exits),
    ),
    Workload(
        name="live_migration",
        summary="dirty-log rounds of a migration while the guest goes on writing",
        stresses=(
            "Write protection by the host: turning the log on takes W from every shadow entry, each GET_DIRTY_LOG "
            "from those that were written since, and the next store to each page is a fault."
        ),
        look_for=(
            "phase round: pf_fixed of one for each page dirtied; no prefetch while the log is on",
            "frames in dirty logs: as many as were dirtied",
            "phase after: the log is off, but what is still read-only in the shadow faults once more",
        ),
        body=live_migration,
        parameters=(
            Parameter("memory_pages", "pages that the guest has", 2048, low=1, high=1 << 20),
            Parameter("dirtied", "pages written in each round", 256, low=0),
            Parameter("rounds", "rounds", 10, low=1, scaled=True),
        ),
        unit="round",
        work=lambda p: float(p.rounds),
    ),
)
