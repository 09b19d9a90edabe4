"""Walks over guest tables in guest memory: many addresses at a time, one gather a level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.pagetables.entries import NX, PROTNONE, PS, A, D, P, U, W, frames, is_leaf
from shadowkvm.pagetables.memory import GuestMemory
from shadowkvm.pagetables.modes import Level, PagingMode

__all__ = ["LEAF_DTYPE", "TableRange", "Walk", "addresses", "leaves", "mark_used", "table_pages", "walk"]

LEAF_DTYPE: Final = np.dtype(
    [("gva", "<u8"), ("gpa", "<u8"), ("size", "<u8"), ("bits", "<u8"), ("slot", "<u8"), ("level", "<u1")]
)
"""One leaf entry: gva, gpa and size u8 (bytes), bits u8 (the entry without its address), slot u8 (gpa of the entry),
level u1; packed, little-endian."""

_ADDRESS_BITS: Final = 0x000F_FFFF_FFFF_F000


class Walk(NamedTuple):
    """What the tables say of addresses; every array has the shape of the addresses."""

    gpa: NDArray[np.uint64]
    """Guest physical address that the address leads to; 0 where it leads nowhere."""
    present: NDArray[np.bool_]
    """It leads somewhere."""
    write: NDArray[np.bool_]
    """Every entry on the way allows stores."""
    user: NDArray[np.bool_]
    """... accesses at CPL 3."""
    execute: NDArray[np.bool_]
    """... instruction fetches."""
    level: NDArray[np.uint8]
    """Level of the last entry that was read; 0 for an address that is not canonical."""
    slot: NDArray[np.uint64]
    """gpa of the last entry that was read."""
    entry: NDArray[np.uint64]
    """That entry."""
    accessed: NDArray[np.bool_]
    """A is set in every entry on the way (in the top ones of PAE there is none)."""


def addresses(gvas: ArrayLike) -> NDArray[np.uint64]:
    """Addresses as uint64, at least one-dimensional."""
    return np.atleast_1d(np.asarray(gvas, np.uint64))


def walk(memory: GuestMemory, root: int, gvas: NDArray[np.uint64]) -> Walk:
    """Walk the tables from ``root`` for each address, changing nothing."""
    mode = memory.mode
    shape = gvas.shape
    table: NDArray[np.uint64] = np.full(shape, root, np.uint64)
    active = mode.canonical(gvas)
    gpa, slot, entry = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
    rights = np.full(shape, W | U | A, np.uint64)
    no_execute, present, level_of = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.uint8)
    for level in mode.levels:
        here = table + mode.index(gvas, level) * np.uint64(mode.entry_bytes)
        whole = bool(active.all())
        if whole:
            # The usual case near the top: every address gets this far.
            read = memory.read(here)
            slot, entry = here, read
            level_of[:] = level.number
        elif not active.any():
            break
        else:
            read = memory.read(np.where(active, here, 0))
            slot, entry = np.where(active, here, slot), np.where(active, read, entry)
            level_of[active] = level.number
        active = active & (read & np.uint64(P) != 0)
        # A PDPTE of PAE grants everything: its rights bits are reserved.
        if level.entries > 4:
            rights &= np.where(active, read, ~np.uint64(0))
            no_execute |= active & (read >= np.uint64(NX))
        if level.leaf:
            leaf = active & is_leaf(level, read)
            inside = gvas & np.uint64(level.size - 1)
            gpa = np.where(leaf, frames(mode, level, read, leaf=True) | inside, gpa)
            present |= leaf
            active &= ~leaf
        table = frames(mode, level, read, leaf=False)
    return Walk(
        gpa,
        present,
        present & (rights & np.uint64(W) != 0),
        present & (rights & np.uint64(U) != 0),
        present & ~no_execute,
        level_of,
        slot,
        entry,
        present & (rights & np.uint64(A) != 0),
    )


def mark_used(memory: GuestMemory, root: int, gvas: NDArray[np.uint64], written: NDArray[np.bool_]) -> None:
    """Set A in every entry on the way and D in the last one where ``written``, as the CPU does; no store is noted."""
    mode = memory.mode
    table = np.full(gvas.shape, root, np.uint64)
    for level in mode.levels:
        slots = table + mode.index(gvas, level) * np.uint64(mode.entry_bytes)
        read = memory.read(slots)
        leaf = is_leaf(level, read)
        if level.entries > 4:
            young = (read & np.uint64(P) != 0) & (read & np.uint64(A) == 0)
            memory.poke(slots[young], read[young] | np.uint64(A))
        clean = leaf & written & (read & np.uint64(D) == 0)
        # Read again: an address may be in the list twice, once for a load.
        memory.poke(slots[clean], memory.read(slots[clean]) | np.uint64(D))
        more = (read & np.uint64(P) != 0) & ~leaf
        gvas, written = gvas[more], written[more]
        table = frames(mode, level, read[more], leaf=False)
        if not len(gvas):
            break


class TableRange(NamedTuple):
    """The tables of one level: gpa of each, and the first address that each translates; uint64, one length."""

    level: Level
    gpa: NDArray[np.uint64]
    base: NDArray[np.uint64]


def table_pages(memory: GuestMemory, root: int, start: int, end: int) -> Iterator[TableRange]:
    """The tables that translate [start, end), level by level from the top (which is always there)."""
    mode = memory.mode
    base = np.uint64(start) & ~np.uint64((1 << mode.address_bits) - 1)
    # The top table covers every address: its base is that of the half in which `start` is.
    found = TableRange(mode.top, np.array([root], np.uint64), np.array([base], np.uint64))
    yield found
    for level, below in zip(mode.levels, mode.levels[1:], strict=False):
        slots, gvas = entry_slots(mode, found, start, end)
        read = memory.read(slots)
        leads = (read & np.uint64(P) != 0) & ~is_leaf(level, read)
        found = TableRange(below, frames(mode, level, read[leads], leaf=False), gvas[leads])
        if not len(found.gpa):
            return
        yield found


def entry_slots(
    mode: PagingMode, tables: TableRange, start: int, end: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The entries of ``tables`` that reach into [start, end): gpa of each entry, and its first address."""
    level = tables.level
    if start < mode.user_half:
        # Behind it comes what is no address at all.
        end = min(end, mode.user_half)
    first, last = 0, level.entries
    if len(tables.base) == 1:
        base = int(tables.base[0])
        first = min(last, max(0, (start - base) >> level.shift))
        last = min(last, max(first, (end - 1 - base >> level.shift) + 1)) if end > start else first
    index = np.arange(first, last, dtype=np.uint64)
    gvas = (tables.base[:, None] + (index << np.uint64(level.shift))[None, :]).reshape(-1)
    slots = (tables.gpa[:, None] + (index * np.uint64(mode.entry_bytes))[None, :]).reshape(-1)
    if len(tables.base) == 1:
        return slots, gvas
    # The top of the address space: `end` may be 2**64.
    inside = gvas + np.uint64(level.size - 1)
    wanted = (inside >= np.uint64(start)) & (gvas <= np.uint64(end - 1)) if end > start else np.zeros(len(gvas), bool)
    return slots[wanted], gvas[wanted]


def leaves(memory: GuestMemory, root: int, start: int, end: int, *, hidden: bool = False) -> NDArray[np.void]:
    """Every leaf entry that maps some of [start, end): LEAF_DTYPE, in the order of addresses.

    ``hidden``: also entries that would, were they present (`PROTNONE`).
    """
    mode = memory.mode
    out: list[NDArray[np.void]] = []
    base = np.uint64(start) & ~np.uint64((1 << mode.address_bits) - 1)
    tables = TableRange(mode.top, np.array([root], np.uint64), np.array([base], np.uint64))
    for level, below in zip(mode.levels, (*mode.levels[1:], mode.top), strict=True):
        slots, gvas = entry_slots(mode, tables, start, end)
        read = memory.read(slots)
        leaf = is_leaf(level, read)
        leads = (read & np.uint64(P) != 0) & ~leaf
        if hidden:
            leaf |= is_leaf(level, read | np.uint64(P)) & (read & np.uint64(P | PROTNONE) == PROTNONE)
        if leaf.any():
            rows = np.zeros(int(np.count_nonzero(leaf)), LEAF_DTYPE)
            rows["gva"], rows["slot"], rows["size"] = gvas[leaf], slots[leaf], level.size
            rows["gpa"] = frames(mode, level, read[leaf], leaf=True)
            rows["bits"] = read[leaf] & ~np.uint64(_ADDRESS_BITS | (PS if level.number > 1 else 0))
            rows["level"] = level.number
            out.append(rows)
        if not leads.any():
            break
        tables = TableRange(below, frames(mode, level, read[leads], leaf=False), gvas[leads])
    if len(out) < 2:
        return out[0] if out else np.zeros(0, LEAF_DTYPE)
    found = np.concatenate(out)
    return found[np.argsort(found["gva"], kind="stable")]
