"""Tables: the tree of tables under one top table (or two, under KPTI), and how Linux makes and frees its parts."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.ops import PAGE_SIZE, Op
from shadowkvm.pagetables.entries import NX, PS, P, frames, is_leaf, leaf_entries, table_entry
from shadowkvm.pagetables.memory import GuestMemory
from shadowkvm.pagetables.modes import Level, PagingMode
from shadowkvm.pagetables.walk import TableRange, entry_slots, table_pages

__all__ = ["END", "Tables"]

END: Final = 1 << 64
_LOW_BITS: Final = 0xFFF | NX


class Tables:
    """A top table and what hangs from it; `AddressSpace` is what maps with it.

    Top entries of the kernel half are copies of another space's, and follow it: a store to one is followed by stores to
    all (``sync_global_pgds``).
    """

    def __init__(
        self, memory: GuestMemory, *, kernel: Tables | None, kpti: bool, user_kernel: Tables | None = None
    ) -> None:
        if kpti and memory.mode.address_bits <= 32:
            raise ConfigError(f"kpti: {memory.mode.name} paging cannot have it, only 64-bit guests can")
        for what, owner in (("kernel", kernel), ("user_kernel", user_kernel)):
            if owner is not None and owner.memory is not memory:
                raise ConfigError(f"{what}: the space is in another memory")
        self.memory: GuestMemory = memory
        self.kernel, self.user_kernel = kernel, user_kernel
        # Top tables that copy the kernel half of this space, in the order in which they came.
        self._followers: dict[int, None] = {}
        if kpti:
            self.root = memory.frames.take_pair() << 12
            self.user_root = self.root + PAGE_SIZE
            memory.clear(self.root)
            memory.clear(self.user_root)
        else:
            self.root = self.user_root = memory.new_table()
        for owner, root in self._owners():
            owner.share(root)

    @property
    def mode(self) -> PagingMode:
        """The paging mode."""
        return self.memory.mode

    @property
    def limit(self) -> int:
        """One more than the highest address."""
        return END if self.mode.address_bits > 32 else 1 << self.mode.address_bits

    @property
    def kpti(self) -> bool:
        """User code runs on a top table of its own."""
        return self.user_root != self.root

    def tables(self) -> list[int]:
        """Where the tables of the user half are (without `kernel`, of both halves): gpas, the top one first."""
        halves = [(0, self.mode.user_half)]
        if self.kernel is None:
            halves.append((self.mode.kernel_half, self.limit))
        found: dict[int, None] = {}
        for start, end in halves:
            for tables in table_pages(self.memory, self.root, start, end):
                found.update(dict.fromkeys(tables.gpa.tolist()))
        return list(found)

    # -- making ---------------------------------------------------------------------------------------------------

    def ensure(self, start: int, end: int, level: int = 1) -> TableRange:
        """Make the tables of ``level`` that [start, end) needs, and those above them; split large pages in the way.

        Returns:
            The tables of that level, in the order of addresses.
        """
        mode = self.mode
        base = start & ~((1 << mode.address_bits) - 1)
        found = TableRange(mode.top, np.array([self.root], np.uint64), np.array([base], np.uint64))
        for here, below in zip(mode.levels, mode.levels[1:], strict=False):
            if here.number <= level:
                break
            slots, gvas = entry_slots(mode, found, start, end)
            read = self.memory.read(slots)
            for at in np.flatnonzero(is_leaf(here, read)).tolist():
                self.split(here, int(slots[at]), int(gvas[at]))
            missing = read & np.uint64(P) == 0
            self._link(here, slots[missing], gvas[missing])
            found = TableRange(below, frames(mode, here, self.memory.read(slots), leaf=False), gvas)
        return found

    def _link(self, level: Level, slots: NDArray[np.uint64], gvas: NDArray[np.uint64]) -> None:
        """Hang a new, empty table from each of these entries (``pmd_populate`` and its like)."""
        if not len(slots):
            return
        user = not self.mode.is_kernel(int(gvas[0]))
        if not self.memory.logged:
            tables = self.memory.new_tables(len(slots))
            self.store(level, slots, tables | np.uint64(table_entry(self.mode, level, 0, user=user)), int(gvas[0]))
            return
        for at in range(len(slots)):
            entry = table_entry(self.mode, level, self.memory.new_table(), user=user)
            self.store(level, slots[at : at + 1], entry, int(gvas[at]))

    def split(self, level: Level, slot: int, gva: int) -> None:
        """Replace the large page at ``gva`` by a table that maps the same memory with the same rights."""
        mode, below = self.mode, self.mode.level(level.number - 1)
        entry = np.array([slot], np.uint64)
        old = self.memory.read(entry)
        first = int(frames(mode, level, old, leaf=True)[0])
        if first + level.size > 1 << mode.physical_bits:
            raise ConfigError(f"gva {gva:#x}: 4 KiB pages of {mode.name} paging do not reach gpa {first:#x}")
        count = np.arange(below.entries, dtype=np.uint64)
        table = self.memory.new_table()
        bits = int(old[0]) & _LOW_BITS & ~PS
        small = leaf_entries(mode, below, np.uint64(first) + count * np.uint64(below.size), bits)
        self.memory.write(np.uint64(table) + count * np.uint64(mode.entry_bytes), small)
        self.store(level, entry, table_entry(mode, level, table, user=not mode.is_kernel(gva)), gva)

    # -- freeing --------------------------------------------------------------------------------------------------

    def free_tables(
        self, start: int, end: int, *, floor: int = 0, ceiling: int | None = None, highest: int | None = None
    ) -> NDArray[np.uint64]:
        """Unlink the tables under [start, end) that are empty and lie within [floor, ceiling), from the bottom up.

        Linux goes by the neighbouring mappings, floor and ceiling, and so keeps an empty table that a neighbour shares
        (``free_pgtables``). Tables above level ``highest`` stay.

        Returns:
            Their frames (gfn), which are nobody's now: uint64. Give them back once the guest has flushed.
        """
        mode, last = self.mode, (self.limit if ceiling is None else ceiling) - 1
        freed = [np.zeros(0, np.uint64)]
        if start >= end:
            return freed[0]
        for below, here in zip(mode.levels[:0:-1], mode.levels[-2::-1], strict=True):
            if below.number > (highest or below.number):
                break
            for tables in list(table_pages(self.memory, self.root, start, end)):
                if tables.level is not here:
                    continue
                slots, gvas = entry_slots(mode, tables, start, end)
                read = self.memory.read(slots)
                leads = (read & np.uint64(P) != 0) & ~is_leaf(here, read)
                inside = (gvas >= np.uint64(floor)) & (gvas + np.uint64(here.size - 1) <= np.uint64(last))
                at = np.flatnonzero(leads & inside)
                children = frames(mode, here, read[at], leaf=False)
                empty = np.array([not self.memory.table(gpa)[: below.entries].any() for gpa in children.tolist()], bool)
                if empty.any():
                    self.store(here, slots[at][empty], 0, int(gvas[at[0]]))
                    freed.append(children[empty] >> np.uint64(12))
        return np.concatenate(freed)

    def detach(self) -> NDArray[np.uint64]:
        """The frames (gfn) of every table of the user half, the top one last: nobody's now. No store is made."""
        tables = self.tables()
        for owner, root in self._owners():
            owner.unshare(root)
        roots = [self.root, self.user_root] if self.kpti else [self.root]
        rest = [gpa for gpa in tables if gpa not in roots]
        return np.array(rest + roots, np.uint64) >> np.uint64(12)

    def destroy(self) -> None:
        """Give every table of the user half back to the memory. The space is gone then."""
        self.memory.frames.give(self.detach())

    # -- stores ---------------------------------------------------------------------------------------------------

    def store(self, level: Level, slots: NDArray[np.uint64], entries: Any, gva: int) -> None:
        """Store entries of one level by MOV; those of the top one also in each of its copies.

        Args:
            level: of the entries.
            slots: gpas of the entries (in the top table: in that of `root`).
            entries: uint64, one for each, or one for all.
            gva: an address that one of them translates; all are of the same half.
        """
        values = np.broadcast_to(np.asarray(entries, np.uint64), slots.shape)
        if level is self.mode.top and self.kpti and not self.mode.is_kernel(gva):
            # pti_set_user_pgtbl: the user's copy first; the kernel's own gets NX.
            self.memory.write(slots + np.uint64(self.user_root - self.root), values)
            values = np.where(values & np.uint64(P) != 0, values | np.uint64(NX), values)
        self.memory.write(slots, values)
        if level is self.mode.top:
            self.follow(slots)

    def follow(self, slots: NDArray[np.uint64]) -> None:
        """Store those of ``slots`` that are top entries of the kernel half once more in every copy of them."""
        mode = self.mode
        at = slots - np.uint64(self.root)
        first = (mode.kernel_half >> mode.top.shift & mode.top.entries - 1) * mode.entry_bytes
        mine = at[(at >= np.uint64(first)) & (at < np.uint64(mode.top.entries * mode.entry_bytes))]
        if not len(mine):
            return
        values = self.memory.read(np.uint64(self.root) + mine)
        for root in self._followers:
            self.memory.write(np.uint64(root) + mine, values)

    def _owners(self) -> list[tuple[Tables, int]]:
        """Whose kernel half each top table copies."""
        pairs = ((self.kernel, self.root), (self.user_kernel, self.user_root))
        return [(owner, root) for owner, root in pairs if owner is not None]

    def share(self, root: int) -> None:
        """Copy the top entries of the kernel half into the new top table at ``root`` (``pgd_ctor``, a memcpy).

        From then on they follow those here, until `unshare`.
        """
        mode = self.mode
        first = mode.kernel_half >> mode.top.shift & mode.top.entries - 1
        used = np.flatnonzero(self.memory.table(self.root)[: mode.top.entries])
        at = used[used >= first].astype(np.uint64) * np.uint64(mode.entry_bytes)
        self.memory.write(np.uint64(root) + at, self.memory.read(np.uint64(self.root) + at), Op.STORE)
        self._followers[root] = None

    def unshare(self, root: int) -> None:
        """The top table at ``root`` is gone."""
        self._followers.pop(root, None)
