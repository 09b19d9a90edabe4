"""A second reader of guest tables: plain Python over bytes, one address at a time, written from the manuals alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shadowkvm as sk

# Mode -> (levels, bits of an index, bytes of an entry, bits of the top index).
SHAPES = {"4-level": (4, 9, 8, 9), "5-level": (5, 9, 8, 9), "pae": (3, 9, 8, 2), "32-bit": (2, 10, 4, 10)}


@dataclass(frozen=True)
class Found:
    """Where an address leads, and what is allowed there."""

    gpa: int
    write: bool
    user: bool
    execute: bool
    page: int


class Image:
    """Bytes of guest memory by page."""

    def __init__(self, pages: Iterable[tuple[int, bytes]]) -> None:
        self.pages = {gpa: bytearray(content) for gpa, content in pages}

    def word(self, gpa: int, size: int) -> int:
        page = self.pages.get(gpa & ~0xFFF)
        return 0 if page is None else int.from_bytes(page[gpa & 0xFFF : (gpa & 0xFFF) + size], "little")

    def store(self, gpa: int, value: int, size: int) -> None:
        page = self.pages.setdefault(gpa & ~0xFFF, bytearray(4096))
        page[gpa & 0xFFF : (gpa & 0xFFF) + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def replay(self, rows: NDArray[Any]) -> None:
        """Carry out the stores of a log, ``addr`` = gpa."""
        for row in rows:
            op, gpa, value, size = sk.Op(int(row["op"])), int(row["addr"]), int(row["value"]), int(row["size"])
            if op == sk.Op.AND:
                value &= self.word(gpa, size)
            else:
                assert op in {sk.Op.WRITE, sk.Op.XCHG, sk.Op.STORE}, op
            self.store(gpa, value, size)

    def content(self) -> dict[int, bytes]:
        """The pages that are not all zeros."""
        return {gpa: bytes(page) for gpa, page in self.pages.items() if any(page)}

    def walk(self, mode: str, root: int, gva: int) -> Found | None:
        levels, bits, width, top_bits = SHAPES[mode]
        span = 12 + bits * (levels - 1) + top_bits
        if span < 64 and mode.endswith("level"):
            high = gva >> span - 1
            if high not in {0, (1 << 65 - span) - 1}:
                return None
        table, write, user, execute = root, True, True, True
        for level in range(levels, 0, -1):
            shift = 12 + bits * (level - 1)
            count = top_bits if level == levels else bits
            entry = self.word(table + (gva >> shift & (1 << count) - 1) * width, width)
            if not entry & 1:
                return None
            if not (mode == "pae" and level == 3):
                write, user = write and bool(entry & 2), user and bool(entry & 4)
                execute = execute and not entry >> 63
            address = entry & 0x000F_FFFF_FFFF_F000
            if level == 1 or (entry & 0x80 and not (mode == "pae" and level == 3)):
                if mode == "32-bit" and level == 2:
                    address = (entry & 0xFFC0_0000) | (entry >> 13 & 0xF) << 32
                page = 1 << shift
                gpa = address & ~(page - 1) | gva & page - 1
                return Found(gpa, write, user, execute, page)
            table = address
        raise AssertionError


def image_of(memory: Any) -> Image:
    return Image(memory.pages())


def memory_of(vm: sk.Vm, gpas: Iterable[int]) -> dict[int, NDArray[Any]]:
    return {gpa: np.frombuffer(vm.read_memory(gpa, 4096), "<u8") for gpa in gpas}
