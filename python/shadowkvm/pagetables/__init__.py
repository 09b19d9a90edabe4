r"""Page tables of a guest, built in Python: every paging mode, and the stores that a kernel would make.

>>> import shadowkvm as sk
>>> from shadowkvm.pagetables import AddressSpace, GuestMemory
>>> memory = GuestMemory(64 << 20)
>>> space = AddressSpace(memory)
>>> space.map(0x400000, 0x1000000, 4 << 20)
>>> vm = sk.Vm(memory.size)
>>> space.install(vm)
>>> vm.vcpus[0].write(0x400000, 7, user=True).status, vm.read_memory(0x1000000, 1)
('done', b'\x07')

`AddressSpace` maps, protects, unmaps and clones; `GuestMemory` has the frames and the log of stores; `MODES` are the
paging modes. `shadowkvm.guest` puts a small operating system on top of them.
"""

from __future__ import annotations

from shadowkvm.pagetables.entries import Rights
from shadowkvm.pagetables.frames import FramePool, Reuse
from shadowkvm.pagetables.memory import GuestMemory
from shadowkvm.pagetables.modes import MODES, Level, PagingMode, paging
from shadowkvm.pagetables.space import AddressSpace, Mapped, set_registers
from shadowkvm.pagetables.tables import Tables
from shadowkvm.pagetables.walk import LEAF_DTYPE, Walk
from shadowkvm.pagetables.weave import Weave, make_rows

__all__ = [
    "LEAF_DTYPE",
    "MODES",
    "AddressSpace",
    "FramePool",
    "GuestMemory",
    "Level",
    "Mapped",
    "PagingMode",
    "Reuse",
    "Rights",
    "Tables",
    "Walk",
    "Weave",
    "make_rows",
    "paging",
    "set_registers",
]
