"""Files that hold physical memory: raw dumps, and the ELF dumps that QEMU and libvirt write.

Sources: System V ABI, chapter 5 (program headers); QEMU's ``dump-guest-memory`` (also ``virsh dump --memory-only``),
which writes an ELF core file with one PT_LOAD for each range of memory and a note "QEMU" for each CPU.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import TraceError
from shadowkvm.image.memory import CpuState, PhysicalMemory

__all__ = ["open_image"]

# First bytes of formats whose pages are compressed or otherwise not where a walk could read them.
_OTHERS: Final = {
    b"KDUMP   ": "a compressed kdump (makedumpfile -d -E makes ELF of it; QEMU: dump-guest-memory without -z)",
    b"DISKDUMP": "a compressed kdump (makedumpfile -d -E makes ELF of it)",
    b"makedumpfile": "a flattened kdump (makedumpfile -R rearranges it)",
    b"EMiL": "a LiME dump (record with format=padded for a raw one)",
    b"LiME": "a LiME dump (record with format=padded for a raw one)",
    b"PAGEDU": "a Windows crash dump",
    b"QEVM": "a saved QEMU machine, not a dump of its memory (use dump-guest-memory)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
}

_PG, _LA57, _PAE = 1 << 31, 1 << 12, 1 << 5

_SEGMENT: Final = np.dtype([("selector", "<u4"), ("limit", "<u4"), ("flags", "<u4"), ("pad", "<u4"), ("base", "<u8")])
# What the note "QEMU" of an x86 dump holds: its version (1), its size, and the registers.
_NOTE: Final = np.dtype([
    ("version", "<u4"), ("size", "<u4"), ("registers", "<u8", 16), ("rip", "<u8"), ("rflags", "<u8"),
    ("segments", _SEGMENT, 10), ("cr", "<u8", 5),
])  # fmt: skip


def open_image(path: str | Path) -> PhysicalMemory:
    """Open a dump of physical memory: raw (the first byte stands at gpa 0) or an ELF core file of QEMU or libvirt.

    The file is mapped, not read; what a walk does not touch costs nothing. An ELF dump of QEMU brings the registers of
    its CPUs (`PhysicalMemory.cpus`).

    Raises:
        OSError: the file cannot be opened.
        TraceError: it is of another format (the message says what to do), broken, or cut off.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes(8192))
    ...     file.flush()
    ...     open_image(file.name)
    <PhysicalMemory: 1 pieces, 8,192 bytes below 0x2000>
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(16)
        if not start:
            raise TraceError(f"{path}: the file is empty")
        for magic, what in _OTHERS.items():
            if start.startswith(magic):
                raise TraceError(f"{path}: this is {what}")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(view, np.uint8)
        if not start.startswith(b"\x7fELF"):
            return PhysicalMemory([(0, data)])
        return _elf(path, file, data)


def _elf(path: Path, file: Any, data: NDArray[np.uint8]) -> PhysicalMemory:
    """The memory in an ELF core file."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  # only those who open one pay for it
    from elftools.construct import ConstructError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415
    from elftools.elf.notes import iter_notes  # noqa: PLC0415

    try:
        elf = ELFFile(file)
        if elf["e_type"] != "ET_CORE":
            raise TraceError(f"{path}: this ELF file is no core file (ET_CORE) but {elf['e_type']}")
        if elf["e_machine"] not in {"EM_X86_64", "EM_386"}:
            raise TraceError(f"{path}: the dump is of another machine than x86: {elf['e_machine']}")
        loads = [dict(segment.header) for segment in elf.iter_segments("PT_LOAD")]
        spans = [(segment["p_offset"], segment["p_filesz"]) for segment in elf.iter_segments("PT_NOTE")]
        notes = [note for offset, size in spans for note in iter_notes(elf, offset, size)]
    except (ELFError, ConstructError, UnicodeDecodeError, OverflowError) as error:
        raise TraceError(f"{path}: the ELF file is broken: {error or type(error).__name__}") from None
    pieces = []
    for number, load in enumerate(loads):
        offset, size = load["p_offset"], load["p_filesz"]
        if offset + size > len(data):
            raise TraceError(
                f"{path}: segment {number} ends at byte {offset + size:,}, the file at {len(data):,}: it was cut off"
            )
        pieces.append((load["p_paddr"], data[offset : offset + size]))
    if not pieces:
        raise TraceError(f"{path}: the ELF file has no memory in it (no PT_LOAD)")
    return PhysicalMemory(pieces, _cpus(notes, long_mode=elf["e_machine"] == "EM_X86_64"))


def _cpus(notes: list[Any], *, long_mode: bool) -> Iterator[CpuState]:
    """The CPUs in QEMU's notes. QEMU calls the machine x86-64 if its first CPU is in long mode."""
    for note in notes:
        data = note["n_descdata"]
        if note["n_name"] != "QEMU" or len(data) < _NOTE.itemsize:
            continue
        state = np.frombuffer(data, _NOTE, 1)[0]
        if state["version"] != 1:
            continue
        cr0, cr3, cr4 = (int(state["cr"][n]) for n in (0, 3, 4))
        yield CpuState(cr0, cr3, cr4, _mode(cr0, cr4, long_mode=long_mode), int(state["rip"]))


def _mode(cr0: int, cr4: int, *, long_mode: bool) -> str:
    """The paging mode that the registers select (SDM vol. 3, 4.1.1)."""
    if not cr0 & _PG:
        return ""
    if long_mode:
        return "5-level" if cr4 & _LA57 else "4-level"
    return "pae" if cr4 & _PAE else "32-bit"
