"""How a guest's page tables are laid out: 64-bit, PAE, two-level. Bits of entries and control registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

P, W, U, PWT, PCD, A, D, PS, G, NX = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 63)
FULL: Final = P | W | U | A | D
ADDR: Final = (1 << 40) - 1 & ~0xFFF  # the guest's MAXPHYADDR is 40
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_PGE, CR4_OSFXSR, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 9, 1 << 20, 1 << 21
EFER_NX: Final = 1 << 11
WAYS_BACK: Final = {64: (30, 0x050F), 32: (31, 0x80CD)}
"""By mode: the qword of every page to which a jump can lead, and what lies there (SYSCALL, INT 0x80)."""


@dataclass(frozen=True)
class Format:
    """One layout of page tables."""

    name: str
    bits: int
    """The code that runs with it: 64 or 32."""
    top: int
    """Level of the root."""
    entry: int
    """Bytes of an entry."""
    width: int
    """Bits of an index."""

    @property
    def levels(self) -> range:
        """From the root down to 1."""
        return range(self.top, 0, -1)

    def shift(self, level: int) -> int:
        """The lowest bit of an address that chooses the entry at this level."""
        return 12 + self.width * (level - 1)

    def entries(self, level: int) -> int:
        """How many entries a table of this level has."""
        return 4 if self.is_pdpt(level) else 1 << self.width

    def is_pdpt(self, level: int) -> bool:
        """Are its entries the four PDPTEs of PAE?"""
        return self is PAE and level == 3

    def index(self, va: int, level: int) -> int:
        """Which entry of a table of this level the address uses."""
        return va >> self.shift(level) & self.entries(level) - 1

    def compose(self, indices: Mapping[int, int], offset: int = 0) -> int:
        """The address that these indices, by level, lead to."""
        va = sum(i << self.shift(level) for level, i in indices.items()) | offset
        return va | 0xFFFF << 48 if self.bits == 64 and va >> 47 & 1 else va

    def is_large(self, level: int, entry: int, cr4: int) -> bool:
        """Does this entry map a large page?"""
        if self is TWO:
            return level == 2 and bool(entry & PS and cr4 & CR4_PSE)
        return bool(entry & PS) and level not in (1, self.top)

    def reserved(self, level: int, entry: int, *, large: bool, nx: bool) -> bool:
        """Has this entry reserved bits?"""
        if self is TWO:
            return large and bool(entry >> 17 & 0x1F)
        high = entry >> 40 & (0x7FFFFF if self is PAE else 0xFFF)
        if high or (entry & NX and not nx):
            return True
        if self.is_pdpt(level):
            return bool(entry & (W | U | A | D | PS | G))
        if large:
            return bool(entry & ADDR & (1 << self.shift(level)) - 1 & ~0x1FFF)
        return level == 4 and bool(entry & (PS | G))

    def refuses_pdpte(self, entry: int) -> bool:
        """Does this PDPTE make a load of CR3 fail?"""
        return bool(entry & P) and self.reserved(3, entry, large=False, nx=True)

    def page(self, level: int, entry: int, va: int) -> int:
        """Where an address lies in the page that this entry maps."""
        low = (1 << self.shift(level)) - 1
        high = (entry >> 13 & 0xF) << 32 if self is TWO and level == 2 else 0  # PSE-36
        return entry & (ADDR if self.entry == 8 else 0xFFFFF000) & ~low | va & low | high

    def link(self, level: int, table: int) -> int:
        """The entry of a table of this level that leads to a table below without restriction."""
        return table | (P if self.is_pdpt(level) else FULL)


LONG = Format("64-bit", 64, 4, 8, 9)
PAE = Format("PAE", 32, 3, 8, 9)
TWO = Format("two-level", 32, 2, 4, 10)
