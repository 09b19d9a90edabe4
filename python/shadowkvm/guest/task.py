"""What a guest's kernel keeps books of: programs and files, mappings, address spaces, processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.ops import PAGE_SIZE
from shadowkvm.pagetables import AddressSpace, Rights
from shadowkvm.pagetables.modes import PagingMode

__all__ = ["ABSENT", "BRK_GAP", "File", "Mm", "Process", "Program", "Vma"]

ABSENT: Final = np.uint64((1 << 64) - 1)
"""In `File.frames`: the page is not in the cache."""
BRK_GAP: Final = 16 << 20
"""Bytes between a program's zeroed memory and its heap, which Linux puts somewhere in the 32 MiB behind."""


@dataclass(eq=False, slots=True)
class File:
    """A file in the page cache."""

    name: str
    frames: NDArray[np.uint64]
    """The frame (gfn) of each page, uint64; ABSENT if the page has to be read first."""
    maps: list[tuple[Mm, Vma]] = field(default_factory=list)
    """Who maps it."""
    unnamed: bool = False
    """Shared anonymous memory: gone with the last mapping."""

    @property
    def pages(self) -> int:
        """Pages of 4 KiB."""
        return len(self.frames)


@dataclass(eq=False, slots=True)
class Vma:
    """One mapping of a process (``vm_area_struct``)."""

    start: int
    end: int
    read: bool
    write: bool
    execute: bool
    file: File | None = None
    offset: int = 0
    """First page of the file."""
    shared: bool = False
    """Stores are seen by all who map it; else each gets a copy when it stores."""
    huge: bool = False
    """Anonymous memory in 2 MiB pages (``MADV_HUGEPAGE``)."""

    @property
    def pages(self) -> int:
        """Pages of 4 KiB."""
        return (self.end - self.start) // PAGE_SIZE

    def page_of(self, gva: Any) -> Any:
        """Which page of the file an address (a number, or an array of uint64) is on: int, or int64."""
        if isinstance(gva, np.ndarray):
            return ((gva - np.uint64(self.start)) >> np.uint64(12)).astype(np.int64) + self.offset
        return (gva - self.start) // PAGE_SIZE + self.offset

    def rights(self, mode: PagingMode, *, write: bool, dirty: bool) -> int:
        """The bits of an entry that maps a page of it."""
        return Rights(write=write, user=self.read, nx=mode.nx and not self.execute, dirty=dirty).bits()

    def goes_on(self, after: Vma) -> bool:
        """Whether another mapping begins where this one ends, with the same rights, and goes on in the same file."""
        same = self._has == after._has and (self.shared, self.huge, self.file) == (after.shared, after.huge, after.file)
        next_page = self.offset + self.pages
        return self.end == after.start and same and (self.file is None or after.offset == next_page)

    def split(self, at: int) -> Vma:
        """Cut at an address; what comes after it is returned."""
        offset = self.offset + (at - self.start) // PAGE_SIZE
        rest = Vma(
            at, self.end, self.read, self.write, self.execute, self.file, offset, shared=self.shared, huge=self.huge
        )
        self.end = at
        return rest

    def __repr__(self) -> str:
        rights = "".join(letter if has else "-" for letter, has in zip("rwx", self._has, strict=True))
        return f"<Vma {self.start:#x}-{self.end:#x} {rights}{'s' if self.shared else 'p'}>"

    @property
    def _has(self) -> tuple[bool, bool, bool]:
        return self.read, self.write, self.execute


class Mm:
    """An address space with its mappings (``mm_struct``); threads share one."""

    def __init__(self, space: AddressSpace, number: int, mmap_top: int) -> None:
        self.space = space
        self.number = number
        """Never used twice (``context.ctx_id``)."""
        self.mmap_top = mmap_top
        self.vmas: list[Vma] = []
        self.stack_top = 0
        """Where the stack ends; 0: nothing was loaded yet."""
        self.users = 0
        self.generation = 1
        """Rises with each flush (``context.tlb_gen``)."""
        self.cpus: dict[int, None] = {}
        """CPUs that have it loaded."""
        self.view: object = None
        """What others made of the mappings, and may keep until they change (`changed`)."""

    def changed(self) -> None:
        """A mapping came, went, or has other bounds or rights."""
        self.view = None

    def find(self, gva: int) -> Vma | None:
        """The mapping that holds the address."""
        at = bisect_right(self.vmas, gva, key=lambda vma: vma.start) - 1
        return self.vmas[at] if at >= 0 and gva < self.vmas[at].end else None

    def insert(self, vma: Vma) -> None:
        """Add a mapping; ConfigError if something is there already."""
        at = bisect_right(self.vmas, vma.start, key=lambda other: other.start)
        before = self.vmas[at - 1] if at else None
        after = self.vmas[at] if at < len(self.vmas) else None
        for other in (before, after):
            if other is not None and other.start < vma.end and vma.start < other.end:
                raise ConfigError(f"{vma!r} overlaps {other!r}")
        self.vmas.insert(at, vma)
        self.changed()
        if vma.file is not None:
            vma.file.maps.append((self, vma))

    def remove(self, vma: Vma) -> None:
        """Take a mapping away."""
        self.vmas.remove(vma)
        self.changed()
        if vma.file is not None:
            vma.file.maps.remove((self, vma))

    def inside(self, start: int, end: int) -> list[Vma]:
        """The mappings of [start, end), cut at both ends if they reach out of it."""
        for edge in (start, end):
            vma = self.find(edge)
            if vma is not None and vma.start < edge:
                rest = vma.split(edge)
                self.insert(rest)
        return [vma for vma in self.vmas if start <= vma.start and vma.end <= end]

    def merge(self, start: int, end: int) -> None:
        """Join neighbours in and around [start, end) that go on into each other (``vma_merge``)."""
        at = max(0, bisect_right(self.vmas, start, key=lambda vma: vma.start) - 2)
        while at + 1 < len(self.vmas) and self.vmas[at].start < end:
            if self.vmas[at].goes_on(self.vmas[at + 1]):
                after = self.vmas[at + 1]
                self.remove(after)
                self.vmas[at].end = after.end
            else:
                at += 1

    def room(self, size: int, align: int) -> int:
        """The highest free range below `mmap_top`: its first address (``vm_unmapped_area``, top down)."""
        end = self.mmap_top
        for vma in reversed(self.vmas):
            if vma.start >= self.mmap_top:
                continue
            start = (end - size) & ~(align - 1)
            if start >= vma.end:
                return start
            end = min(end, vma.start)
        start = (end - size) & ~(align - 1)
        if start <= 0:
            raise ConfigError(f"no room for a mapping of {size:#x} bytes")
        return start

    def neighbours(self, start: int, end: int) -> tuple[int, int]:
        """Where the mapping before ends and the one after begins: floor and ceiling of what tables may be freed."""
        floor = max((vma.end for vma in self.vmas if vma.end <= start), default=0)
        ceiling = min((vma.start for vma in self.vmas if vma.start >= end), default=self.space.mode.user_half)
        return floor, ceiling


@dataclass(eq=False, slots=True)
class Program:
    """What exec loads: code and data in the page cache, zeroed memory behind them, and a heap."""

    text: File
    data: File
    bss_pages: int
    heap_pages: int

    def vmas(self, base: int) -> Iterator[Vma]:
        """Its mappings: code (read, execute), data (private, writable), bss and, a little farther, the heap (brk)."""
        end = base + self.text.pages * PAGE_SIZE
        yield Vma(base, end, read=True, write=False, execute=True, file=self.text)
        start, end = end, end + self.data.pages * PAGE_SIZE
        yield Vma(start, end, read=True, write=True, execute=False, file=self.data)
        start, end = end, end + self.bss_pages * PAGE_SIZE
        if self.bss_pages:
            yield Vma(start, end, read=True, write=True, execute=False)
        start = end + BRK_GAP
        if self.heap_pages:
            yield Vma(start, start + self.heap_pages * PAGE_SIZE, read=True, write=True, execute=False)


class Process:
    """A task of the guest."""

    def __init__(self, pid: int, mm: Mm, stack: int, program: Program | None = None) -> None:
        self.pid = pid
        self.mm = mm
        self.kernel_stack = stack
        """gva of the page that system calls and faults use first."""
        self.program = program
        self.cpu: int | None = None
        """Where it runs; None: it waits."""
        self.last_cpu = 0

    @property
    def space(self) -> AddressSpace:
        """Its page tables."""
        return self.mm.space

    def vma(self, gva: int) -> Vma:
        """The mapping that holds the address; ConfigError if there is none."""
        found = self.mm.find(gva)
        if found is None:
            raise ConfigError(f"process {self.pid} has nothing mapped at {gva:#x}")
        return found

    def __repr__(self) -> str:
        where = "waits" if self.cpu is None else f"on CPU {self.cpu}"
        return f"<Process {self.pid}, {len(self.mm.vmas)} mappings, {where}>"
