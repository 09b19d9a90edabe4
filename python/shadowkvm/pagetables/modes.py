"""Paging modes as data: how many levels, how an address is cut, how wide an entry is.

Sources: Intel SDM vol. 3, sections 4.3 (32-bit), 4.4 (PAE), 4.5 (4-level and 5-level); AMD APM vol. 2, chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError

__all__ = ["MODES", "Level", "PagingMode", "paging"]


class Level(NamedTuple):
    """One level of tables."""

    number: int
    """1 is the last level, whose entries map 4 KiB."""
    shift: int
    """Address bits below the index: an entry covers ``1 << shift`` bytes."""
    entries: int
    """Entries of a table: 512, 1,024 (32-bit), 4 (the top of PAE)."""
    leaf: bool
    """An entry can map memory itself (at level 1 always, above it with bit PS)."""

    @property
    def size(self) -> int:
        """Bytes that an entry covers."""
        return 1 << self.shift


@dataclass(frozen=True, slots=True)
class PagingMode:
    """How a guest's page tables are built, and the control registers that select it."""

    name: str
    """Key in `MODES`."""
    levels: tuple[Level, ...]
    """From the top down."""
    entry_bytes: int
    """8, or 4 (32-bit)."""
    word: int
    """Bytes that the guest stores at once: 4 for 32-bit guests, so that PAE writes an entry in two stores."""
    physical_bits: int
    """Guest physical addresses that an entry can name."""
    kernel_half: int
    """First address of the half that Linux shares between all processes."""
    sregs: Mapping[str, int]
    """cr0, cr4 and efer that select the mode (WP on; NX on where there is one), as `Vcpu.set_sregs` takes them."""

    @property
    def nx(self) -> bool:
        """Entries have bit NX."""
        return self.entry_bytes == 8

    @property
    def top(self) -> Level:
        """The level of the table that CR3 names."""
        return self.levels[0]

    @property
    def address_bits(self) -> int:
        """Bits of a guest virtual address that are translated."""
        return self.top.shift + self.top.entries.bit_length() - 1

    @property
    def user_half(self) -> int:
        """One more than the highest address of a process's own half."""
        return 1 << (self.address_bits - 1) if self.address_bits > 32 else self.kernel_half

    @property
    def page_sizes(self) -> dict[int, Level]:
        """Sizes that can be mapped, in bytes, and the level of the entry that does it; smallest first."""
        return {level.size: level for level in reversed(self.levels) if level.leaf}

    @property
    def dtype(self) -> np.dtype[Any]:
        """An entry as NumPy sees it."""
        return np.dtype(f"<u{self.entry_bytes}")

    def level(self, number: int) -> Level:
        """The level of that number; ConfigError if there is none."""
        for level in self.levels:
            if level.number == number:
                return level
        raise ConfigError(f"level {number}: {self.name} paging has levels 1 to {self.top.number}")

    def index(self, gvas: NDArray[np.uint64], level: Level) -> NDArray[np.uint64]:
        """For each address the index into the table of that level that translates it."""
        return (gvas >> np.uint64(level.shift)) & np.uint64(level.entries - 1)

    def canonical(self, gvas: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which addresses can be translated at all: sign-extended (64-bit), or below 4 GiB."""
        if self.address_bits <= 32:
            return gvas < np.uint64(1 << self.address_bits)
        high = gvas >> np.uint64(self.address_bits - 1)
        ones = np.uint64((1 << (65 - self.address_bits)) - 1)
        out: NDArray[np.bool_] = (high == 0) | (high == ones)
        return out

    def extend(self, gvas: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Addresses of `address_bits` bits made canonical."""
        if self.address_bits <= 32:
            return gvas
        sign = gvas >> np.uint64(self.address_bits - 1) & np.uint64(1)
        high = np.uint64((1 << 64) - (1 << self.address_bits))
        return np.where(sign != 0, gvas | high, gvas)

    def is_kernel(self, gva: int) -> bool:
        """Whether the address is in the half that all processes share."""
        return gva >= self.kernel_half


_WP_PG: Final = 0x8005_0033
_PSE, _PAE, _LA57 = 1 << 4, 1 << 5, 1 << 12
_PGE: Final = 1 << 7
_NXE: Final = 1 << 11
_LONG: Final = 0xD01


def _sregs(cr4: int, efer: int) -> Mapping[str, int]:
    return MappingProxyType({"cr0": _WP_PG, "cr4": cr4, "efer": efer})


def _wide(count: int) -> tuple[Level, ...]:
    return tuple(Level(n, 12 + 9 * (n - 1), 512, n <= 3) for n in range(count, 0, -1))


_MODES: Final = (
    PagingMode("4-level", _wide(4), 8, 8, 52, 0xFFFF_8000_0000_0000, _sregs(_PAE | _PGE, _LONG)),
    PagingMode("5-level", _wide(5), 8, 8, 52, 0xFF00_0000_0000_0000, _sregs(_PAE | _PGE | _LA57, _LONG)),
    PagingMode(
        "pae",
        (Level(3, 30, 4, leaf=False), Level(2, 21, 512, leaf=True), Level(1, 12, 512, leaf=True)),
        8, 4, 52, 0xC000_0000, _sregs(_PAE | _PGE | _PSE, _NXE),
    ),
    PagingMode(
        "32-bit",
        (Level(2, 22, 1024, leaf=True), Level(1, 12, 1024, leaf=True)),
        4, 4, 32, 0xC000_0000, _sregs(_PSE | _PGE, 0),
    ),
)  # fmt: skip

MODES: Final[Mapping[str, PagingMode]] = MappingProxyType({mode.name: mode for mode in _MODES})
"""Every paging mode by its name: "4-level", "5-level", "pae", "32-bit" (with 4 MiB pages)."""


def paging(mode: str | PagingMode) -> PagingMode:
    """The mode of that name (or the mode itself).

    Raises:
        ConfigError: no such mode; the message has the nearest.

    >>> paging("pae").page_sizes[2 << 20].number
    2
    """
    if isinstance(mode, PagingMode):
        return mode
    if mode not in MODES:
        raise ConfigError(f"paging mode {mode!r} is not known{nearest(str(mode), MODES)}")
    return MODES[mode]
