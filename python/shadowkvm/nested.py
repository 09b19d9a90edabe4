"""Nested and agile paging: what the same guest costs where the CPU walks two stages, or parts of them."""

from __future__ import annotations

from typing import Final, NamedTuple

from shadowkvm.errors import ConfigError

__all__ = ["STAGE_LEVELS", "NestedStatistics", "stage_level"]

STAGE_LEVELS: Final = {4096: 1, 2 << 20: 2, 1 << 30: 3}
"""Sizes of the second stage's pages in bytes, and the level at which they are mapped."""


class NestedStatistics(NamedTuple):
    """What `Vm.use_nested` or `Vm.use_agile` counted, over all vCPUs.

    Exact: accesses, exits and the guest's own faults, for they follow from which pages and tables are touched. Modelled
    (TLB, page-walk caches, nested TLB): hits, misses, references.
    """

    accesses: int
    """Pages touched by loads, stores and fetches that were carried out."""
    hits: int
    """... that the TLB answered."""
    misses: int
    """... for which both stages were walked; a store walks once more to set D."""
    guest_references: int
    """Entries of guest tables that those walks read."""
    host_references: int
    """Entries of second-stage tables that they read."""
    stage_faults: int
    """Exits because the second stage did not map a page yet (EPT violation, #NPF)."""
    dirty_faults: int
    """Exits because a page was write-protected for the dirty log."""
    mmio_exits: int
    """Exits to devices."""
    other_exits: int
    """Exits for HLT, IN and OUT."""
    guest_faults: int
    """#PF that the guest took; under nested paging none of them exits."""
    shadow_references: int
    """Agile paging: entries of shadow tables that walks read."""
    shadow_fills: int
    """Agile paging: exits because a shadow entry was not filled yet."""
    table_stores: int
    """Agile paging: exits for stores to guest tables in shadow mode."""
    reflected_faults: int
    """Agile paging: exits for #PF of the guest's that a walk in the shadow came to; they are in guest_faults, too."""
    cr3_exits: int
    """Agile paging: exits for CR3 loads of a root that the CPU does not keep."""
    to_nested: int
    """Agile paging: tables that went from shadow to nested mode, with those that hung under them."""
    to_shadow: int
    """Agile paging: tables that came back."""
    intervals: int
    """Agile paging: looks at the tables."""
    prefetched: int
    """Agile paging: shadow entries that a fill brought beside the one that was needed."""

    @property
    def exits(self) -> int:
        """All VM exits."""
        second_stage = self.stage_faults + self.dirty_faults
        shadow = self.shadow_fills + self.table_stores + self.reflected_faults + self.cr3_exits
        return second_stage + shadow + self.mmio_exits + self.other_exits

    @property
    def references(self) -> int:
        """Entries of all tables that walks read."""
        return self.guest_references + self.host_references + self.shadow_references

    @property
    def references_per_miss(self) -> float:
        """Entries that a walk read in both stages; 24 for a whole one of four levels each."""
        return self.references / self.misses if self.misses else 0.0

    @property
    def miss_rate(self) -> float:
        """Misses an access, 0 to 1."""
        return self.misses / self.accesses if self.accesses else 0.0


def stage_level(page_size: int) -> int:
    """The level of a page size.

    Raises:
        ConfigError: it is none of `STAGE_LEVELS`.
    """
    if page_size not in STAGE_LEVELS:
        raise ConfigError(f"page_size {page_size!r}: {', '.join(map(str, STAGE_LEVELS))} are possible")
    return STAGE_LEVELS[page_size]
