"""AddressSpace: a guest's page tables, built, changed, cloned and taken down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.checks import integer
from shadowkvm.errors import ConfigError
from shadowkvm.ops import PAGE_SIZE, Op
from shadowkvm.pagetables.entries import NX, A, Rights, U, W, leaf_entries
from shadowkvm.pagetables.memory import GuestMemory, interleave
from shadowkvm.pagetables.tables import END, Tables
from shadowkvm.pagetables.walk import Walk, addresses, entry_slots, leaves, mark_used, walk

if TYPE_CHECKING:
    from shadowkvm._core import Vcpu
    from shadowkvm.vm import Vm

__all__ = ["AddressSpace", "Mapped", "set_registers"]


class Mapped(NamedTuple):
    """A run of pages, one after the other in both address spaces, with the same rights."""

    gva: int
    gpa: int
    size: int
    page_size: int
    write: bool
    user: bool
    nx: bool

    def __str__(self) -> str:
        rights = f"{'w' if self.write else '-'}{'-' if self.nx else 'x'}{'u' if self.user else '-'}"
        unit = f"{self.page_size >> 20}M" if self.page_size >= 1 << 20 else "4K"
        return f"{self.gva:#018x} -> {self.gpa:#012x} {self.size >> 10:>9,} KiB  {rights}  {unit}"


class AddressSpace(Tables):
    """One top table and what hangs from it: a process of the guest, or its kernel.

    All changes are stores to ``memory``, in the order in which Linux would make them, and end up in its logs.

    Args:
        memory: the guest's memory; it knows the paging mode.
        kernel: the space whose kernel half this one shares. Its top entries are copied, and follow it from then on.
        kpti: make a second top table, as Linux does against Meltdown (``CONFIG_PAGE_TABLE_ISOLATION``): `user_root` is
            what user code runs on; it has the user half, and of the kernel half what ``user_kernel`` has.
        user_kernel: with ``kpti``: the space whose kernel half the second top table shares.

    >>> memory = GuestMemory(64 << 20)
    >>> space = AddressSpace(memory)
    >>> space.map(0x400000, 0x200000, 16 << 10, write=False)
    >>> space.map(0x80000000, 0x800000, 2 << 20, nx=True, page_size=2 << 20)
    >>> print(space)
    0x0000000000400000 -> 0x0000200000        16 KiB  -xu  4K
    0x0000000080000000 -> 0x0000800000     2,048 KiB  w-u  2M
    >>> space.protect(0x401000, 4096, write=True)
    >>> hex(space.translate([0x401234])[0]), bool(space.walk([0x401234]).write[0])
    ('0x201234', True)
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        kernel: AddressSpace | None = None,
        kpti: bool = False,
        user_kernel: AddressSpace | None = None,
    ) -> None:
        super().__init__(memory, kernel=kernel, kpti=kpti, user_kernel=user_kernel)

    # -- what is there --------------------------------------------------------------------------------------------

    @property
    def sregs(self) -> dict[str, int]:
        """The control registers that run this space: cr0, cr3, cr4, efer, for `Vcpu.set_sregs`."""
        return {**self.mode.sregs, "cr3": self.root}

    def walk(self, gvas: ArrayLike, *, user_root: bool = False) -> Walk:
        """What the tables say of addresses (bytes, uint64, shape (n,)), from `root` or from `user_root`."""
        return walk(self.memory, self.user_root if user_root else self.root, addresses(gvas))

    def translate(self, gvas: ArrayLike) -> NDArray[np.uint64]:
        """Guest physical addresses of ``gvas``: uint64, shape (n,); 2**64 - 1 where nothing is mapped."""
        found = self.walk(gvas)
        return np.where(found.present, found.gpa, np.uint64(END - 1))

    def leaves(self, gva: int = 0, end: int | None = None, *, hidden: bool = False) -> NDArray[np.void]:
        """Every leaf entry of the user half (or of what reaches into [gva, end)): LEAF_DTYPE, by address.

        ``hidden``: also those that Linux keeps, but not present, while a mapping allows nothing (``PROT_NONE``).
        """
        return leaves(self.memory, self.root, gva, self.mode.user_half if end is None else end, hidden=hidden)

    def mappings(self, *, kernel: bool = False) -> list[Mapped]:
        """What is mapped in the user half (or the kernel half), as few runs as can be."""
        return _runs(self.leaves(self.mode.kernel_half, self.limit) if kernel else self.leaves())

    def __str__(self) -> str:
        return "\n".join(map(str, self.mappings())) or "nothing is mapped"

    def __repr__(self) -> str:
        found = self.leaves()
        return f"<AddressSpace {self.mode.name}, root {self.root:#x}, {int(found['size'].sum()) >> 10:,} KiB mapped>"

    # -- changes --------------------------------------------------------------------------------------------------

    def map(
        self,
        gva: int,
        gpa: int | ArrayLike,
        size: int,
        *,
        write: bool = True,
        user: bool = True,
        nx: bool = False,
        page_size: int = PAGE_SIZE,
        global_: bool = False,
        accessed: bool = True,
        dirty: bool | None = None,
    ) -> None:
        """Map ``size`` bytes at ``gva``; what was mapped there before is replaced, missing tables are made.

        Args:
            gva: guest virtual address (bytes), a multiple of ``page_size``.
            gpa: guest physical address of the first byte (the rest follows), or one for each page: uint64, shape
                (size / page_size,).
            size: bytes, a multiple of ``page_size``.
            write, user, nx: rights. Linux's tables above the last level grant everything, so the leaf decides.
            page_size: one of `PagingMode.page_sizes`: 4 KiB, 2 MiB, 1 GiB; 4 MiB in 32-bit mode.
            global_: bit G.
            accessed, dirty: preset A and D; ``dirty`` None: if writable.

        Raises:
            ConfigError: an address, size or right that cannot be, or a range of the kernel half of another space.
        """
        if page_size not in self.mode.page_sizes:
            known = ", ".join(f"{size:#x}" for size in self.mode.page_sizes)
            raise ConfigError(f"page_size {page_size:#x}: {self.mode.name} paging has {known}")
        level = self.mode.page_sizes[page_size]
        start, end = self._range(gva, size, page_size)
        gpas = self._gpas(gpa, size // page_size, page_size)
        self._check_nx(nx=nx)
        if start == end:
            return
        if level.number > 1:
            # A table in the way goes, and what it maps with it.
            self.unmap(start, end - start)
        bits = Rights(write, user, nx, global_, accessed, dirty).bits()
        slots, _ = entry_slots(self.mode, self.ensure(start, end, level.number), start, end)
        self.store(level, slots, leaf_entries(self.mode, level, gpas, bits), start)

    def unmap(self, gva: int, size: int, *, tables: bool = True, final: bool = False) -> None:
        """Take down what is mapped in the range; a large page that reaches out of it is split first.

        Args:
            gva, size: the range (bytes), multiples of 4,096.
            tables: give back tables that are then empty (``free_pgtables``).
            final: the whole space is going away: entries are cleared by MOV, as in ``exit_mmap``, not by XCHG.
        """
        start, end = self._range(gva, size, PAGE_SIZE)
        slots = self._inner_leaves(start, end)["slot"].copy()
        self.memory.write(slots, 0, Op.WRITE if final else Op.XCHG)
        self.follow(slots)
        if tables:
            self.memory.frames.give(self.free_tables(start, end))

    def protect(
        self, gva: int, size: int, *, write: bool | None = None, user: bool | None = None, nx: bool | None = None
    ) -> None:
        """Change rights of what is mapped in the range (None: as they are); holes stay holes.

        Each entry is cleared by XCHG and then stored, as ``change_pte_range`` does.
        """
        start, end = self._range(gva, size, PAGE_SIZE)
        self._check_nx(nx=nx)
        slots = self._inner_leaves(start, end)["slot"].copy()
        keep, add = (1 << 64) - 1, 0
        for wanted, bit in ((write, W), (user, U), (nx, NX)):
            if wanted is not None:
                keep &= ~bit
                add |= bit if wanted else 0
        entries = (self.memory.read(slots) & np.uint64(keep)) | np.uint64(add)
        cleared = self.memory.write(slots, 0, Op.XCHG, log=False)
        self.memory.note(interleave(cleared, self.memory.write(slots, entries, log=False)))
        self.follow(slots)

    def clone(
        self, *, cow: bool = True, shared: Iterable[tuple[int, int]] = (), accessed: bool = False
    ) -> AddressSpace:
        """A copy of the user half, as fork makes it; the kernel half is shared as here.

        Args:
            cow: take write permission away on both sides, so that the first store to a page faults; False: both may
                go on writing to the same memory.
            shared: ranges (start, end) that stay writable (``MAP_SHARED``).
            accessed: leave A set in the copies. Linux clears it.

        >>> space = AddressSpace(GuestMemory(64 << 20))
        >>> space.map(0x400000, 0x200000, 4096)
        >>> child = space.clone()
        >>> print(child)
        0x0000000000400000 -> 0x0000200000         4 KiB  -xu  4K
        """
        kernel, user_kernel = self.kernel, self.user_kernel
        child = type(self)(self.memory, kernel=kernel, kpti=self.kpti, user_kernel=user_kernel)  # type: ignore[arg-type]
        self.clone_range(child, 0, self.mode.user_half, cow=cow, shared=shared, accessed=accessed)
        return child

    def clone_range(
        self,
        child: AddressSpace,
        start: int,
        end: int,
        *,
        cow: bool = True,
        shared: Iterable[tuple[int, int]] = (),
        accessed: bool = False,
    ) -> None:
        """Copy what is mapped in [start, end) of the user half into ``child``, table by table (``copy_page_range``).

        Entry by entry the parent's is write-protected (a locked AND of one byte), then the child's is stored.
        """
        found = self.leaves(start, end, hidden=True)
        protect = np.full(len(found), cow)
        for first, last in shared:
            protect &= (found["gva"] < np.uint64(first)) | (found["gva"] >= np.uint64(last))
        for run in _by_table(found):
            level = self.mode.level(int(found["level"][run.start]))
            gvas, slots = found["gva"][run].copy(), found["slot"][run].copy()
            tables = child.ensure(int(gvas[0]), int(gvas[0]) + level.size, level.number)
            there = tables.gpa[0] + self.mode.index(gvas, level) * np.uint64(self.mode.entry_bytes)
            self._copy_entries(slots, there, protect[run], accessed=accessed)

    def _copy_entries(
        self, slots: NDArray[np.uint64], there: NDArray[np.uint64], protect: NDArray[np.bool_], *, accessed: bool
    ) -> None:
        memory = self.memory
        entries = memory.read(slots)
        at = np.flatnonzero(protect & (entries & np.uint64(W) != 0))
        copies = entries if accessed else entries & ~np.uint64(A)
        copies[at] &= ~np.uint64(W)
        protected = memory.write_protect(slots[at], log=False)
        memory.note(interleave((protected, at), memory.write(there, copies, log=False)))

    def touch(self, gvas: ArrayLike, *, write: bool | NDArray[np.bool_] = False) -> None:
        """Set A on the way to each address, and D where it is written, as the CPU does when user code goes there."""
        used = addresses(gvas)
        mark_used(self.memory, self.user_root, used, np.broadcast_to(np.asarray(write, np.bool_), used.shape))

    def install(self, vm: Vm, vcpu: int | None = None) -> None:
        """Write the memory into ``vm`` and give vCPU ``vcpu`` (None: all of them) the registers of this space."""
        self.memory.install(vm)
        for cpu in vm.vcpus if vcpu is None else (vm.vcpus[vcpu],):
            set_registers(cpu, self.sregs)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _range(self, gva: int, size: int, unit: int) -> tuple[int, int]:
        """The range as (start, end), checked."""
        start, length = integer("gva", gva), integer("size", size)
        end, half = start + length, self.mode.kernel_half
        for what, value in (("gva", start), ("size", length)):
            if value % unit:
                raise ConfigError(f"{what} {value:#x} is not a multiple of the page size {unit:#x}")
        inside = end <= self.limit and not start < half < end
        if not inside or not self.mode.canonical(np.array([start, max(start, end - 1)], np.uint64)).all():
            raise ConfigError(f"{start:#x} to {end:#x} is not inside one half of the {self.mode.name} address space")
        if start >= half and self.kernel is not None:
            raise ConfigError(
                f"gva {start:#x} is in the kernel half, which belongs to the kernel's own space: map there"
            )
        return start, end

    def _gpas(self, gpa: int | ArrayLike, count: int, unit: int) -> NDArray[np.uint64]:
        if np.ndim(gpa) == 0:
            first = integer("gpa", gpa)  # type: ignore[arg-type]  # no dimensions: one number
            gpas = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(unit)
        else:
            gpas = np.asarray(gpa, np.uint64)
        if gpas.shape != (count,):
            raise ConfigError(f"gpa has shape {gpas.shape}; ({count},) is expected, one for each page")
        limit = 1 << (36 if self.mode.entry_bytes == 4 and unit > PAGE_SIZE else self.mode.physical_bits)
        checks = (
            (gpas % np.uint64(unit), f"is not a multiple of {unit:#x}"),
            (gpas // np.uint64(limit), "is too high"),
        )
        for bad, why in checks:
            if bad.any():
                raise ConfigError(f"gpa {int(gpas[int(np.argmax(bad != 0))]):#x} {why} (the limit is {limit:#x})")
        return gpas

    def _check_nx(self, *, nx: bool | None) -> None:
        if nx and not self.mode.nx:
            raise ConfigError(f"nx: entries of {self.mode.name} paging have no such bit")

    def _inner_leaves(self, start: int, end: int) -> NDArray[np.void]:
        """The leaves inside the range, after large ones that reach out of it were split."""
        while True:
            found = self.leaves(start, end)
            last = found["gva"] + (found["size"] - np.uint64(1))
            out = (found["gva"] < np.uint64(start)) | (last > np.uint64(max(end, 1) - 1))
            for row in found[out]:
                self.split(self.mode.level(int(row["level"])), int(row["slot"]), int(row["gva"]))
            if not out.any():
                return found


def set_registers(cpu: Vcpu, sregs: Mapping[str, int]) -> None:
    """Give a vCPU control registers: cr0, cr3, cr4, efer."""
    cpu.set_sregs(cr0=sregs["cr0"], cr3=sregs["cr3"], cr4=sregs["cr4"], efer=sregs["efer"])


def _by_table(found: NDArray[np.void]) -> Iterator[slice]:
    """Runs of leaves whose entries are in the same table."""
    cuts = np.flatnonzero(np.diff(found["slot"] >> np.uint64(12))) + 1
    bounds = [0, *cuts.tolist(), len(found)] if len(found) else []
    for first, last in pairwise(bounds):
        yield slice(first, last)


def _runs(found: NDArray[np.void]) -> list[Mapped]:
    """Leaves joined where both addresses go on and the rights are the same."""
    if not len(found):
        return []
    rights = found["bits"] & np.uint64(W | U | NX)
    following = found[:-1]
    same = (following["gva"] + following["size"] == found["gva"][1:]) & (rights[:-1] == rights[1:])
    same &= (following["gpa"] + following["size"] == found["gpa"][1:]) & (following["size"] == found["size"][1:])
    first = np.concatenate(([0], np.flatnonzero(~same) + 1))
    counts = np.diff(np.append(first, len(found)))
    out = []
    for row, right, count in zip(found[first], rights[first].tolist(), counts.tolist(), strict=True):
        size = int(row["size"])
        flags = bool(right & W), bool(right & U), bool(right & NX)
        out.append(Mapped(int(row["gva"]), int(row["gpa"]), size * count, size, *flags))
    return out
