"""The recording format: names, dtypes, limits, and the checks that reader and writer share.

The format is described in docs/recordings.md. Everything that is wrong with a file becomes a `TraceError` here.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import TraceError
from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE, Flag, Op

SCHEMA: Final = "shadowkvm.recording/1"
META: Final = "meta.json"
CHUNK_ROWS: Final = 1 << 18
"""Rows of a chunk; 8 MiB of memory each. The engine copies as many rows at a time."""
PAGE_BLOCK: Final = 256
"""Pages of a block; 1 MiB of memory each."""
META_LIMIT: Final = 64 << 20
HEADER_LIMIT: Final = 4096
U64: Final = (1 << 64) - 1

RECORD_DTYPE: Final = np.dtype([*TRACE_DTYPE.descr, ("gfn", "<u4"), ("dins", "<u4")])
"""A stored row, 32 bytes: the fields of TRACE_DTYPE, then gfn u4 (frame number that the recorder saw, NO_PAGE: none)
and dins u4 (guest instructions since the previous row)."""

_KNOWN_FLAGS: Final = sum(Flag)

# What zipfile, its codecs and NumPy raise over a damaged file. KeyError: a member that the directory does not name.
_DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def chunk_name(number: int) -> str:
    """Member that holds chunk ``number``."""
    return f"chunk-{number:05d}.npy"


def block_name(number: int) -> str:
    """Member that holds block ``number`` of the pages."""
    return f"pages-{number:05d}.npy"


@contextmanager
def damage(place: str) -> Iterator[None]:
    """Turn what the container's libraries raise over bad bytes into a TraceError that names ``place``."""
    try:
        yield
    except TraceError:
        raise
    except _DAMAGE as error:
        raise TraceError(f"damaged: {error or type(error).__name__}", place=place) from error


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of ``array`` as a .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def read_npy(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Member ``name``, which must be an array of ``dtype`` and ``shape``: read-only, little-endian, C order.

    The sizes are compared before anything is unpacked, so that a hostile header cannot ask for memory.
    """
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    with damage(name):
        info = archive.getinfo(name)
        if info.file_size > size + HEADER_LIMIT:
            raise TraceError(f"{info.file_size} bytes stored, {size} expected", place=name)
        stream = io.BytesIO(archive.read(info))
        if np.lib.format.read_magic(stream) != (1, 0):
            raise TraceError("not version 1.0 of the .npy format", place=name)
        found, fortran, stored = np.lib.format.read_array_header_1_0(stream)
        if stored != dtype or fortran or found != shape:
            raise TraceError(f"array of {stored} {found}, expected {dtype} {shape}", place=name)
        data = stream.read()
        if len(data) != size:
            raise TraceError(f"{len(data)} bytes of data, {size} expected", place=name)
        return np.frombuffer(data, dtype).reshape(shape)


def paging_mode(sregs: Mapping[str, int]) -> str:
    """The paging mode that control registers (``cr0``, ``cr4``, ``efer``) select, in words.

    >>> paging_mode({"cr0": 0x80050033, "cr3": 0, "cr4": 0x3506F0, "efer": 0xD01})
    '64-bit, 4-level'
    """
    if not sregs["cr0"] & 1 << 31:
        return "paging off"
    if not sregs["cr4"] & 1 << 5:
        return "32-bit, 2-level"
    if not sregs["efer"] & 1 << 8:
        return "32-bit PAE, 3-level"
    return "64-bit, 5-level" if sregs["cr4"] & 1 << 12 else "64-bit, 4-level"


def parse_meta(text: bytes) -> dict[str, Any]:
    """The meta member as a dict, checked; raises TraceError that names the key at fault."""
    with damage(META):
        meta = json.loads(text.decode("utf-8"))
    if not isinstance(meta, dict):
        raise TraceError(f"an object is expected, not {type(meta).__name__}", place=META)
    if meta.get("schema") != SCHEMA:
        raise TraceError(f"schema {meta.get('schema')!r} is not {SCHEMA!r}", place=META)
    check_meta(meta)
    return meta


def check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse meta whose required keys are absent, of the wrong type or out of range."""
    limits = {
        "rows": (0, 1 << 48),
        "chunk_rows": (1, CHUNK_ROWS),
        "pages": (0, 1 << 32),
        "page_block": (1, PAGE_BLOCK),
        "memory": (PAGE_SIZE, 1 << 52),
        "vcpus": (1, 256),
        "instructions": (0, U64),
    }
    for key, (low, high) in limits.items():
        _integer(meta.get(key), key, low, high)
    if meta["memory"] % PAGE_SIZE:
        raise TraceError(f"{meta['memory']} is not a multiple of {PAGE_SIZE}", place=f"{META}: memory")
    sregs = meta.get("sregs")
    if not isinstance(sregs, dict) or set(sregs) != {"cr0", "cr3", "cr4", "efer"}:
        raise TraceError("an object with cr0, cr3, cr4 and efer is expected", place=f"{META}: sregs")
    for key, value in sregs.items():
        _integer(value, f"sregs.{key}", 0, U64)
    sites = meta.get("sites")
    if not isinstance(sites, list) or not sites or sites[0] != 0:
        raise TraceError("a list of addresses that begins with 0 (no site) is expected", place=f"{META}: sites")
    for value in sites:
        _integer(value, "sites", 0, U64)
    counts = meta.get("counts")
    if not isinstance(counts, dict):
        raise TraceError("an object of op names and numbers is expected", place=f"{META}: counts")
    for key, value in counts.items():
        _integer(value, f"counts.{key}", 0, 1 << 48)
    for key in ("name", "guest", "made"):
        if not isinstance(meta.get(key), str):
            raise TraceError("a string is expected", place=f"{META}: {key}")


def _integer(value: object, key: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise TraceError(f"{value!r} is not a whole number from {low} to {high}", place=f"{META}: {key}")


def check_rows(
    rows: NDArray[np.void], first: int, *, vcpus: int, sites: int, pages: int, place: str | None = None
) -> None:
    """Refuse rows that no engine can run.

    Args:
        rows: TRACE_DTYPE or RECORD_DTYPE, shape (n,).
        first: number of rows[0] in the recording, for the message.
        vcpus, sites, pages: how many of each there are; vcpu, site and the index of a PAGE row must be below them.
        place: the member that holds the rows, for the message.

    Raises:
        TraceError: with the number of the first bad row of the first rule that is broken.
    """
    op, size, flags = rows["op"], rows["size"], rows["flags"]

    def refuse(bad: NDArray[np.bool_], what: str, field: str) -> None:
        at = int(np.argmax(bad)) if bad.size else 0
        if bad.size and bad[at]:
            raise TraceError(what.format(int(rows[field][at])), index=first + at, place=place)

    refuse(op >= len(Op), "op code {} is unknown", "op")
    refuse((flags & (0xFF ^ _KNOWN_FLAGS) != 0) & (op != Op.SLOT_ADD), "flags {:#x} has an unknown bit", "flags")
    refuse(rows["vcpu"] >= vcpus, f"vcpu {{}} of {vcpus}", "vcpu")
    refuse(rows["site"] >= sites, f"site {{}} of {sites}", "site")
    access = (op <= Op.STORE) & (op != Op.FETCH)
    refuse(access & ((size == 0) | (size > 16)), "an access of {} bytes", "size")
    is_page = op == Op.PAGE
    refuse(is_page & (rows["value"] >= pages), f"page index {{}} of {pages}", "value")
    refuse(is_page & (rows["addr"] % PAGE_SIZE != 0), "page address {:#x} is not page-aligned", "addr")


class Tally:
    """The sums over all rows that meta holds: counts, faults, instructions."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(Op), np.int64)
        self._faults = self._instructions = 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Count rows of RECORD_DTYPE that `check_rows` has passed."""
        self._counts += np.bincount(rows["op"], minlength=len(Op))
        # The bits of SLOT_ADD's flags mean something else.
        self._faults += int(np.count_nonzero((rows["flags"] & Flag.FAULTS != 0) & (rows["op"] != Op.SLOT_ADD)))
        self._instructions += int(rows["dins"].sum(dtype=np.uint64))

    def meta(self) -> dict[str, Any]:
        """The keys of meta: rows of each op by name (only those that occur), FAULTS rows, instructions."""
        counts = {op.name: int(self._counts[op]) for op in Op if self._counts[op]}
        return {"counts": counts, "faults": self._faults, "instructions": self._instructions}
