"""Which accesses of user code fault, why, and which of them settle the others' faults, too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.guest.task import ABSENT, Mm, Process, Vma
from shadowkvm.pagetables import Walk, Weave
from shadowkvm.pagetables.walk import addresses

__all__ = ["WINDOW", "Batch", "Kind", "Mappings", "next_batch"]

WINDOW: Final = 16
"""Pages that a read fault in a file maps around itself (``fault_around_bytes``)."""
_HUGE_SHIFT: Final = np.uint64(21)
_PAGE_SHIFT: Final = np.uint64(12)
_WINDOW_SHIFT: Final = np.uint64(16)


class Kind(IntEnum):
    """What an access to a page comes to."""

    FINE = 0
    ANON = 1
    """Store to anonymous memory that has no page yet."""
    ZERO = 2
    """Load from such memory: the zero page, read-only."""
    FILE = 3
    """Load or fetch from a file: the cached pages around it are mapped."""
    COPY = 4
    """Store to a private mapping of a file: a copy of the page."""
    SHARED = 5
    """Store to a shared mapping of a file."""
    WP = 6
    """Store to a private page that is mapped read-only: copied, or made writable if nobody else has it."""
    WP_SHARED = 7
    """Store to a shared page that is mapped read-only."""
    HUGE = 8
    """First access to 2 MiB of anonymous memory with huge pages."""
    HUGE_WP = 9
    """Store to a huge page that is mapped read-only."""
    FORBIDDEN = 10
    """The mapping does not allow it."""


class Mappings:
    """The mappings of a process as arrays."""

    def __init__(self, mm: Mm) -> None:
        self.vmas: list[Vma] = list(mm.vmas)
        self.start = np.array([vma.start for vma in self.vmas], np.uint64)
        self.end = np.array([vma.end for vma in self.vmas], np.uint64)
        self.read, self.write, self.execute, self.shared, self.huge, self.file = (
            np.array([test(vma) for vma in self.vmas], np.bool_)
            for test in (
                lambda vma: vma.read,
                lambda vma: vma.write,
                lambda vma: vma.execute,
                lambda vma: vma.shared,
                lambda vma: vma.huge,
                lambda vma: vma.file is not None,
            )
        )
        mode = mm.space.mode
        bits = [
            (vma.rights(mode, write=False, dirty=False), vma.rights(mode, write=vma.write, dirty=True))
            for vma in self.vmas
        ]
        self.read_bits = np.array([read for read, _ in bits], np.uint64)
        self.write_bits = np.array([write for _, write in bits], np.uint64)

    @classmethod
    def of(cls, mm: Mm) -> Mappings:
        """Those of an address space; made anew only if something changed."""
        if not isinstance(mm.view, cls):
            mm.view = cls(mm)
        return mm.view

    def index(self, process: Process, gvas: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each address the number of its mapping.

        Raises:
            ConfigError: an address that no mapping holds.
        """
        at: NDArray[np.int64] = np.searchsorted(self.start, gvas, side="right").astype(np.int64) - 1
        outside = at < 0
        if len(self.vmas):
            outside |= gvas >= self.end[at]
        if outside.any():
            bad = int(gvas[int(np.argmax(outside))])
            raise ConfigError(f"process {process.pid} has nothing mapped at {bad:#x}")
        return at

    def cached(self, vma: NDArray[np.int64], pages: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The frames that the page cache has for pages of files.

        Args:
            vma: number of a mapping for each page.
            pages: address of each page.

        Returns:
            uint64, of the same shape; ABSENT where the mapping has no such page, or the cache has not.
        """
        frames = np.full(pages.shape, ABSENT, np.uint64)
        inside = (pages >= self.start[vma]) & (pages < self.end[vma])
        for number in np.unique(vma).tolist():
            area = self.vmas[number]
            if area.file is None:
                continue
            mine = np.flatnonzero((vma == number) & inside)
            frames[mine] = area.file.frames[area.page_of(pages[mine])]
        return frames


@dataclass(eq=False, slots=True)
class Batch:
    """Accesses in a row of which the first to each page decides; one item each."""

    process: Process
    mappings: Mappings
    gvas: NDArray[np.uint64]
    written: NDArray[np.bool_]
    found: Walk
    """What the tables said before."""
    vma: NDArray[np.int64]
    """Number of the mapping."""
    kind: NDArray[np.int64]
    events: NDArray[np.int64]
    """Those that fault, ascending."""
    weave: Weave

    def of(self, kind: Kind) -> NDArray[np.int64]:
        """The faults of one kind, ascending."""
        out: NDArray[np.int64] = self.events[self.kind[self.events] == kind]
        return out

    def pages(self, at: NDArray[np.int64]) -> NDArray[np.uint64]:
        """First address of the page of each of these accesses."""
        return self.gvas[at] >> _PAGE_SHIFT << _PAGE_SHIFT


def next_batch(
    process: Process, mappings: Mappings, gvas: NDArray[np.uint64], written: NDArray[np.bool_], *, fetch: bool
) -> Batch:
    """As many accesses from the first on as can be settled together.

    Raises:
        ConfigError: an access that the process's mappings forbid.
    """
    gvas = addresses(gvas)
    vma = mappings.index(process, gvas)
    found = process.space.walk(gvas, user_root=True)
    kind = _kinds(mappings, vma, written, found, fetch=fetch, huge=_room_for_huge(mappings, gvas, vma, found))
    if (kind == Kind.FORBIDDEN).any():
        at = int(np.argmax(kind == Kind.FORBIDDEN))
        what = "fetch" if fetch else "store" if written[at] else "load"
        where = mappings.vmas[int(vma[at])]
        raise ConfigError(f"process {process.pid}: {what} at {int(gvas[at]):#x}, which {where!r} forbids")
    faulting = np.flatnonzero(kind != Kind.FINE)
    if not len(faulting):
        return Batch(process, mappings, gvas, written, found, vma, kind, faulting, Weave(len(gvas)))
    window = (gvas >> _WINDOW_SHIFT) * np.uint64(max(1, len(mappings.vmas))) + vma.astype(np.uint64)
    cut = _cut(mappings, gvas, vma, kind, window)
    faulting = faulting[faulting < cut]
    _, first = np.unique(_keys(gvas, kind, window)[faulting], return_index=True)
    events = faulting[np.sort(first)]
    found = Walk._make(array[:cut] for array in found)
    return Batch(process, mappings, gvas[:cut], written[:cut], found, vma[:cut], kind[:cut], events, Weave(cut))


def _room_for_huge(
    mappings: Mappings, gvas: NDArray[np.uint64], vma: NDArray[np.int64], found: Walk
) -> NDArray[np.bool_]:
    """Where a huge page can come: all 2 MiB are in the mapping, and no table of small pages is there."""
    first = gvas >> _HUGE_SHIFT << _HUGE_SHIFT
    last = first + np.uint64((1 << 21) - 1)
    whole = (first >= mappings.start[vma]) & (last < mappings.end[vma])
    out: NDArray[np.bool_] = mappings.huge[vma] & whole & (found.level > 1)
    return out


def _kinds(
    mappings: Mappings,
    vma: NDArray[np.int64],
    written: NDArray[np.bool_],
    found: Walk,
    *,
    fetch: bool,
    huge: NDArray[np.bool_],
) -> NDArray[np.int64]:
    shared, file = mappings.shared[vma], mappings.file[vma]
    allowed = mappings.execute[vma] if fetch else np.where(written, mappings.write[vma], mappings.read[vma])
    right = found.execute if fetch else np.where(written, found.write, found.present)
    # A page that an earlier mprotect left without U, or that must not be executed: only the mapping can be to blame.
    fine = found.present & found.user & right & allowed
    present = found.present & ~fine
    absent = ~found.present
    kind: NDArray[np.int64] = np.select(
        [
            fine,
            ~allowed | (present & ~written),
            present & (found.level > 1),
            present & shared,
            present,
            absent & huge,
            absent & file & shared & written,
            absent & file & written,
            absent & file,
            absent & written,
        ],
        [
            int(Kind.FINE),
            int(Kind.FORBIDDEN),
            int(Kind.HUGE_WP),
            int(Kind.WP_SHARED),
            int(Kind.WP),
            int(Kind.HUGE),
            int(Kind.SHARED),
            int(Kind.COPY),
            int(Kind.FILE),
            int(Kind.ANON),
        ],
        int(Kind.ZERO),
    ).astype(np.int64)
    return kind


def _keys(gvas: NDArray[np.uint64], kind: NDArray[np.int64], window: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Accesses with the same key are settled by the same fault."""
    huge = (kind == Kind.HUGE) | (kind == Kind.HUGE_WP)
    unit = np.select([kind == Kind.FILE, huge], [window, gvas >> _HUGE_SHIFT], gvas >> _PAGE_SHIFT)
    part = np.select([kind == Kind.FILE, huge], [1, 2], 0).astype(np.uint64)
    return unit * np.uint64(4) + part


def _cut(
    mappings: Mappings,
    gvas: NDArray[np.uint64],
    vma: NDArray[np.int64],
    kind: NDArray[np.int64],
    window: NDArray[np.uint64],
) -> int:
    """The first access that an earlier fault of this batch settles in another way than it looks now."""
    at = np.flatnonzero(kind != Kind.FINE)
    page, window, kinds = gvas[at] >> _PAGE_SHIFT, window[at], kind[at]
    read, stored = kinds == Kind.FILE, (kinds == Kind.COPY) | (kinds == Kind.SHARED)
    cuts = [
        len(gvas),
        # A read of a file maps the pages around it; a store to one of them is then a store to a page that is there.
        _both(window, read, stored, at, len(gvas)),
        _both(page, kinds == Kind.ZERO, kinds == Kind.ANON, at, len(gvas), ordered=True),
    ]
    if read.any():
        # ... but only those that are cached, unless the page itself has to be read, and what is around it with it.
        cached = np.zeros(len(at), np.bool_)
        cached[read] = mappings.cached(vma[at][read], page[read] << _PAGE_SHIFT) != ABSENT
        cuts.append(_both(window, read & cached, read & ~cached, at, len(gvas), ordered=True))
    large = at[kinds == Kind.HUGE_WP]
    if len(large):
        # It may be split, so it comes first, and alone.
        cuts.append(int(large[0]) + (large[0] == at[0]))
    return min(cuts)


def _both(
    unit: NDArray[np.uint64],
    one: NDArray[np.bool_],
    other: NDArray[np.bool_],
    faulting: NDArray[np.int64],
    count: int,
    *,
    ordered: bool = False,
) -> int:
    """The first access with which a unit has had both kinds (``ordered``: first ``one``, then ``other``)."""
    if not one.any() or not other.any():
        return count
    units_one, at_one = np.unique(unit[one], return_index=True)
    units_other, at_other = np.unique(unit[other], return_index=True)
    common, in_one, in_other = np.intersect1d(units_one, units_other, return_indices=True)
    if not len(common):
        return count
    first, second = faulting[one][at_one[in_one]], faulting[other][at_other[in_other]]
    later = np.maximum(first, second)
    if ordered:
        later = later[first < second]
    return int(later.min(initial=count))
