"""Reclaim: the page cache gives memory back: pages are aged, unmapped and dropped.

Rules of Linux 6.1: mm/vmscan.c, mm/rmap.c (``folio_referenced``, ``try_to_unmap``); on x86 clearing A is not flushed
(``ptep_clear_flush_young``), and the flushes of unmapped pages are batched (``TTU_BATCH_FLUSH``).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.guest.lifecycle import Lifecycle
from shadowkvm.guest.task import ABSENT, File, Mm
from shadowkvm.ops import PAGE_SIZE, Op
from shadowkvm.pagetables import make_rows
from shadowkvm.pagetables.entries import A

__all__ = ["Reclaim"]

_SHIFT: Final = np.uint64(12)
_BATCH: Final = 32


class Reclaim(Lifecycle):
    """A machine that runs short of memory."""

    def age(self, file: File) -> int:
        """Look which mapped pages of a file were used, and clear A in their entries; how many entries had it."""
        young = 0
        with self.in_kernel():
            for mm, vma in file.maps:
                found = mm.space.leaves(vma.start, vma.end)
                used = found["bits"] & np.uint64(A) != 0
                slots = found["slot"][used]
                self.memory.poke(slots, self.memory.read(slots) & ~np.uint64(A))
                # test_and_clear_bit: a locked operation on one byte.
                self.emit(self.through_direct_map(make_rows(Op.AND, slots, 0xFF ^ A, size=1)))
                young += len(slots)
        return young

    def reclaim(self, file: File, pages: NDArray[np.int64]) -> int:
        """Unmap pages of a file everywhere, flush, drop them from the cache; how many frames that freed."""
        wanted = pages[file.frames[pages] != ABSENT]
        with self.in_kernel():
            for at in range(0, len(wanted), _BATCH):
                self._unmap_batch(file, wanted[at : at + _BATCH])
        return len(wanted)

    def _unmap_batch(self, file: File, pages: NDArray[np.int64]) -> None:
        hit: dict[int, Mm] = {}
        for mm, vma in file.maps:
            gvas = np.uint64(vma.start) + (pages - vma.offset).astype(np.uint64) * np.uint64(PAGE_SIZE)
            mine = gvas[(pages >= vma.offset) & (gvas < np.uint64(vma.end))]
            found = mm.space.walk(mine)
            same = found.present & np.isin(found.gpa >> _SHIFT, file.frames[pages])
            gfns = found.gpa[same] >> _SHIFT
            if not len(gfns):
                continue
            self.emit(self.through_direct_map(self.memory.write(found.slot[same], 0, Op.XCHG, log=False).reshape(-1)))
            self.emit(self.note_pages(gfns))
            np.subtract.at(self.refs, gfns.astype(np.int64), 1)
            hit[mm.number] = mm
        for mm in hit.values():
            # One flush of everything for the batch (arch_tlbbatch_flush).
            self.flush_user(mm, 0, self.memory.mode.user_half)
        self.put(file.frames[pages])
        file.frames[pages] = ABSENT
