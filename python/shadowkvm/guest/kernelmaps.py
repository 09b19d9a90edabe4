"""KernelMaps: the kernel changes its own half: vmalloc, direct map, devices.

Rules of Linux 6.1: mm/vmalloc.c (entries are cleared at once, flushed together, and only then used again),
arch/x86/mm/pat/set_memory.c (large pages of the direct map are split, everything is flushed).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.guest.calls import Calls
from shadowkvm.guest.machine import Settings
from shadowkvm.ops import PAGE_SIZE, Flag, Op
from shadowkvm.pagetables import make_rows

__all__ = ["KernelMaps"]

_SHIFT: Final = np.uint64(12)


class KernelMaps(Calls):
    """A machine whose kernel maps and unmaps memory of its own while processes exist."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._vmalloc_next = self.layout.vmalloc
        # Free again, as (pages, gva); and unmapped, but not flushed yet.
        self._vmalloc_free: list[tuple[int, int]] = []
        self._vmalloc_lazy: list[tuple[int, int, NDArray[np.uint64]]] = []

    def vmalloc(self, pages: int) -> int:
        """Map so many new pages in the kernel's vmalloc area; its address. A page behind it stays empty."""
        gva = self._vmalloc_room(pages + 1)
        gfns = self.memory.frames.take(pages)
        with self.in_kernel(), self.stores():
            self.kernel.map(gva, gfns << _SHIFT, pages * PAGE_SIZE, user=False, nx=self.memory.mode.nx)
        return gva

    def vfree(self, gva: int, pages: int) -> None:
        """Unmap; the flush, and the use of address and frames, wait until `Settings.lazy_vfree` pages came together."""
        found = self.kernel.leaves(gva, gva + pages * PAGE_SIZE)
        if len(found) != pages:
            raise ConfigError(f"vfree: {pages} pages at {gva:#x} are not what vmalloc gave")
        with self.in_kernel(), self.stores():
            self.kernel.unmap(gva, pages * PAGE_SIZE, tables=False)
        self._vmalloc_lazy.append((pages + 1, gva, found["gpa"] >> _SHIFT))
        if sum(len(gfns) for _, _, gfns in self._vmalloc_lazy) > self.settings.lazy_vfree:
            self.purge_vmalloc()

    def purge_vmalloc(self) -> None:
        """Flush what `vfree` left, on all CPUs, and free it (``__purge_vmap_area_lazy``)."""
        if not self._vmalloc_lazy:
            return
        lazy, self._vmalloc_lazy = self._vmalloc_lazy, []
        first = min(gva for _, gva, _ in lazy)
        last = max(gva + (pages - 1) * PAGE_SIZE for pages, gva, _ in lazy)
        with self.in_kernel():
            self.flush_kernel(np.arange(first, last, PAGE_SIZE, dtype=np.uint64))
        for pages, gva, gfns in lazy:
            self.memory.frames.give(gfns)
            self._vmalloc_free.append((pages, gva))

    def _vmalloc_room(self, pages: int) -> int:
        for at, (size, gva) in enumerate(self._vmalloc_free):
            if size == pages:
                del self._vmalloc_free[at]
                return gva
        gva = self._vmalloc_next
        if gva + pages * PAGE_SIZE > self.layout.vmalloc + self.layout.vmalloc_size:
            raise ConfigError(f"vmalloc: {pages} pages do not fit into {self.layout.vmalloc_size >> 20} MiB")
        self._vmalloc_next += pages * PAGE_SIZE
        return gva

    def set_memory(self, gpa: int, pages: int, *, write: bool) -> None:
        """Make pages of the direct map read-only or writable again (``set_memory_ro``, ``set_memory_rw``)."""
        gva = self.layout.direct + gpa
        with self.in_kernel():
            with self.stores():
                self.kernel.protect(gva, pages * PAGE_SIZE, write=write)
            self.flush_kernel(np.uint64(gva) + np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE))

    def ioremap(self, gpa: int, pages: int = 1) -> int:
        """Map a device's registers; where."""
        if gpa % PAGE_SIZE or gpa < self.settings.memory:
            raise ConfigError(f"ioremap: {gpa:#x} is not a page beyond memory ({self.settings.memory:#x})")
        gva = self._vmalloc_room(pages + 1)
        with self.in_kernel(), self.stores():
            self.kernel.map(gva, gpa, pages * PAGE_SIZE, user=False, nx=self.memory.mode.nx)
        return gva

    def kernel_access(self, gvas: NDArray[np.uint64], *, write: bool = False, device: bool = False) -> None:
        """The kernel loads or stores at addresses of its own half."""
        flags = (Flag.MMIO if device else Flag(0)) | (Flag.KEEP if write and not device else Flag(0))
        with self.in_kernel():
            self.emit(make_rows(Op.WRITE if write else Op.READ, gvas, size=min(4, self.memory.mode.word), flags=flags))
