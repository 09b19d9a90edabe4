"""The rows of a trace: op codes, flags and the row's dtype.

A trace is a one-dimensional NumPy array of `TRACE_DTYPE`; each row is one instruction of the guest (its data access,
its fetch, its register load) or one act of the host. What ``addr`` and ``value`` mean depends on ``op``, see `Op`.

>>> import numpy as np
>>> rows = np.zeros(1, TRACE_DTYPE)
>>> rows[0] = (Op.READ, 8, Flag.USER, 0, 0, 0x400000, 0)
>>> Op(int(rows["op"][0])), Flag(int(rows["flags"][0]))
(<Op.READ: 0>, <Flag.USER: 1>)
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

import numpy as np

__all__ = ["NO_PAGE", "PAGE_SIZE", "TRACE_DTYPE", "Flag", "Op"]

PAGE_SIZE: Final = 4096
"""Bytes of a guest page frame."""

NO_PAGE: Final = 0xFFFF_FFFF
"""In the gfn column of a recording: the row has no translation to check."""

TRACE_DTYPE: Final = np.dtype(
    [
        ("op", "<u1"),
        ("size", "<u1"),
        ("flags", "<u1"),
        ("vcpu", "<u1"),
        ("site", "<u4"),
        ("addr", "<u8"),
        ("value", "<u8"),
    ]
)
"""One row: 24 bytes, packed, little-endian.

op u1 (`Op`), size u1 (bytes of the access), flags u1 (`Flag`), vcpu u1 (index), site u4 (index into the table of
instruction addresses, 0: none), addr u8 (gva or gpa, bytes), value u8.
"""


class Op(IntEnum):
    """What a row does. ``addr`` is a guest virtual address (gva) unless another meaning is given.

    The codes are those of the engine's own table (``shadowkvm._core.OPS``); new ones come at the end.
    """

    READ = 0
    """Load of ``size`` bytes at ``addr``."""
    WRITE = 1
    """Store of ``value`` by an instruction that KVM counts as page-table-writing (MOV)."""
    FETCH = 2
    """Instruction fetch at ``addr``."""
    OR = 3
    """Locked read-modify-write with operand ``value``; so are the five that follow."""
    AND = 4
    XOR = 5
    ADD = 6
    XCHG = 7
    CMPXCHG = 8
    """The comparison is taken to be equal: ``value`` is stored."""
    STORE = 9
    """Store by an instruction that is not page-table-writing (PUSH, STOS, SSE)."""
    INVLPG = 10
    CR0 = 11
    """Load of ``value`` into the register; so are the three that follow."""
    CR3 = 12
    CR4 = 13
    EFER = 14
    HLT = 15
    IO = 16
    PAGE = 17
    """The host writes a whole page: ``addr`` is the gpa, ``value`` the index into the recording's pages."""
    MARK = 18
    """A mark of whoever recorded; ``value`` is its number. No effect."""
    INTR = 19
    """An interrupt was taken; ``value`` is the vector. No effect (its delivery is made of rows of its own)."""
    CLTS = 20
    """No effect on the MMU."""
    HOST_WRITE = 21
    """The host writes ``value`` (``size`` bytes) at gpa ``addr``."""
    GET_DIRTY_LOG = 22
    """``value`` is the slot."""
    SET_DIRTY_LOG = 23
    """``addr`` is the slot, ``value`` 0 or 1."""
    UNMAP = 24
    """The host drops ``value`` bytes of its memory behind gpa ``addr``."""
    QUOTA = 25
    """``value`` is the new number of shadow pages."""
    SLOT_ADD = 26
    """Slot number ``size`` at gpa ``addr``, ``value`` bytes; ``flags`` bit 0: read-only, bit 1: dirty log."""
    SLOT_DEL = 27
    """``size`` is the slot number."""


class Flag(IntFlag):
    """Bits of the ``flags`` field (of every op but SLOT_ADD, which has bits of its own)."""

    USER = 1
    """CPL 3."""
    AC = 4
    """EFLAGS.AC is set: SMAP does not forbid the access."""
    MMIO = 8
    """The recorded guest reached a device. For information only, the engine decides by its own memslots."""
    IMPLICIT = 16
    """An implicit supervisor access (IDT, GDT, TSS, descriptor loads): SMAP holds whatever AC says."""
    DELIVERY = 32
    """Made while the CPU delivers an event; USER is then the CPL before delivery."""
    KEEP = 64
    """A store whose value was not recorded: memory stays as it is, the MMU acts as for any store."""
    FAULTS = 128
    """The recorded guest took a #PF here; ``value`` is its error code."""
