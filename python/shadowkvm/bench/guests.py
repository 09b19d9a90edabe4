"""Guests to measure: data pages mapped one by one, with page tables that the guest reaches itself."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE, Op
from shadowkvm.vm import Vm

__all__ = ["ALIAS", "FLAGS", "Guest", "build", "rows"]

FLAGS: Final = 0x67
"""Present, writable, user, accessed, dirty."""
ALIAS: Final = 1 << 39
"""Where a guest sees its page tables, one after the other."""
_REGION: Final = 2 << 20


class Guest(NamedTuple):
    """A VM and where its tables are, in guest physical memory."""

    vm: Vm
    root: int
    directories: int
    tables: int


def build(
    regions: NDArray[np.uint64] | int, memory: int | None = None, *, lone: bool = False, **settings: Any
) -> Guest:
    """A guest with 2 MiB regions of data pages, each page at its own gpa.

    Args:
        regions: numbers of the regions (an address over 2 MiB), or how many from 0 on.
        memory: bytes of guest memory; None: as much as is needed.
        lone: only each eighth page is mapped, so that none has neighbours.
        settings: policy, events, ...: see `Vm`.
    """
    numbers = np.arange(regions, dtype=np.uint64) if isinstance(regions, int) else regions
    first = (int(numbers[-1]) + 1) * _REGION
    gibs = np.unique(numbers >> np.uint64(9))
    directories = first + 0x6000
    tables = directories + len(gibs) * PAGE_SIZE
    end = tables + len(numbers) * PAGE_SIZE
    vm = Vm(memory or (end + _REGION - 1) // _REGION * _REGION, **settings)

    def put(gpa: int, entries: NDArray[np.uint64] | list[int]) -> None:
        vm.write_memory(gpa, np.asarray(entries, "<u8").tobytes())

    put(first, [(first + 0x1000) | FLAGS, (first + 0x2000) | FLAGS])
    for number, gib in enumerate(gibs):
        put(first + 0x1000 + 8 * int(gib), [(directories + number * PAGE_SIZE) | FLAGS])
        inside = np.flatnonzero(numbers >> np.uint64(9) == gib)
        table = np.zeros(512, "<u8")
        table[numbers[inside] & np.uint64(511)] = (tables + inside * PAGE_SIZE) | FLAGS
        put(directories + number * PAGE_SIZE, table)
    # The alias: directories first, then tables, by as many tables of its own as that takes.
    pages = np.concatenate(
        [directories + np.arange(len(gibs)) * PAGE_SIZE, tables + np.arange(len(numbers)) * PAGE_SIZE]
    )
    own = -(-len(pages) // 512)
    if own <= 2:
        put(first + 0x2000, [(first + 0x3000) | FLAGS])
        put(first + 0x3000, [(first + 0x4000 + n * PAGE_SIZE) | FLAGS for n in range(own)])
        put(first + 0x4000, pages.astype("<u8") | np.uint64(FLAGS))
    offsets = np.arange(0, 512, 8 if lone else 1, dtype=np.uint64)
    for number, region in enumerate(numbers):
        table = np.zeros(512, "<u8")
        table[offsets] = (region << np.uint64(21)) + (offsets << np.uint64(12)) | np.uint64(FLAGS)
        put(tables + number * PAGE_SIZE, table)
    vm.vcpus[0].set_sregs(cr0=0x8005_0033, cr3=first, cr4=0x20, efer=0xD01)
    return Guest(vm, first, directories, tables)


def rows(op: Op, addresses: NDArray[np.uint64] | NDArray[np.int64], values: object = 0) -> NDArray[np.void]:
    """A trace of one operation on each address, 8 bytes."""
    out = np.zeros(len(addresses), TRACE_DTYPE)
    out["op"], out["size"], out["addr"], out["value"] = op, 8, addresses, values
    return out
