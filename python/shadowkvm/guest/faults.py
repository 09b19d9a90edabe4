"""Handlers of page faults: for each kind what the kernel stores, and where.

Rules of Linux 6.1, mm/memory.c: ``do_anonymous_page``, ``do_read_fault`` with ``do_fault_around``, ``do_cow_fault``,
``do_shared_fault``, ``do_wp_page``; mm/huge_memory.c: ``do_huge_pmd_anonymous_page``, ``do_huge_pmd_wp_page``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.guest.classify import WINDOW, Batch, Kind
from shadowkvm.guest.machine import PAGE_FAULT, Settings
from shadowkvm.guest.scheduler import Scheduler
from shadowkvm.guest.task import ABSENT, File, Process, Vma
from shadowkvm.ops import PAGE_SIZE, Flag, Op
from shadowkvm.pagetables import make_rows
from shadowkvm.pagetables.entries import PS, A, D, W

__all__ = ["HUGE", "REMOTE", "Handlers"]

_SHIFT: Final = np.uint64(12)
_FRAME: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_HUGE_PAGES: Final = 512
HUGE: Final = _HUGE_PAGES * PAGE_SIZE
REMOTE: Final = 128
"""Added to the CPU of a batch's rows that another CPU than the batch's own carries out."""


class Handlers(Scheduler):
    """A kernel that answers page faults. Every method adds rows to a batch, and changes tables and counts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.refs = np.zeros(settings.memory >> 12, np.int32)
        """How many entries and caches hold each frame."""
        self.zero = int(self.memory.frames.take()[0])
        """The zero page."""

    # -- parts of every fault ---------------------------------------------------------------------------------------

    def column(self, batch: Batch, stores: NDArray[np.void], at: NDArray[np.int64]) -> None:
        """Give each of these accesses its stores (shape (n, k), ``addr`` = gpa), through the direct map."""
        for part in stores.T:
            batch.weave.add(self.through_direct_map(part.copy()), at)

    def data(self, batch: Batch, op: Op, gfns: NDArray[np.uint64], at: NDArray[np.int64]) -> None:
        """Let the kernel read or overwrite a page of data for each of these accesses, through the direct map."""
        flags = Flag(0) if op == Op.READ else Flag.KEEP
        rows = make_rows(op, self.direct(gfns << _SHIFT), size=self.memory.mode.word, flags=flags)
        batch.weave.add(rows, at)

    def enter_faults(self, batch: Batch, user: NDArray[np.void]) -> None:
        """The accesses that fault, their error codes, delivery, entry into the kernel, and the tables they need."""
        at, found, cpu = batch.events, batch.found, self.cpu
        code = 4 + 2 * batch.written[at] + found.present[at]
        fetch = user["op"][0] == Op.FETCH and self.memory.mode.nx
        rows = user[at]
        rows["flags"] |= int(Flag.FAULTS)
        rows["value"] = code + (16 if fetch else 0)
        batch.weave.add(rows, at)
        for row in (*cpu.delivery(PAGE_FAULT), *cpu.enter(batch.process.kernel_stack, PAGE_FAULT)):
            batch.weave.add(np.atleast_1d(row), at)
        small = at[(batch.kind[at] != Kind.HUGE) & (batch.kind[at] != Kind.HUGE_WP)]
        self._make_tables(batch, small)
        slots = self.slots(batch.process, batch.pages(small))
        read = make_rows(Op.READ, self.direct(slots), size=self.memory.mode.word)
        batch.weave.add(read, small)

    def _make_tables(self, batch: Batch, at: NDArray[np.int64]) -> None:
        missing = at[batch.found.level[at] > 1]
        span = batch.process.space.mode.level(2).size
        bases, first = np.unique(batch.gvas[missing] // np.uint64(span), return_index=True)
        for base, event in sorted(zip(bases.tolist(), missing[first].tolist(), strict=True), key=lambda pair: pair[1]):
            with self.memory.logging() as log:
                batch.process.space.ensure(base * span, base * span + 1)
            batch.weave.add_block(event, self.through_direct_map(log.rows()))

    def slots(self, process: Process, pages: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The last-level entries that map these pages: gpas."""
        return process.space.walk(pages).slot

    def leave_faults(self, batch: Batch, flushed: NDArray[np.int64]) -> None:
        """The way out of the kernel; those that ``flushed`` did so for user code's PCID, too."""
        at = batch.events
        stale = np.isin(at, flushed)
        rest = np.arange(len(at)) > 0
        # The first one also does what was asked for before.
        for where in (~rest, rest & ~stale, rest & stale):
            if stale[where].any():
                self.cpu.flushed(batch.process.mm)
            for row in self.cpu.leave() if where.any() else ():
                batch.weave.add(np.atleast_1d(row), at[where])

    # -- kinds ------------------------------------------------------------------------------------------------------

    def anonymous(self, batch: Batch) -> None:
        """Stores to memory without pages: zeroed frames. Loads: the zero page, read-only."""
        at = batch.of(Kind.ANON)
        gfns = self.memory.frames.take(len(at))
        self.refs[gfns.astype(np.int64)] = 1
        self.data(batch, Op.STORE, gfns, at)
        batch.weave.add(self.note_pages(gfns), at)
        self._map(batch, at, gfns, batch.mappings.write_bits[batch.vma[at]])
        at = batch.of(Kind.ZERO)
        zero = np.full(len(at), self.zero, np.uint64)
        self._map(batch, at, zero, batch.mappings.read_bits[batch.vma[at]])

    def file_writes(self, batch: Batch) -> None:
        """Stores to pages of files: a private copy, or the shared page itself."""
        at = batch.of(Kind.COPY)
        cached = self._cached(batch, at)
        gfns = self.memory.frames.take(len(at))
        self.refs[gfns.astype(np.int64)] = 1
        self.data(batch, Op.READ, cached, at)
        self.data(batch, Op.STORE, gfns, at)
        batch.weave.add(self.note_pages(gfns), at)
        self._map(batch, at, gfns, batch.mappings.write_bits[batch.vma[at]])
        at = batch.of(Kind.SHARED)
        cached = self._cached(batch, at)
        np.add.at(self.refs, cached.astype(np.int64), 1)
        batch.weave.add(self.note_pages(cached), at)
        self._map(batch, at, cached, batch.mappings.write_bits[batch.vma[at]])

    def file_reads(self, batch: Batch) -> None:
        """Loads and fetches from files: all pages of the window that are cached and not mapped yet."""
        at = batch.of(Kind.FILE)
        if not len(at):
            return
        self._cached(batch, at)
        base = batch.gvas[at] >> np.uint64(16) << np.uint64(16)
        for column in range(WINDOW):
            pages = base + np.uint64(column * PAGE_SIZE)
            frames = batch.mappings.cached(batch.vma[at], pages)
            found = batch.process.space.walk(pages)
            wanted = (frames != ABSENT) & ~found.present & (found.level == 1) & (found.entry == 0)
            events, gfns = at[wanted], frames[wanted]
            np.add.at(self.refs, gfns.astype(np.int64), 1)
            batch.weave.add(self.note_pages(gfns), events)
            bits = np.where(
                batch.mappings.shared[batch.vma[events]],
                # Shared memory is writable at once, but not dirty: the CPU's first store sets D.
                batch.mappings.write_bits[batch.vma[events]] & ~np.uint64(D),
                batch.mappings.read_bits[batch.vma[events]],
            )
            self.column(batch, self.memory.write(found.slot[wanted], gfns << _SHIFT | bits, log=False), events)

    def write_protected(self, batch: Batch) -> NDArray[np.int64]:
        """Stores to read-only pages: copied if somebody else has the page, else made writable; who was flushed."""
        at: NDArray[np.int64] = np.union1d(batch.of(Kind.WP), batch.of(Kind.WP_SHARED))
        old = batch.found.entry[at]
        gfns = (old & _FRAME) >> _SHIFT
        alone = (self.refs[gfns.astype(np.int64)] == 1) & (gfns != np.uint64(self.zero))
        alone |= batch.kind[at] == Kind.WP_SHARED
        reused = self.memory.write(batch.found.slot[at[alone]], old[alone] | np.uint64(W | D | A), log=False)
        self.column(batch, reused, at[alone])
        copied: NDArray[np.int64] = at[~alone]
        self._copy(batch, copied, gfns[~alone])
        return copied

    def _copy(self, batch: Batch, at: NDArray[np.int64], old: NDArray[np.uint64]) -> None:
        """wp_page_copy: the new page, the old entry cleared and flushed, the new entry."""
        gfns = self.memory.frames.take(len(at))
        slots = batch.found.slot[at]
        self.refs[gfns.astype(np.int64)] = 1
        real = old != np.uint64(self.zero)
        np.subtract.at(self.refs, old[real].astype(np.int64), 1)
        self.data(batch, Op.READ, old[real], at[real])
        self.data(batch, Op.STORE, gfns, at)
        batch.weave.add(self.note_pages(gfns), at)
        self.column(batch, self.memory.write(slots, 0, Op.XCHG, log=False), at)
        batch.weave.add(make_rows(Op.INVLPG, batch.pages(at)), at)
        self._flush_others(batch, at)
        self._map(batch, at, gfns, batch.mappings.write_bits[batch.vma[at]])

    def _flush_others(self, batch: Batch, at: NDArray[np.int64]) -> None:
        mm = batch.process.mm
        mm.generation += len(at)
        for number in [number for number in mm.cpus if number != self.cpu.number]:
            other = self.cpus[number]
            for event in at.tolist():
                other.flushed(mm)
                for cpu, rows in self.remote_flush(other, batch.pages(np.array([event]))):
                    rows["vcpu"] = REMOTE + cpu.number
                    batch.weave.add_block(event, rows)

    def huge(self, batch: Batch) -> None:
        """First accesses to memory with huge pages: 512 frames, zeroed, and one entry of a page directory."""
        for event in batch.of(Kind.HUGE).tolist():
            process, gva = batch.process, int(batch.gvas[event]) & -HUGE
            gfn = self.memory.frames.take_huge()
            self.refs[gfn : gfn + _HUGE_PAGES] = 1
            gpas = (np.uint64(gfn) + np.arange(_HUGE_PAGES, dtype=np.uint64)) << _SHIFT
            batch.weave.add_block(event, make_rows(Op.STORE, self.direct(gpas), flags=Flag.KEEP))
            bits = int(batch.mappings.write_bits[batch.vma[event]])
            with self.memory.logging() as log:
                process.space.ensure(gva, gva + HUGE, 2)
                slot = process.space.walk([gva]).slot
                self.memory.write(slot, gfn << 12 | bits | PS)
            batch.weave.add_block(event, self.through_direct_map(log.rows()))
        for event in batch.of(Kind.HUGE_WP).tolist():
            # Nobody else has it: whoever touches a shared one splits it first.
            entry = batch.found.entry[event : event + 1] | np.uint64(W | D | A)
            stores = self.memory.write(batch.found.slot[event : event + 1], entry, log=False)
            self.column(batch, stores, np.array([event]))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _map(self, batch: Batch, at: NDArray[np.int64], gfns: NDArray[np.uint64], bits: NDArray[np.uint64]) -> None:
        slots = self.slots(batch.process, batch.pages(at))
        self.column(batch, self.memory.write(slots, gfns << _SHIFT | bits, log=False), at)

    def _cached(self, batch: Batch, at: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The frames of the pages touched, after those that are not in the cache were read with what is around."""
        pages = batch.pages(at)
        for event, page in zip(at.tolist(), pages.tolist(), strict=True):
            area = batch.mappings.vmas[int(batch.vma[event])]
            if area.file is not None and self._read_around(area, area.file, page):
                # The device is told (an exit); its data come by DMA, past the guest's tables.
                batch.weave.add_block(event, make_rows([Op.IO]))
        return batch.mappings.cached(batch.vma[at], pages)

    def _read_around(self, area: Vma, file: File, page: int) -> bool:
        """If a page is not in the cache, bring it and its window (do_sync_mmap_readahead); whether it was not."""
        index = area.page_of(page)
        if file.frames[index] != ABSENT:
            return False
        base = page & -WINDOW * PAGE_SIZE
        first, last = area.page_of(max(base, area.start)), area.page_of(min(base + WINDOW * PAGE_SIZE, area.end) - 1)
        window = np.arange(first, last + 1)
        self.bring(file, window[file.frames[window] == ABSENT])
        return True

    def bring(self, file: File, pages: NDArray[np.int64]) -> None:
        """Give pages of a file frames in the page cache."""
        gfns = self.memory.frames.take(len(pages))
        file.frames[pages] = gfns
        self.refs[gfns.astype(np.int64)] = 1
