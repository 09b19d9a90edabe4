"""Import of the recorder's raw files: NAME.rec, NAME.pages, plain or compressed by zstd."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import TraceError
from shadowkvm.ops import NO_PAGE, PAGE_SIZE, TRACE_DTYPE, Flag, Op
from shadowkvm.trace.format import CHUNK_ROWS, PAGE_BLOCK, paging_mode
from shadowkvm.trace.stream import RawStream
from shadowkvm.trace.write import RecordingWriter

RAW_DTYPE: Final = np.dtype(
    [
        ("addr", "<u8"),
        ("val", "<u8"),
        ("gfn", "<u4"),
        ("dins", "<u4"),
        ("op", "<u1"),
        ("flags", "<u1"),
        ("size", "<u1"),
        ("vec", "<u1"),
        ("x", "<u4"),
    ]
)
"""A record of the recorder, 32 bytes."""

PAGE_ITEM: Final = np.dtype([("gfn", "<u4"), ("content", "<u1", (PAGE_SIZE,))])


class RawOp(IntEnum):
    """Op codes of the recorder."""

    FETCH = 0
    READ = 1
    WRITE = 2
    PTSTORE = 3
    CR0 = 4
    CR3 = 5
    CR4 = 6
    EFER = 7
    INVLPG = 8
    INVPCID = 9
    PF = 10
    INTR = 11
    PTPAGE = 12
    MARK = 13
    CLTS = 14


_OP_OF: Final = {
    RawOp.PTSTORE: Op.WRITE,
    RawOp.PTPAGE: Op.PAGE,
    # Refused, and decided by the error code.
    RawOp.INVPCID: Op.READ,
    RawOp.PF: Op.READ,
}
_OPS: Final = np.array([_OP_OF[raw] if raw in _OP_OF else Op[raw.name] for raw in RawOp], np.uint8)
_CARRIED: Final = Flag.USER | Flag.AC | Flag.MMIO | Flag.IMPLICIT
_SREGS: Final = {RawOp.CR0: "cr0", RawOp.CR3: "cr3", RawOp.CR4: "cr4", RawOp.EFER: "efer"}
_PF_WRITE, _PF_USER, _PF_FETCH = 2, 4, 16

Progress = Callable[[int, float], None]


def import_raw(
    rec_path: str | os.PathLike[str],
    pages_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    name: str | None = None,
    meta: Mapping[str, Any] | None = None,
    compression: str = "lzma",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a recording of the recorder's two files. Memory use does not grow with their length.

    Args:
        rec_path: 32-byte records of RAW_DTYPE; zstd or plain.
        pages_path: items of 4 + 4,096 bytes, a frame number and its content; zstd or plain.
        out_path: the recording to write; it appears whole or not at all.
        name: its name; the first part of the file name of ``rec_path`` if left out.
        meta: further keys of the recording's meta (``guest``, ``made``, ...).
        compression: see `RecordingWriter`.
        progress: called after each chunk with the number of records so far and the part of ``rec_path`` that is read
            (0 to 1).

    Returns:
        The meta of the recording.

    Raises:
        OSError: a file cannot be read or written.
        ImportError: zstd is needed and there is neither the package (extra "import") nor the command.
        TraceError: the files are cut off or damaged, or hold what no recorder writes; ``index`` is the number of the
            raw record, ``place`` the file.
    """
    rec_path, pages_path = Path(rec_path), Path(pages_path)
    start = {"name": name if name is not None else rec_path.name.split(".")[0], **(meta or {})}
    with RecordingWriter(out_path, start, compression=compression) as writer:
        importer = _Importer(rec_path.name, _copy_pages(pages_path, writer))
        with RawStream(rec_path) as stream:
            done = 0
            for data in stream.items(RAW_DTYPE.itemsize, CHUNK_ROWS):
                raw = np.frombuffer(data, RAW_DTYPE)
                writer.append(*importer.convert(raw, done))
                done += len(raw)
                if progress is not None:
                    progress(done, stream.fraction)
        writer.meta.update(importer.meta(done))
        return writer.close()


def _copy_pages(path: Path, writer: RecordingWriter) -> NDArray[np.uint32]:
    """Copy the page contents; returns the frame number of each."""
    gfns = [np.zeros(0, np.uint32)]
    with RawStream(path) as stream:
        for data in stream.items(PAGE_ITEM.itemsize, PAGE_BLOCK):
            items = np.frombuffer(data, PAGE_ITEM)
            writer.add_pages(np.ascontiguousarray(items["content"]))
            gfns.append(items["gfn"].astype(np.uint32))
    return np.concatenate(gfns)


class _Importer:
    """Turns raw records into rows, and gathers what meta says of the whole."""

    def __init__(self, place: str, page_gfns: NDArray[np.uint32]) -> None:
        self._place = place
        self._page_gfns = page_gfns
        self._sregs: dict[str, int] = {}
        self._word = 8
        self._highest, self._highest_row = 0, 0
        self._lowest_device = NO_PAGE
        self._counts = np.zeros(len(RawOp), np.int64)

    def convert(
        self, raw: NDArray[np.void], first: int
    ) -> tuple[NDArray[np.void], NDArray[np.uint32], NDArray[np.uint32]]:
        """Rows, gfn and dins of the raw records that begin with number ``first``; the start state becomes no row."""
        self._check(raw, first)
        self._counts += np.bincount(raw["op"], minlength=len(RawOp))
        if first == 0:
            self._start(raw[:4])
            raw, first = raw[4:], 4
        gfn = self._frames(raw, first)
        return self._rows(raw, gfn), gfn, raw["dins"].astype(np.uint32)

    def meta(self, total: int) -> dict[str, Any]:
        """What the whole recording's meta says, once all is converted."""
        if total == 0:
            raise TraceError("the file is empty", place=self._place)
        return {
            "sregs": self._sregs,
            "mode": paging_mode(self._sregs),
            "memory": self._memory(),
            "highest_gfn": self._highest,
            "raw_counts": {op.name: int(self._counts[op]) for op in RawOp if self._counts[op]},
        }

    def _refuse(self, bad: NDArray[np.bool_], raw: NDArray[np.void], first: int, what: str, field: str) -> None:
        at = int(np.argmax(bad)) if bad.size else 0
        if bad.size and bad[at]:
            offset = (first + at) * RAW_DTYPE.itemsize
            raise TraceError(f"{what.format(int(raw[field][at]))} (offset {offset})", first + at, self._place)

    def _check(self, raw: NDArray[np.void], first: int) -> None:
        op = raw["op"]
        self._refuse(op >= len(RawOp), raw, first, "op code {} is unknown", "op")
        self._refuse(op == RawOp.INVPCID, raw, first, "INVPCID is not modelled: record a guest without PCID", "op")
        self._refuse(raw["flags"] & (0xFF ^ _CARRIED) != 0, raw, first, "flags {:#x} has an unknown bit", "flags")
        store = op == RawOp.PTSTORE
        offset = raw["addr"] % PAGE_SIZE
        self._refuse(store & ((raw["size"] < 1) | (raw["size"] > 8)), raw, first, "a table store of {} bytes", "size")
        crosses = offset + raw["size"] > PAGE_SIZE
        self._refuse(store & crosses, raw, first, "the table store at {:#x} crosses a page", "addr")
        self._refuse(store & (raw["x"] != offset), raw, first, "offset {:#x} is not that of the address", "x")
        table = op == RawOp.PTPAGE
        pages = len(self._page_gfns)
        self._refuse(table & (raw["x"] >= pages), raw, first, f"page index {{}} of {pages}", "x")
        where = np.flatnonzero(table)
        differs = np.zeros(len(raw), np.bool_)
        differs[where] = self._page_gfns[raw["x"][where]] != raw["gfn"][where]
        self._refuse(differs, raw, first, "page index {} is the content of another frame", "x")

    def _start(self, raw: NDArray[np.void]) -> None:
        """The first four records are the registers at the start."""
        if sorted(raw["op"].tolist()) != sorted(_SREGS) or not (raw["x"] == 1).all():
            raise TraceError("the first four records are not CR0, CR3, CR4 and EFER with x = 1", 0, self._place)
        self._sregs = {_SREGS[RawOp(int(record["op"]))]: int(record["val"]) for record in raw}
        self._word = 8 if self._sregs["efer"] & 1 << 10 else 4

    def _frames(self, raw: NDArray[np.void], first: int) -> NDArray[np.uint32]:
        """The check column; notes how far RAM reaches and where devices begin."""
        has_frame = (raw["op"] <= RawOp.PTSTORE) | (raw["op"] == RawOp.PTPAGE)
        device = raw["flags"] & Flag.MMIO != 0
        gfn = np.where(has_frame, raw["gfn"], NO_PAGE).astype(np.uint32)
        ram = np.where(has_frame & ~device, raw["gfn"], 0)
        at = int(np.argmax(ram)) if ram.size else 0
        if ram.size and int(ram[at]) > self._highest:
            self._highest, self._highest_row = int(ram[at]), first + at
        devices = gfn[device]
        if devices.size:
            self._lowest_device = min(self._lowest_device, int(devices.min()))
        return gfn

    def _memory(self) -> int:
        """Bytes of RAM from gpa 0: the power of two that covers every frame in use, cut off at the first device.

        The recorder does not say how much RAM the guest had. The size decides only which accesses are MMIO (and the
        default quota of shadow pages), and the guests have powers of two.
        """
        if self._highest >= self._lowest_device:
            what = f"frame {self._highest:#x} is RAM above a device at frame {self._lowest_device:#x}"
            raise TraceError(f"{what}: one slot from 0 cannot hold it", self._highest_row, self._place)
        return min(1 << self._highest.bit_length(), self._lowest_device) * PAGE_SIZE

    def _rows(self, raw: NDArray[np.void], gfn: NDArray[np.uint32]) -> NDArray[np.void]:
        op, addr = raw["op"], raw["addr"]
        rows = np.zeros(len(raw), TRACE_DTYPE)
        rows["op"], rows["addr"], rows["flags"] = _OPS[op], addr, raw["flags"]
        rows["value"] = np.select(
            [
                op == RawOp.INTR,
                op == RawOp.PTPAGE,
                (op == RawOp.PTSTORE)
                | (op == RawOp.PF)
                | (op == RawOp.MARK)
                | ((op >= RawOp.CR0) & (op <= RawOp.EFER)),
            ],
            [raw["vec"].astype(np.uint64), raw["x"].astype(np.uint64), raw["val"]],
            np.uint64(0),
        )
        rows["addr"][op == RawOp.PTPAGE] = gfn[op == RawOp.PTPAGE].astype(np.uint64) * PAGE_SIZE
        fault = op == RawOp.PF
        code = raw["val"][fault]
        kind = np.where(code & _PF_WRITE != 0, Op.WRITE, Op.READ)
        rows["op"][fault] = np.where(code & _PF_FETCH != 0, Op.FETCH, kind)
        user = np.where(code & _PF_USER != 0, Flag.USER, 0)
        rows["flags"][fault] = (raw["flags"][fault] & (0xFF ^ Flag.USER)) | user | Flag.FAULTS
        # A store without a recorded value leaves memory as it is.
        keep = (op == RawOp.WRITE) | (fault & (rows["op"] == Op.WRITE))
        rows["flags"][keep] |= np.uint8(Flag.KEEP)
        rows["size"] = self._sizes(raw, rows)
        return rows

    def _sizes(self, raw: NDArray[np.void], rows: NDArray[np.void]) -> NDArray[np.uint8]:
        """Bytes of each access: recorded for stores to tables only, else the widest that is aligned at its address.

        Such an access crosses no page, and is never what KVM calls a misaligned write to a table unless it must be.
        """
        lowest_bit = raw["addr"] & (~raw["addr"] + np.uint64(1))
        widest = np.where(raw["flags"] & Flag.MMIO != 0, 4, self._word).astype(np.uint64)
        aligned = np.where(lowest_bit == 0, widest, np.minimum(lowest_bit, widest))
        sizes = np.where(rows["op"] <= Op.WRITE, aligned, 0)
        sizes = np.where(rows["op"] == Op.FETCH, 1, sizes)
        return np.where(raw["op"] == RawOp.PTSTORE, raw["size"], sizes).astype(np.uint8)
