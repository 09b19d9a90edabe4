"""TLB statistics: what the CPUs' TLBs and page-walk caches made of a run."""

from __future__ import annotations

from typing import Final, NamedTuple

from shadowkvm._core import USUAL_TLB
from shadowkvm.checks import integer
from shadowkvm.errors import ConfigError

__all__ = ["USUAL_ENTRIES", "USUAL_WALK_CACHES", "USUAL_WAYS", "TlbStatistics", "tlb_sizes"]

USUAL_ENTRIES: Final = USUAL_TLB[0]
"""Translations that a TLB holds, of any page size: the second level of Intel's Skylake."""

USUAL_WAYS: Final = USUAL_TLB[1]
"""Entries of a set."""

USUAL_WALK_CACHES: Final = USUAL_TLB[2]
"""Entries of the page-walk caches that name tables of level 1, 2 and 3."""


class TlbStatistics(NamedTuple):
    """What `Vm.follow_tlb` counted, over all vCPUs.

    A model of hardware that runs along with `Vm.run`: the engine itself walks on every access, and does what it does
    without a TLB, too.
    """

    accesses: int
    """Pages touched by loads, stores and fetches that were carried out."""
    hits: int
    """... that the TLB answered."""
    misses: int
    """... for which the CPU walked the shadow tables; a store walks once more to set D."""
    references: int
    """Entries of shadow tables that those walks read."""
    flushes: int
    """Times that KVM flushed the whole TLB of a vCPU."""

    @property
    def miss_rate(self) -> float:
        """Misses an access, 0 to 1."""
        return self.misses / self.accesses if self.accesses else 0.0

    @property
    def references_per_miss(self) -> float:
        """Entries that a walk read; a whole walk of four levels reads 4."""
        return self.references / self.misses if self.misses else 0.0


def tlb_sizes(
    entries: int, ways: int | None, walk_caches: tuple[int, int, int] | None
) -> tuple[int, int, tuple[int, int, int]]:
    """The sizes as the engine takes them.

    Raises:
        ConfigError: a number that is negative or none, or not three page-walk caches.
    """
    walk = walk_caches if walk_caches is not None else (0, 0, 0)
    if not isinstance(walk, tuple) or len(walk) != 3:
        raise ConfigError(f"walk_caches {walk_caches!r}: three sizes are expected, for tables of level 1, 2 and 3")
    one, two, three = (integer("walk_caches", size, bits=32) for size in walk)
    count = integer("entries", entries, bits=32)
    return count, count if ways is None else integer("ways", ways, bits=32), (one, two, three)
