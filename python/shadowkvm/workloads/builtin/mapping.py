"""Workloads of one process that changes its mappings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from shadowkvm.guest import Linux, pages
from shadowkvm.workloads.builtin.common import MIB, PAGE, begin, resident, some, step, use
from shadowkvm.workloads.parameter import Parameter, Values
from shadowkvm.workloads.step import Step
from shadowkvm.workloads.workload import Workload

__all__ = ["MAPPING"]


def mmap_cycle(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest)
    yield use(guest, shell)
    for _ in range(cycles(p)):
        area = guest.mmap(shell, p.chunk)
        guest.touch(shell, pages(area.start, area.pages), write=p.write)
        yield step(guest, "touch")
        guest.munmap(shell, area.start, p.chunk)
        yield step(guest, "unmap", units=1)


def cycles(p: Values) -> int:
    return -(-int(p.total) // int(p.chunk))


def jit_flip(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    areas = [resident(guest, shell, p.pages) for _ in range(p.regions)]
    for area in areas:
        guest.mprotect(shell, area.start, p.pages * PAGE, execute=True)
    guest.start()
    for area in areas:
        guest.touch(shell, pages(area.start, p.pages), fetch=True)
    yield use(guest, shell)
    for number in range(p.flips):
        start, size = areas[number % p.regions].start, p.pages * PAGE
        guest.mprotect(shell, start, size, write=True)
        guest.touch(shell, pages(start, p.pages), write=True)
        yield step(guest, "write")
        guest.mprotect(shell, start, size, execute=True)
        guest.touch(shell, pages(start, p.pages), fetch=True)
        yield step(guest, "execute", units=1)


def gc_compaction(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    heap = resident(guest, shell, p.heap)
    guest.start()
    yield use(guest, shell, pages(heap.start, p.heap))
    for _ in range(p.cycles):
        alive = max(1, round(p.heap * p.live))
        target = guest.mmap(shell, p.heap * PAGE, read=False, write=False)
        yield step(guest, "protect")
        sources = some(guest, heap, alive)
        for number, source in enumerate(sources.tolist()):
            # A mutator runs into a page that was not compacted yet: the trap opens it, and copies.
            page = target.start + number * PAGE
            guest.trap(shell, [page])
            guest.mprotect(shell, page, PAGE, write=True)
            guest.touch(shell, [source])
            guest.touch(shell, [page], write=True)
        yield step(guest, "evacuate", units=alive)
        guest.munmap(shell, heap.start, p.heap * PAGE)
        guest.mprotect(shell, target.start, p.heap * PAGE, write=True)
        yield step(guest, "release")
        heap = shell.vma(target.start)
        guest.touch(shell, pages(heap.start, p.heap), write=True)
        yield step(guest, "allocate")


def pde_flood(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest)
    span = guest.memory.mode.level(2).size
    yield use(guest, shell)
    for _ in range(p.rounds):
        area = guest.mmap(shell, p.tables * span)
        guest.touch(shell, pages(area.start, p.tables, span), write=True)
        yield step(guest, "link")
        # All entries of the page directory are cleared in a row, and nobody uses it in between.
        guest.munmap(shell, area.start, p.tables * span)
        yield step(guest, "unlink", units=p.tables)


def huge_pages(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest)
    yield use(guest, shell)
    size = p.pages * 2 * MIB
    for _ in range(p.cycles):
        area = guest.mmap(shell, size, huge=True)
        guest.touch(shell, pages(area.start, p.pages * 512), write=True)
        yield step(guest, "touch")
        if p.split:
            # One small page in the middle of each huge one is made read-only: Linux splits.
            for number in range(p.pages):
                guest.mprotect(shell, area.start + number * 2 * MIB + MIB, PAGE)
            guest.touch(shell, pages(area.start, p.pages * 512))
            yield step(guest, "split")
        guest.munmap(shell, area.start, size)
        yield step(guest, "unmap", units=p.pages)


def working_set(guest: Linux, p: Values) -> Iterator[Step]:
    shell = begin(guest, start=False)
    area = resident(guest, shell, p.pages)
    guest.start()
    yield use(guest, shell, pages(area.start, p.pages))
    for _ in range(p.rounds):
        chosen = guest.random.integers(0, p.pages, p.accesses).astype(np.uint64)
        guest.touch(shell, np.uint64(area.start) + chosen * np.uint64(PAGE))
        yield step(guest, "access", units=0 if p.changes else 1)
        for page in some(guest, area, p.changes).tolist():
            guest.madvise_dontneed(shell, page, PAGE)
            guest.touch(shell, [page], write=True)
        if p.changes:
            yield step(guest, "change", units=1)


MAPPING: Final = (
    Workload(
        name="mmap_cycle",
        summary="memory is mapped, touched, unmapped, again and again",
        stresses=(
            "Demand faults: each first touch is a #PF exit that is reflected to the guest, and one more that maps the "
            "page. The guest's stores to its page table are free, as the table is unsync; munmap clears all entries, "
            "and the flush and two emulated stores above them are its only exits. With reuse_gpa the same frames come "
            "back, so that what the host has behind them is warm."
        ),
        look_for=(
            "pf_guest: one for each page; pf_taken: two, and one more for each 8 pages of the direct map (zeroing)",
            "phase unmap: a handful of exits, however many pages; with chunk=128K one INVLPG for each page",
            "reuse_gpa=false host=absent: no prefetch of pages that the host does not have yet",
            "policy no_unsync: two more exits for each page, one for each store to its entry",
        ),
        body=mmap_cycle,
        parameters=(
            Parameter("total", "bytes mapped in all", 64 * MIB, low=PAGE, scaled=True, unit="bytes"),
            Parameter("chunk", "bytes mapped at once", 2 * MIB, low=PAGE, high=1 << 30, unit="bytes"),
            Parameter("reuse_gpa", "the next chunk gets the same frames", default=True),
            Parameter("write", "stores; else loads, which get the zero page", default=True),
        ),
        unit="chunk",
        work=cycles,
        fixed=("reuse",),
        settings=lambda p: {"reuse": "lifo" if p.reuse_gpa else "fifo"},
    ),
    Workload(
        name="jit_flip",
        summary="a just-in-time compiler: pages are made writable, written, made executable, run",
        stresses=(
            "mprotect under W^X: each flip stores the entries of a few pages twice (XCHG, MOV) and flushes them one "
            "by one. The table is unsync all the time, and INVLPG drops the shadow entry and fetches it again, so "
            "that no fault follows."
        ),
        look_for=(
            "invlpg: two for each page and flip, and no other exit; each is a TLB flush, too",
            "pf_guest is 0: pages that the program alone has become writable without a fault",
            "pages=64: beyond flush_ceiling one CR3 load replaces 64 INVLPG; the next store to the table faults",
        ),
        body=jit_flip,
        parameters=(
            Parameter("regions", "regions of code", 4, low=1, high=512),
            Parameter("pages", "pages of each", 8, low=1, high=4096),
            Parameter("flips", "flips in all, there and back", 200, low=1, scaled=True),
        ),
        unit="flip",
        work=lambda p: float(p.flips),
    ),
    Workload(
        name="gc_compaction",
        summary="a compacting collector: live pages are moved under page protection",
        stresses=(
            "Protection traps, and mappings cut into pieces: the new heap begins without rights, each first access "
            "traps to the program, which opens the page (mprotect) and copies into it; at the end the old heap is "
            "unmapped."
        ),
        look_for=(
            "phase evacuate: pf_guest of two for each live page, the trap and the new page; pf_taken about three",
            "phase release: all entries are cleared, the table is unsync: two exits or so",
            "phase allocate: pages that nobody copied are touched for the first time",
        ),
        body=gc_compaction,
        parameters=(
            Parameter("heap", "pages of the heap", 128, low=2, high=8192),
            Parameter("live", "part of them that survives", 0.4, low=0.01, high=1.0),
            Parameter("cycles", "collections", 4, low=1, scaled=True),
        ),
        unit="live page",
        work=lambda p: float(p.cycles * max(1, round(p.heap * p.live))),
    ),
    Workload(
        name="pde_flood",
        summary="many entries of a page directory are stored in a row",
        stresses=(
            "Write flooding: a page directory is write-tracked and each store to it is emulated; the third without a "
            "use in between zaps its shadow page and all unsync tables below. Linux stores in a row when it unmaps a "
            "wide, sparse range: pmd_clear for each page table."
        ),
        look_for=(
            "phase unlink: two stores emulated, the third zaps (mmu_flooded), the others meet an ordinary page",
            "phase link: one emulated store for each table; each is followed by a use, so that nothing floods",
            "phase unlink: pf_fixed of one for each table, which goes unsync when its own entry is cleared",
            "policy zap_on_write: shadow pages made and zapped for each table",
        ),
        body=pde_flood,
        parameters=(
            Parameter("tables", "page tables, side by side", 64, low=1, high=2048),
            Parameter("rounds", "times", 20, low=1, scaled=True),
        ),
        unit="table",
        work=lambda p: float(p.rounds * p.tables),
    ),
    Workload(
        name="huge_pages",
        summary="huge pages of the guest: mapped, touched, split, unmapped",
        stresses=(
            "Large guest pages on small host pages: the shadow cuts each into 512 entries of a direct page, made "
            "eight at a time. An entry of a huge page is in a page directory: storing it is emulated. With "
            "host=huge-2m one shadow entry serves 2 MiB."
        ),
        look_for=(
            "phase touch: 64 faults for each huge page, 64 for the zeroing; with host=huge-2m one or two",
            "phase split: the new table is filled by 512 stores for nothing, and linked by one that is emulated",
            "pf_guest: one for each huge page",
        ),
        body=huge_pages,
        parameters=(
            Parameter("pages", "huge pages (2 MiB) at once", 4, low=1, high=1024),
            Parameter("cycles", "times", 10, low=1, scaled=True),
            Parameter("split", "make a small page in each read-only, so that it is split", default=True),
        ),
        unit="huge page",
        work=lambda p: float(p.cycles * p.pages),
    ),
    Workload(
        name="working_set",
        summary="a large working set is read by chance, and now and then a page of it is replaced",
        stresses=(
            "TLB misses against exits: no load exits once the shadow is built, but few are in the TLB, and each miss "
            "is a walk, of four entries under shadow paging and of up to 24 under nested paging. Each page that is "
            "given back and touched again (MADV_DONTNEED) costs shadow paging a handful of exits. Which of the two is "
            "dearer is a matter of how many changes there are for each access."
        ),
        look_for=(
            "compare --mmu shadow,nested:warm: page walks against exits; at some number of changes they are even",
            "changes=0: no exit but those of phase start",
            "phase change: INVLPG, the guest's #PF, the shadow's, and one for the zeroing, for each page",
        ),
        body=working_set,
        parameters=(
            Parameter("pages", "pages of the working set", 16384, low=1, high=1 << 20),
            Parameter("accesses", "loads of a round, each of a page chosen by chance", 20_000, low=1, high=10_000_000),
            Parameter("changes", "pages replaced after them", 4, low=0, high=4096),
            Parameter("rounds", "times", 20, low=1, scaled=True),
        ),
        unit="round",
        work=lambda p: float(p.rounds),
    ),
)
