"""Where Linux puts things: the kernel's regions and a process's, for each paging mode.

Addresses: Linux's Documentation/x86/x86_64/mm.rst for 64-bit guests (without KASLR), the 3 GiB / 1 GiB split for
32-bit ones. Guest physical addresses are this model's own: low memory is kept small, so that small guests fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["LAYOUTS", "Layout"]

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest virtual addresses (bytes) of one paging mode, and the few guest physical ones that are fixed."""

    direct: int
    """All of memory, one to one."""
    direct_size: int
    """As much as fits there."""
    text: int
    """The kernel's code."""
    data: int
    """Its data."""
    vmalloc: int
    """Mapped page by page: kernel stacks, vmalloc, devices."""
    vmalloc_size: int
    vmemmap: int
    """The struct pages, 64 bytes a frame; 0: they are reached through the direct map."""
    entry: int
    """cpu_entry_area: IDT, TSS and entry stacks; with the entry code all that KPTI leaves visible."""
    stack_top: int
    """A process's stack ends here."""
    mmap_top: int
    """mmap looks for room from here downwards: below all places that the stack may be moved to."""
    program: int
    """A program's first page."""

    text_gpa: int = 4 * MIB
    data_gpa: int = 8 * MIB
    struct_pages_gpa: int = 12 * MIB
    image_size: int = 4 * MIB
    """Bytes of the kernel's code, and as many of its data."""


_USER_64: Final = {"stack_top": 0x7FFF_FFFF_F000, "mmap_top": 0x7FFB_F7FF_F000, "program": 0x40_0000}
_USER_32: Final = {"stack_top": 0xBFFF_F000, "mmap_top": 0xB7FF_F000, "program": 0x0804_8000}
_IMAGE_64: Final = {
    "text": 0xFFFF_FFFF_8100_0000,
    "data": 0xFFFF_FFFF_8200_0000,
    "entry": 0xFFFF_FE00_0000_0000,
}
_LOW: Final = 0xC000_0000
_KERNEL_32: Final = {
    "direct": _LOW,
    "direct_size": 896 * MIB,
    "text": _LOW + 4 * MIB,
    "data": _LOW + 8 * MIB,
    "vmalloc": 0xF880_0000,
    "vmalloc_size": 112 * MIB,
    "vmemmap": 0,
    "entry": 0xFFC0_0000,
}

LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType(
    {
        "4-level": Layout(
            direct=0xFFFF_8880_0000_0000,
            direct_size=1 << 46,
            vmalloc=0xFFFF_C900_0000_0000,
            vmalloc_size=1 << 45,
            vmemmap=0xFFFF_EA00_0000_0000,
            **_IMAGE_64,
            **_USER_64,
        ),
        "5-level": Layout(
            direct=0xFF11_0000_0000_0000,
            direct_size=1 << 52,
            vmalloc=0xFFA0_0000_0000_0000,
            vmalloc_size=1 << 53,
            vmemmap=0xFFD4_0000_0000_0000,
            **_IMAGE_64,
            **_USER_64,
        ),
        "pae": Layout(**_KERNEL_32, **_USER_32),
        "32-bit": Layout(**_KERNEL_32, **_USER_32),
    }
)
"""The layout of each paging mode."""
