"""translate and walk: addresses through the page tables of an image."""

from __future__ import annotations

import os
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm._core import Viewer
from shadowkvm.checks import choice, integer
from shadowkvm.errors import ConfigError
from shadowkvm.image.memory import MemoryLike, PhysicalMemory
from shadowkvm.pagetables import paging

__all__ = ["AddressWalk", "PageFlag", "Translations", "WalkFault", "WalkStep", "translate", "walk"]

# Addresses between two looks at signals.
_CHUNK: Final = 1 << 22
_ACCESSES: Final = ("read", "write", "execute")


class WalkFault(IntEnum):
    """Why an address leads nowhere."""

    NONE = 0
    """It leads somewhere."""
    NOT_PRESENT = 1
    """An entry has P clear."""
    RESERVED = 2
    """An entry has a bit set that must be clear."""
    FORBIDDEN = 3
    """The entries do not allow this access."""
    NOT_IN_IMAGE = 4
    """A table lies where the image has no memory."""
    NOT_CANONICAL = 5
    """The mode has no such address."""


class PageFlag(IntFlag):
    """Rights over all entries of a walk, and bits of the last one."""

    EXECUTE = 1
    WRITE = 2
    USER = 4
    ACCESSED = 8
    DIRTY = 16
    GLOBAL = 32


class Translations(NamedTuple):
    """What `translate` found; every array has the shape of the addresses."""

    gpa: NDArray[np.uint64]
    """Guest physical address; 0 where there is none."""
    level: NDArray[np.uint8]
    """Level of the last entry that was looked for: 1 maps 4 KiB, 2: 2 MiB (4 MiB in 32-bit mode), 3: 1 GiB; 0 for an
    address that is none of the mode's."""
    flags: NDArray[np.uint8]
    """`PageFlag` bits: the rights that all entries so far grant, and A, D and G of a leaf."""
    fault: NDArray[np.uint8]
    """`WalkFault`: 0 where the address leads somewhere."""

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which addresses lead somewhere."""
        return np.equal(self.fault, WalkFault.NONE)


class WalkStep(NamedTuple):
    """One entry of a walk."""

    level: int
    """Of the table."""
    table: int
    """The table's gpa."""
    slot: int
    """Index of the entry in it."""
    entry: int | None
    """The entry; None if the image does not have it."""
    flags: PageFlag
    """The rights that this entry and those above it grant."""

    @property
    def name(self) -> str:
        """What manuals call the entry: PML5E, PML4E, PDPTE, PDE, PTE."""
        return {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}[self.level]


class AddressWalk(NamedTuple):
    """What `walk` found."""

    gva: int
    steps: tuple[WalkStep, ...]
    """The entries that were read, from the top down."""
    gpa: int | None
    """Guest physical address; None if there is none."""
    level: int
    flags: PageFlag
    fault: WalkFault

    def __str__(self) -> str:
        width = 8 if self.gva < 1 << 32 else 16
        lines = [f"{self.gva:#0{width + 2}x}"]
        for step in self.steps:
            entry = "not in the image" if step.entry is None else f"{step.entry:#018x}"
            end = rights(step.flags) if step.entry and step.entry & 1 else ""
            lines.append(f"  {step.name:<5} {step.table:#014x}[{step.slot:4}] = {entry}  {end}".rstrip())
        if self.gpa is None:
            lines.append(f"  no translation: {describe(self.fault, self.level)}")
        else:
            lines.append(f"  gpa {self.gpa:#x}, level {self.level}, {rights(self.flags)}")
        return "\n".join(lines)


def rights(flags: int) -> str:
    """Flags as letters: r w x u, and A D G.

    >>> rights(PageFlag.WRITE | PageFlag.ACCESSED)
    'rw-s A'
    """
    who = "u" if flags & PageFlag.USER else "s"
    marks = "".join(letter for letter, bit in (("A", 8), ("D", 16), ("G", 32)) if flags & bit)
    letters = f"r{'w' if flags & PageFlag.WRITE else '-'}{'x' if flags & PageFlag.EXECUTE else '-'}{who}"
    return f"{letters} {marks}".rstrip()


def describe(fault: int, level: int) -> str:
    """A fault in words.

    >>> describe(WalkFault.NOT_PRESENT, 2)
    'the entry of level 2 is not present'
    """
    return {
        WalkFault.NONE: "none",
        WalkFault.NOT_PRESENT: f"the entry of level {level} is not present",
        WalkFault.RESERVED: f"the entry of level {level} has a reserved bit set",
        WalkFault.FORBIDDEN: f"this access is not allowed (level {level})",
        WalkFault.NOT_IN_IMAGE: f"the table of level {level} is not in the image",
        WalkFault.NOT_CANONICAL: "the mode has no such address",
    }[WalkFault(fault)]


def _viewer(mode: Any, access: str, rules: dict[str, Any]) -> Viewer:
    maxphyaddr = integer("maxphyaddr", rules.pop("maxphyaddr"), bits=16)
    switches = {name: bool(value) for name, value in rules.items()}
    return Viewer(paging(mode).name, access=choice("access", access, _ACCESSES), maxphyaddr=maxphyaddr, **switches)


def _addresses(addresses: ArrayLike) -> NDArray[np.uint64]:
    """As little-endian u64; negative ones and what is no whole number are refused."""
    array = np.asarray(addresses)
    if array.size == 0:
        return np.zeros(array.shape, np.uint64)
    if array.dtype.kind in "fO" and not isinstance(addresses, np.ndarray):
        # NumPy makes floating point of integers on both sides of 2**63.
        objects = np.asarray(addresses, object)
        if all(isinstance(item, SupportsIndex) for item in objects.flat):
            numbers = [integer(f"address {n}", item) for n, item in enumerate(objects.flat)]
            array = np.array(numbers, np.uint64).reshape(objects.shape)
    if array.dtype.kind not in "ui":
        raise TypeError(f"addresses: whole numbers from 0 to 2**64 - 1 are expected, not {array.dtype}")
    if array.dtype.kind == "i" and (negative := array < 0).any():
        where = int(np.flatnonzero(negative)[0])
        raise ConfigError(f"address {where}: {array.reshape(-1)[where]} is negative")
    return np.ascontiguousarray(array, "<u8").reshape(array.shape)


def _threads(threads: int | None) -> int:
    if threads is None:
        return os.cpu_count() or 1
    count = integer("threads", threads, bits=10)
    if not count:
        raise ConfigError("threads 0: at least 1 is needed")
    return count


def translate(
    memory: MemoryLike,
    cr3: int,
    addresses: ArrayLike,
    *,
    mode: str = "4-level",
    access: str = "read",
    user: bool = False,
    wp: bool = True,
    nx: bool = True,
    smep: bool = False,
    smap: bool = False,
    maxphyaddr: int = 52,
    threads: int | None = 1,
) -> Translations:
    """Translate many guest virtual addresses through the page tables in an image of physical memory.

    The walk is the guest's walk of KVM's ``walk_addr`` (Linux 6.1; SDM vol. 3, chapter 4): presence, reserved bits
    (Intel's, which leave alone what AMD reserves), rights. Nothing is changed: A and D bits are not set. The GIL is
    released.

    Args:
        memory: a buffer whose first byte stands at gpa 0 (bytes, mmap, NumPy array or memmap), (gpa, buffer) pairs, or
            a `PhysicalMemory`, such as `open_image` gives.
        cr3: the root: bits 12 and up (5 and up in PAE mode) are the address of the top table.
        addresses: guest virtual addresses: whole numbers, of any shape.
        mode: "4-level", "5-level", "pae" or "32-bit".
        access: what is to be allowed: "read", "write" or "execute".
        user: the access is made at CPL 3.
        wp: CR0.WP: read-only pages hold for the supervisor's stores, too.
        nx: EFER.NX: bit 63 forbids execution (without it, it is reserved).
        smep: CR4.SMEP: the supervisor does not execute what is the user's.
        smap: CR4.SMAP: the supervisor does not touch what is the user's.
        maxphyaddr: bits of a physical address, 32 to 52; those above must be clear in an entry.
        threads: how many work at a time; None is one a CPU.

    Returns:
        Arrays gpa (uint64), level, flags and fault (uint8), of the shape of the addresses.

    Raises:
        ConfigError: an unknown mode or access, a number out of range, pieces that overlap.
        TypeError: memory is no buffer; addresses are no whole numbers.

    >>> import numpy as np
    >>> memory = np.zeros(0x5000, "u1")
    >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4003, 0x4008: 0x9063}.items():
    ...     memory[table : table + 8] = np.frombuffer(entry.to_bytes(8, "little"), "u1")
    >>> found = translate(memory, 0x1000, [0x1234, 0x2000])
    >>> [hex(gpa) for gpa in found.gpa], found.level, found.fault
    (['0x9234', '0x0'], array([1, 1], dtype=uint8), array([0, 1], dtype=uint8))
    """
    image = PhysicalMemory.of(memory)
    rules = {"user": user, "wp": wp, "nx": nx, "smep": smep, "smap": smap, "maxphyaddr": maxphyaddr}
    pieces: Any = image.segments
    viewer, root, workers = _viewer(mode, access, rules), integer("cr3", cr3), _threads(threads)
    gvas = _addresses(addresses)
    count, flat = gvas.size, cast("Any", gvas.reshape(-1))
    # One array for all four: its pages come faster, because there are more of them in a row. (Any: to type checkers,
    # arrays are buffers from Python 3.12 on.)
    whole: Any = np.empty(count * 11, np.uint8)
    gpa = whole[: count * 8].view("<u8")
    level, flags, fault = whole[count * 8 :].reshape(3, count)
    for first in range(0, count, _CHUNK):
        part = slice(first, first + _CHUNK)
        viewer.translate(pieces, root, flat[part], gpa[part], level[part], flags[part], fault[part], workers)
    return Translations(*(array.reshape(gvas.shape) for array in (gpa, level, flags, fault)))


def walk(
    memory: MemoryLike,
    cr3: int,
    gva: int,
    *,
    mode: str = "4-level",
    access: str = "read",
    user: bool = False,
    wp: bool = True,
    nx: bool = True,
    smep: bool = False,
    smap: bool = False,
    maxphyaddr: int = 52,
) -> AddressWalk:
    """Walk the page tables in an image of physical memory for one address, and tell each step.

    Arguments and errors are those of `translate`; str() of the result is a table of the steps.

    >>> memory = bytearray(0x5000)
    >>> for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4003, 0x4008: 0x9063}.items():
    ...     memory[table : table + 8] = entry.to_bytes(8, "little")
    >>> print(walk(memory, 0x1000, 0x1234))
    0x00001234
      PML4E 0x000000001000[   0] = 0x0000000000002007  rwxu
      PDPTE 0x000000002000[   0] = 0x0000000000003007  rwxu
      PDE   0x000000003000[   0] = 0x0000000000004003  rwxs
      PTE   0x000000004000[   1] = 0x0000000000009063  rwxs
      gpa 0x9234, level 1, rwxs AD
    """
    image = PhysicalMemory.of(memory)
    rules = {"user": user, "wp": wp, "nx": nx, "smep": smep, "smap": smap, "maxphyaddr": maxphyaddr}
    address, pieces = integer("gva", gva), cast("Any", image.segments)
    steps, gpa, level, flags, fault = _viewer(mode, access, rules).walk(pieces, integer("cr3", cr3), address)
    told = tuple(WalkStep(*step[:4], PageFlag(step[4])) for step in steps)
    reason = WalkFault(fault)
    return AddressWalk(address, told, gpa if reason is WalkFault.NONE else None, level, PageFlag(flags), reason)
