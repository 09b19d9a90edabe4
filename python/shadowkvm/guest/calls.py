"""Calls: mmap, munmap, mprotect, mremap, madvise.

Rules of Linux 6.1: mm/mmap.c, mm/mprotect.c, mm/mremap.c, mm/madvise.c; ``zap_pte_range``; mm/mmu_gather.c: entries are
cleared, tables unlinked, then one flush, and only then frames are free.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.guest.faults import HUGE
from shadowkvm.guest.paging import Paging
from shadowkvm.guest.task import File, Mm, Process, Vma
from shadowkvm.ops import PAGE_SIZE, Op
from shadowkvm.pagetables import AddressSpace
from shadowkvm.pagetables.entries import NX, PROTNONE, D, P, W
from shadowkvm.pagetables.memory import interleave

__all__ = ["Calls"]

_SHIFT: Final = np.uint64(12)


class Calls(Paging):
    """A machine whose processes can change their mappings."""

    def mmap(
        self,
        process: Process,
        size: int,
        *,
        gva: int | None = None,
        read: bool = True,
        write: bool = True,
        execute: bool = False,
        file: File | None = None,
        offset: int = 0,
        shared: bool = False,
        huge: bool = False,
    ) -> Vma:
        """Map memory; nothing is there before it is touched.

        Args:
            process: for whom.
            size: bytes, a multiple of 4,096 (``huge``: of 2 MiB).
            gva: where; None: where there is room, from the top down.
            read, write, execute: rights.
            file, offset: of which file, from which page; None: anonymous memory.
            shared: stores are seen by everybody who maps the file, and by children.
            huge: anonymous memory in 2 MiB pages.

        Raises:
            ConfigError: a size or address that cannot be, or something is mapped there.
        """
        unit = HUGE if huge else PAGE_SIZE
        if size <= 0 or size % unit:
            raise ConfigError(f"mmap: size {size:#x} is not a multiple of {unit:#x} above 0")
        if huge and (file is not None or shared or self.memory.mode.entry_bytes == 4):
            raise ConfigError("mmap: huge pages are for private anonymous memory, in modes with 2 MiB pages")
        start = process.mm.room(size, unit) if gva is None else gva
        if start % unit or not 0 < start <= start + size <= self.memory.mode.user_half:
            raise ConfigError(f"mmap: {start:#x} is no place for {size:#x} bytes")
        if file is None and shared:
            # Anonymous memory that is shared is a file without a name (shmem).
            file = self.file(size // PAGE_SIZE, "shmem")
            file.unnamed = True
        if file is not None and not 0 <= offset <= offset + size // PAGE_SIZE <= file.pages:
            raise ConfigError(f"mmap: pages {offset} to {offset + size // PAGE_SIZE} of a file of {file.pages}")
        vma = Vma(start, start + size, read, write, execute, file, offset, shared=shared, huge=huge)
        with self.syscall(process, "mmap"):
            process.mm.insert(vma)
        return vma

    def munmap(self, process: Process, gva: int, size: int) -> None:
        """Take mappings down: entries cleared, tables that only they used unlinked, flush, frames freed."""
        start, end = self._span("munmap", gva, size)
        mm = process.mm
        with self.syscall(process, "munmap"):
            gone = mm.inside(start, end)
            if not gone:
                return
            for vma in gone:
                mm.remove(vma)
            first, last = gone[0].start, gone[-1].end
            gather = Gather(self, mm)
            gather.zap(first, last)
            gather.free_tables(first, last)
            gather.finish(first, last)
            self.forget(gone)

    def madvise_dontneed(self, process: Process, gva: int, size: int) -> None:
        """Give the pages back; the mappings and their tables stay (``MADV_DONTNEED``)."""
        start, end = self._span("madvise", gva, size)
        with self.syscall(process, "madvise"):
            gather = Gather(self, process.mm)
            gather.zap(start, end)
            gather.finish(start, end)

    def mprotect(
        self, process: Process, gva: int, size: int, *, read: bool = True, write: bool = False, execute: bool = False
    ) -> None:
        """Change rights. Each entry is cleared and stored; then a flush, unless rights were only added.

        A private page that the process alone has and that is dirty becomes writable at once, others at their next
        store (``can_change_pte_writable``).
        """
        start, end = self._span("mprotect", gva, size)
        with self.syscall(process, "mprotect"):
            areas = process.mm.inside(start, end)
            lost = False
            for vma in areas:
                lost |= self._change(process.space, vma, read=read, write=write, execute=execute)
                vma.read, vma.write, vma.execute = read, write, execute
                process.mm.changed()
            if lost and areas:
                self.flush_user(process.mm, areas[0].start, areas[-1].end)
            process.mm.merge(start, end)

    def _change(self, space: AddressSpace, vma: Vma, *, read: bool, write: bool, execute: bool) -> bool:
        """Store the entries of one mapping anew; whether one of them lost a right."""
        self.split_ends(space, vma.start, vma.end)
        found = space.leaves(vma.start, vma.end, hidden=True)
        slots = found["slot"].copy()
        if not len(slots):
            return False
        old = self.memory.read(slots)
        gfns = (found["gpa"] >> _SHIFT).astype(np.int64)
        new = old & ~np.uint64(W | NX | P | PROTNONE) | np.uint64(P if read else PROTNONE)
        if self.memory.mode.nx and not execute:
            new |= np.uint64(NX)
        if write:
            mine = (old & np.uint64(D) != 0) & (self.refs[gfns] == 1) & (gfns != self.zero)
            new = np.where(mine | np.full(len(old), vma.shared), new | np.uint64(W), new)
        cleared = self.memory.write(slots, 0, Op.XCHG, log=False)
        stores = interleave(cleared, self.memory.write(slots, new, log=False))
        self.emit(self.through_direct_map(stores))
        # pte_flags_need_flush: what was not present needs none, nor does what only gains rights.
        lost = (old & ~new & np.uint64(W | P)) | (new & ~old & np.uint64(NX))
        return bool((lost[old & np.uint64(P) != 0] != 0).any())

    def mremap(self, process: Process, vma: Vma, gva: int | None = None) -> int:
        """Move a mapping (None: to where there is room); the pages stay the same. Returns the new address.

        Entries are taken from the old tables and stored in new ones; where both addresses are multiples of 2 MiB the
        page table itself moves (``move_normal_pmd``). Then the old addresses are flushed.
        """
        mm, size = process.mm, vma.end - vma.start
        huge = HUGE if self.memory.mode.entry_bytes == 8 else 0
        with self.syscall(process, "mremap"):
            start = vma.start
            target = mm.room(size, huge or PAGE_SIZE) if gva is None else gva
            moved = Vma(
                target, target + size, vma.read, vma.write, vma.execute, vma.file, vma.offset,
                shared=vma.shared, huge=vma.huge,
            )  # fmt: skip
            mm.insert(moved)
            mm.remove(vma)
            at = 0
            while at < size:
                step = min(size - at, HUGE - (start + at) % HUGE)
                whole = huge > 0 and step == HUGE and (target + at) % HUGE == 0
                with self.stores():
                    if not (whole and self._move_table(mm.space, start + at, target + at)):
                        self._move_entries(mm.space, start + at, target + at, step)
                at += step
            self.flush_user(mm, start, start + size)
            gather = Gather(self, mm)
            gather.free_tables(start, start + size)
            gather.finish(start, start + size)
        return target

    def _move_table(self, space: AddressSpace, source: int, target: int) -> bool:
        """Hang the page table (or the huge page) of one address under another; False if something is there."""
        entry, there = self._upper_slot(space, source), self._upper_slot(space, target)
        value = self.memory.read(entry)
        if self.memory.read(there)[0]:
            return False
        if value[0]:
            self.memory.write(entry, 0, Op.XCHG)
            self.memory.write(there, value)
        return True

    def _move_entries(self, space: AddressSpace, source: int, target: int, size: int) -> None:
        self.split_ends(space, source, source + size, all_of_them=True)
        found = space.leaves(source, source + size, hidden=True)
        if not len(found):
            return
        gvas = found["gva"] - np.uint64(source) + np.uint64(target)
        space.ensure(target, target + size)
        slots_from, slots_to = found["slot"].copy(), space.walk(gvas).slot
        entries = self.memory.read(slots_from)
        cleared = self.memory.write(slots_from, 0, Op.XCHG, log=False)
        self.memory.note(interleave(cleared, self.memory.write(slots_to, entries, log=False)))

    def _upper_slot(self, space: AddressSpace, gva: int) -> NDArray[np.uint64]:
        """The level-2 entry of an address."""
        tables = space.ensure(gva, gva + 1, 2)
        index = space.mode.index(np.array([gva], np.uint64), tables.level)
        return tables.gpa + index * np.uint64(space.mode.entry_bytes)

    @staticmethod
    def _span(call: str, gva: int, size: int) -> tuple[int, int]:
        if gva % PAGE_SIZE or size % PAGE_SIZE or gva < 0 or size <= 0:
            raise ConfigError(f"{call}: {gva:#x} and {size:#x} bytes are not multiples of {PAGE_SIZE:#x} above 0")
        return gva, gva + size


class Gather:
    """Frees what a range held, after its entries were cleared and flushed (``mmu_gather``)."""

    def __init__(self, guest: Paging, mm: Mm, *, final: bool = False) -> None:
        self._guest, self._mm, self._final = guest, mm, final
        self._frames: list[NDArray[np.uint64]] = []
        self._huge: list[int] = []
        self._tables: list[int] = []

    def zap(self, start: int, end: int) -> None:
        """Clear the entries of [start, end); with each page its struct page is told (``zap_pte_range``)."""
        guest, space = self._guest, self._mm.space
        guest.split_ends(space, start, end)
        found = space.leaves(start, end, hidden=True)
        gfns = found["gpa"] >> _SHIFT
        stores = guest.memory.write(found["slot"].copy(), 0, Op.WRITE if self._final else Op.XCHG, log=False)
        if len(found):
            rows = guest.through_direct_map(stores)
            guest.emit(interleave(rows, guest.note_pages(gfns).reshape(-1, 1)))
        small = found["size"] == PAGE_SIZE
        self._frames.append(gfns[small])
        self._huge += gfns[~small].tolist()

    def free_tables(self, start: int, end: int) -> None:
        """Unlink the tables that only [start, end) used (``free_pgtables``)."""
        guest, space = self._guest, self._mm.space
        floor, ceiling = (0, space.mode.user_half) if self._final else self._mm.neighbours(start, end)
        # PAE keeps its page directories until the process ends: the CPU holds them in registers.
        highest = 1 if space.mode.top.entries == 4 else None
        with guest.stores():
            freed = space.free_tables(start, end, floor=floor, ceiling=ceiling, highest=highest)
        self._tables += freed.tolist()

    def finish(self, start: int, end: int) -> None:
        """Flush [start, end) if there was anything, and free the frames (``tlb_finish_mmu``)."""
        frames = np.concatenate(self._frames) if self._frames else np.zeros(0, np.uint64)
        if start < end and (len(frames) or self._huge or self._tables) and not self._final:
            self._guest.flush_user(self._mm, start, end)
        self._guest.put(frames)
        for gfn in self._huge:
            self._guest.put_huge(gfn)
        self._guest.free_tables(self._tables)
