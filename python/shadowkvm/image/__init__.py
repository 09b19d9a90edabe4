"""Images of physical memory (dumps, files, another simulator's memory), and walks through the page tables in them.

`translate` takes many addresses and gives arrays; `walk` tells each step of one. `open_image` reads raw dumps and the
ELF dumps of QEMU and libvirt.
"""

from __future__ import annotations

from shadowkvm.image.dump import open_image
from shadowkvm.image.memory import CpuState, PhysicalMemory
from shadowkvm.image.walks import AddressWalk, PageFlag, Translations, WalkFault, WalkStep, translate, walk

__all__ = [
    "AddressWalk",
    "CpuState",
    "PageFlag",
    "PhysicalMemory",
    "Translations",
    "WalkFault",
    "WalkStep",
    "open_image",
    "translate",
    "walk",
]
