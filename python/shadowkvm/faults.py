"""What each #PF exit was and what became of it, read off the events of a piece of a run.

Exits are told apart by their events alone, which are KVM's own. All of it is NumPy over the events of one piece; only
the bookkeeping of which frames hold shadowed tables goes event by event.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.events import EVENT_INFO
from shadowkvm.ops import NO_PAGE

__all__ = ["NEEDED", "Access", "Faults", "Kind", "Result", "Tables", "read_faults"]


class Access(IntEnum):
    """How the guest touched the page: from the error code of the exit."""

    FETCH = 0
    READ = 1
    WRITE = 2


class Result(IntEnum):
    """What became of a #PF exit.

    KVM counts the first four as ``pf_fixed``, ``pf_emulate``, ``pf_spurious`` and ``pf_guest``.
    """

    FIXED = 0
    """The shadow was repaired."""
    EMULATED = 1
    """KVM carried the instruction out: a store to a write-protected table, or a device."""
    SPURIOUS = 2
    """The shadow was right already; only the TLB was not."""
    GUEST = 3
    """The guest's own tables forbid the access: it gets the fault."""
    MMIO = 4
    """Answered by an MMIO entry, without a look at the guest's tables; not in ``pf_taken``."""


class Kind(IntEnum):
    """What kind of page was touched."""

    USER_CODE = 0
    """Lower half of the address space, instruction fetch."""
    USER_DATA = 1
    """Lower half, load or store (by the kernel too)."""
    KERNEL_CODE = 2
    KERNEL_DATA = 3
    TABLE_1 = 4
    """The page holds a guest table that is shadowed at that moment: level 1 (last level) to 4 and 5 (top)."""
    TABLE_2 = 5
    TABLE_3 = 6
    TABLE_4 = 7
    TABLE_5 = 8
    DEVICE = 9
    """No memslot is there."""


_CODE: Final = {name: info.code for name, info in EVENT_INFO.items()}
_PF: Final = _CODE["kvm_page_fault"]
_WALK: Final = _CODE["kvm_mmu_pagetable_walk"]
_ELEMENT: Final = _CODE["kvm_mmu_paging_element"]
_GET: Final = _CODE["kvm_mmu_get_page"]
_ZAP: Final = _CODE["kvm_mmu_prepare_zap_page"]
_UNSYNC: Final = _CODE["kvm_mmu_unsync_page"]
NEEDED: Final = (
    "kvm_page_fault",
    "kvm_mmu_pagetable_walk",
    "kvm_mmu_paging_element",
    "kvm_mmu_walker_error",
    "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page",
    "kvm_mmu_unsync_page",
    "kvm_mmu_set_spte",
    "kvm_emulate_insn",
    "kvm_inj_exception",
    "mark_mmio_spte",
    "check_mmio_spte",
)
"""The events without which the exits cannot be told apart."""

_DIRECT, _INVALID, _LEVEL = 1 << 7, 1 << 11, 15  # of the role's word
_NEW = 2  # of kvm_mmu_get_page's flag
_FRAME: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_PF_VECTOR = 14
_WRITE_BIT, _USER_BIT, _RESERVED, _FETCH_BIT = 2, 4, 8, 16  # of an error code


class Faults(NamedTuple):
    """The #PF exits of one piece, in order; every array has one item for each."""

    op: NDArray[np.uint64]
    """Number of the operation."""
    user: NDArray[np.bool_]
    """At CPL 3."""
    access: NDArray[np.int64]
    """`Access`."""
    result: NDArray[np.int64]
    """`Result`."""
    kind: NDArray[np.int64]
    """`Kind`."""
    unsync: NDArray[np.int64]
    """Tables that went unsync in it."""
    gfn: NDArray[np.uint64]
    """The frame that the guest's tables lead to, NO_PAGE if there is none or nobody looked."""


class Tables:
    """Which guest frames hold a shadowed table now, and of which level: kept from piece to piece."""

    def __init__(self) -> None:
        self._levels: dict[int, list[int]] = {}

    def note(self, gfn: int, role: int, *, made: bool) -> None:
        """A shadow page was made, or zapped."""
        if role & _DIRECT:
            return
        counts = self._levels.setdefault(gfn, [0] * 6)
        counts[min(role & _LEVEL, 5)] += 1 if made else -1
        if not made and not any(counts):
            del self._levels[gfn]

    def level(self, gfn: int) -> int:
        """The level of the table in that frame (of several the highest), 0 if none is shadowed."""
        counts = self._levels.get(gfn)
        return max(level for level, count in enumerate(counts) if count) if counts else 0


class _Segments:
    """The events from each #PF exit to the next one, or to the end of its operation."""

    def __init__(self, events: NDArray[np.void]) -> None:
        self.kind: NDArray[Any] = events["kind"]
        self.start = np.flatnonzero(self.kind == _PF)
        after_op = np.searchsorted(events["op"], events["op"][self.start], side="right")
        following = np.append(self.start[1:], len(events))
        self.end = np.minimum(after_op, following)

    def count(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many events of ``mask`` each segment has."""
        total: NDArray[np.int64] = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)))
        out: NDArray[np.int64] = total[self.end] - total[self.start]
        return out

    def has(self, name: str) -> NDArray[np.bool_]:
        return self.count(self.kind == _CODE[name]) > 0


def read_faults(events: NDArray[np.void], tables: Tables) -> Faults:
    """The #PF exits among ``events`` (EVENT_DTYPE, at least the kinds of NEEDED, whole operations)."""
    segments = _Segments(events)
    faults = events[segments.start]
    code = faults["code"]
    gfn = _leaf_frames(events, segments)
    level = _table_levels(events, segments.start, gfn, tables)
    access = np.select(
        [code & _FETCH_BIT != 0, code & _WRITE_BIT != 0], [int(Access.FETCH), int(Access.WRITE)], int(Access.READ)
    )
    kernel = faults["b"] >> np.uint64(63) != 0
    place = 2 * kernel + (access != Access.FETCH)
    device = _mmio(events, segments)
    return Faults(
        op=faults["op"],
        user=code & _USER_BIT != 0,
        access=access.astype(np.int64),
        result=_results(events, segments, device),
        kind=np.select(
            [device | segments.has("mark_mmio_spte"), level > 0],
            [int(Kind.DEVICE), int(Kind.TABLE_1) - 1 + level],
            place,
        ).astype(np.int64),
        unsync=segments.count(segments.kind == _UNSYNC),
        gfn=gfn,
    )


def _mmio(events: NDArray[np.void], segments: _Segments) -> NDArray[np.bool_]:
    """Exits that an MMIO entry answered: reserved bits in the shadow, and the entry was not of an old generation."""
    stale = (segments.kind == _CODE["check_mmio_spte"]) & (events["b"] != events["c"])
    out: NDArray[np.bool_] = (events["code"][segments.start] & _RESERVED != 0) & (segments.count(stale) == 0)
    return out


def _results(events: NDArray[np.void], segments: _Segments, mmio: NDArray[np.bool_]) -> NDArray[np.int64]:
    injected = (segments.kind == _CODE["kvm_inj_exception"]) & (events["level"] == _PF_VECTOR)
    return np.select(
        [
            mmio,
            # An emulated store may end in a guest fault of its own: it was emulated first.
            segments.has("kvm_emulate_insn"),
            segments.count(injected) > 0,
            segments.has("kvm_mmu_set_spte"),
        ],
        [int(Result.MMIO), int(Result.EMULATED), int(Result.GUEST), int(Result.FIXED)],
        int(Result.SPURIOUS),
    ).astype(np.int64)


def _leaf_frames(events: NDArray[np.void], segments: _Segments) -> NDArray[np.uint64]:
    """Where the first guest walk of each exit ended: the frame, NO_PAGE if it found none."""
    out = np.full(len(segments.start), NO_PAGE, np.uint64)
    kind = segments.kind
    walks, elements = np.flatnonzero(kind == _WALK), np.flatnonzero(kind == _ELEMENT)
    if not len(walks) or not len(elements):
        return out
    first = np.searchsorted(walks, segments.start)
    walk = walks[np.minimum(first, len(walks) - 1)]
    walked = (first < len(walks)) & (walk < segments.end)
    following = np.append(walks, len(kind))[np.minimum(first + 1, len(walks))]
    # The last entry that this walk read.
    last = np.searchsorted(elements, np.minimum(following, segments.end)) - 1
    element = elements[np.maximum(last, 0)]
    walked &= (last >= 0) & (element > walk)
    walked &= segments.count(kind == _CODE["kvm_mmu_walker_error"]) == 0
    entry, level = events["a"][element], events["level"][element]
    inside = (np.uint64(1) << (np.uint64(9) * (np.maximum(level, 1) - 1).astype(np.uint64))) - np.uint64(1)
    frame = (entry & _FRAME) >> np.uint64(12)
    address = events["b"][segments.start] >> np.uint64(12)
    out[walked] = ((frame & ~inside) | (address & inside))[walked]
    return out


def _table_levels(
    events: NDArray[np.void], faults: NDArray[np.int64], gfn: NDArray[np.uint64], tables: Tables
) -> NDArray[np.int64]:
    """The level of the shadowed table that each exit touched, at the moment of the exit; 0 if it touched none."""
    out = np.zeros(len(faults), np.int64)
    kind, code, flag = events["kind"], events["code"], events["flag"]
    made = (kind == _GET) & (flag & _NEW != 0)
    # A page that is still a root is announced again, as invalid, when it is freed.
    gone = (kind == _ZAP) & (code & _INVALID == 0)
    changes = np.flatnonzero(made | gone)
    stops = np.searchsorted(faults, changes).tolist()
    frames = gfn.tolist()
    at = 0
    pairs = zip(stops, events["a"][changes].tolist(), code[changes].tolist(), made[changes].tolist(), strict=True)
    for stop, frame, role, is_made in pairs:
        for number in range(at, stop):
            out[number] = tables.level(frames[number])
        at = stop
        tables.note(frame, role, made=is_made)
    for number in range(at, len(faults)):
        out[number] = tables.level(frames[number])
    return out
