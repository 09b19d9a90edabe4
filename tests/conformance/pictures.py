"""Pictures of real kernels' page tables: the table pages, and what QEMU's monitor said of them (tools/memory_image.py).

A picture is one address space at one moment. Its reference is QEMU's own: `info tlb` (every leaf with its flags), `info
mem` (rights over all levels) and `gva2gpa` (single addresses, mapped and not).
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES = Path(__file__).parent / "images"
FLAGS = "XGPDACTUW"  # of `info tlb`, where X means "not executable"
FLAG_BITS = {"X": 63, "G": 8, "P": 7, "D": 6, "A": 5, "C": 4, "T": 3, "U": 2, "W": 1}  # in an entry
NOWHERE = 2**64 - 1

LEAF = np.dtype([("va", "<u8"), ("pa", "<u8"), ("flags", "<u2")])
RANGE = np.dtype([("start", "<u8"), ("end", "<u8"), ("user", "?"), ("write", "?")])
SAMPLE = np.dtype([("va", "<u8"), ("pa", "<u8")])


@dataclass(frozen=True)
class Picture:
    """One address space: registers, table pages, and what the monitor said."""

    about: dict[str, str]
    """Machine, kernel, QEMU, mode of paging, what ran."""
    registers: dict[str, int]
    """cr0, cr3, cr4, efer, and maxphyaddr of the machine's CPU."""
    frames: NDArray[np.uint32]
    """Frame numbers of the table pages, rising."""
    pages: NDArray[np.uint8]
    """Their contents, 4,096 bytes each."""
    leaves: NDArray[np.void]
    """LEAF: `info tlb`. In `flags` bit n is FLAGS[n]."""
    ranges: NDArray[np.void]
    """RANGE: `info mem`. QEMU 7.2 has none for 5-level paging."""
    samples: NDArray[np.void]
    """SAMPLE: `gva2gpa`, NOWHERE where that says "Unmapped"."""

    @property
    def mode(self) -> str:
        return self.about["mode"]

    def segments(self) -> list[tuple[int, NDArray[np.uint8]]]:
        """The table pages as (gpa, bytes), frames in a row joined."""
        cuts = np.flatnonzero(np.diff(self.frames.astype(np.int64)) != 1) + 1
        parts = zip(np.split(self.frames, cuts), np.split(self.pages, cuts), strict=True)
        return [(int(frames[0]) << 12, pages.reshape(-1)) for frames, pages in parts]


def save(path: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures of one machine."""
    arrays: dict[str, Any] = {}
    for number, picture in enumerate(pictures):
        about = json.dumps({"about": picture.about, "registers": picture.registers})
        arrays[f"{number}.about"] = np.frombuffer(about.encode(), np.uint8)
        arrays[f"{number}.frames"], arrays[f"{number}.pages"] = picture.frames, picture.pages
        for name in ("leaves", "ranges", "samples"):
            array = getattr(picture, name)
            for field in array.dtype.names:
                # Neighbours differ by a page: as differences, the leaves take a tenth of the space.
                column = array[field]
                wide = column.dtype.itemsize == 8
                arrays[f"{number}.{name}.{field}"] = np.diff(column, prepend=column[:1] * 0) if wide else column
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    path.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def load(path: Path) -> list[Picture]:
    """Read the pictures of one machine."""
    with lzma.open(path) as file, np.load(io.BytesIO(file.read())) as stored:
        arrays = dict(stored)
    pictures = []
    for number in range(sum(name.endswith(".about") for name in arrays)):
        tables = {}
        for name, kind in (("leaves", LEAF), ("ranges", RANGE), ("samples", SAMPLE)):
            columns = {field: arrays[f"{number}.{name}.{field}"] for field in kind.fields or ()}
            tables[name] = np.zeros(len(next(iter(columns.values()))), kind)
            for field, column in columns.items():
                tables[name][field] = np.cumsum(column, dtype=column.dtype) if column.itemsize == 8 else column
        facts = json.loads(arrays[f"{number}.about"].tobytes())
        frames, pages = arrays[f"{number}.frames"], arrays[f"{number}.pages"]
        pictures.append(Picture(facts["about"], facts["registers"], frames, pages, **tables))
    return pictures
