"""Guest page-table entries: their bits, and arrays of them made and read.

Bit positions: Intel SDM vol. 3, tables 4-4 to 4-20. What Linux puts into its entries: ``_PAGE_TABLE`` and
``_KERNPG_TABLE`` for tables, accessed and dirty preset where the kernel itself knows that they will be.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.pagetables.modes import Level, PagingMode

__all__ = [
    "NX",
    "PROTNONE",
    "PS",
    "A",
    "D",
    "G",
    "P",
    "Rights",
    "U",
    "W",
    "frames",
    "is_leaf",
    "leaf_entries",
    "table_entry",
]

P: Final = 1 << 0
W: Final = 1 << 1
U: Final = 1 << 2
A: Final = 1 << 5
D: Final = 1 << 6
PS: Final = 1 << 7
G: Final = 1 << 8
NX: Final = 1 << 63
PROTNONE: Final = G
"""In an entry that is not present: Linux's own note that a page is there, but nothing is allowed."""

_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
# 32-bit paging: bits 13 to 16 of a 4 MiB entry are address bits 32 to 35 (PSE-36).
_PSE36: Final = 0xF << 13


class Rights(NamedTuple):
    """What a mapping allows, and the bits that the kernel presets."""

    write: bool = True
    user: bool = True
    nx: bool = False
    global_: bool = False
    accessed: bool = True
    """Preset A, as Linux does: its page protections contain it."""
    dirty: bool | None = None
    """Preset D; None: if writable. KVM maps a page read-only as long as its entry is not dirty."""

    def bits(self) -> int:
        """The entry's bits but for the address and PS."""
        dirty = self.write if self.dirty is None else self.dirty
        chosen = ((self.write, W), (self.user, U), (self.nx, NX), (self.global_, G), (self.accessed, A), (dirty, D))
        return P | sum(bit for wanted, bit in chosen if wanted)


def leaf_entries(mode: PagingMode, level: Level, gpas: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Entries that map the memory at ``gpas``: uint64, of the shape of ``gpas``.

    Args:
        mode, level: whose entries.
        gpas: guest physical addresses (bytes), multiples of the level's page size.
        bits: as `Rights.bits` gives them.
    """
    if level.number > 1:
        bits |= PS
    entries = gpas | np.uint64(bits)
    if mode.entry_bytes == 4:
        high = gpas >> np.uint64(32)
        entries = (entries & np.uint64(0xFFFF_FFFF)) | high << np.uint64(13)
    return entries


def table_entry(mode: PagingMode, level: Level, gpa: int, *, user: bool) -> int:
    """The entry of ``level`` that leads to the table at ``gpa``, as Linux writes it."""
    if mode.top.entries == 4 and level is mode.top:
        # PAE: the other bits of a PDPTE are reserved.
        return gpa | P
    return gpa | P | W | A | D | (U if user else 0)


def is_leaf(level: Level, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which entries are present and map memory themselves."""
    present: NDArray[np.bool_] = entries & np.uint64(P) != 0
    if level.number == 1:
        return present
    large: NDArray[np.bool_] = entries & np.uint64(PS) != 0
    return present & large if level.leaf else np.zeros(entries.shape, np.bool_)


def frames(mode: PagingMode, level: Level, entries: NDArray[np.uint64], *, leaf: bool) -> NDArray[np.uint64]:
    """The addresses (bytes) in entries: of the memory if they are leaves, else of the next table."""
    out = entries & np.uint64(_ADDRESS)
    if leaf and level.number > 1:
        out &= ~np.uint64(level.size - 1)
        if mode.entry_bytes == 4:
            out |= (entries & np.uint64(_PSE36)) << np.uint64(19)
    return out
