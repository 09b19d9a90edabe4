"""RecordingWriter: a recording written chunk by chunk, and put in its place only when it is whole."""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.errors import TraceError
from shadowkvm.ops import NO_PAGE, PAGE_SIZE, TRACE_DTYPE, Op
from shadowkvm.trace.format import (
    CHUNK_ROWS,
    META,
    PAGE_BLOCK,
    RECORD_DTYPE,
    SCHEMA,
    Tally,
    block_name,
    check_meta,
    check_rows,
    chunk_name,
    npy_bytes,
    paging_mode,
)

COMPRESSION: Final = {"lzma": zipfile.ZIP_LZMA, "deflate": zipfile.ZIP_DEFLATED, "none": zipfile.ZIP_STORED}


def records(rows: NDArray[np.void], gfn: ArrayLike | None, dins: ArrayLike | None) -> NDArray[np.void]:
    """Rows and their two columns as one array of RECORD_DTYPE, shape (n,); TraceError if a dtype or shape is wrong."""
    if not isinstance(rows, np.ndarray) or rows.dtype != TRACE_DTYPE or rows.ndim != 1:
        what = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise TraceError(f"rows must be a one-dimensional array of TRACE_DTYPE, not {what}")
    out = np.empty(len(rows), RECORD_DTYPE)
    for name in TRACE_DTYPE.names or ():
        out[name] = rows[name]
    for name, column, default in (("gfn", gfn, NO_PAGE), ("dins", dins, 0)):
        values = np.full(len(rows), default, np.uint32) if column is None else np.asarray(column)
        if values.shape != rows.shape:
            raise TraceError(f"{values.shape} values for {len(rows)} rows", place=name)
        whole = values.dtype.kind in "ui" or not values.size
        if not whole or (values.size and not 0 <= int(values.min()) <= int(values.max()) <= NO_PAGE):
            raise TraceError("32-bit unsigned numbers are expected", place=name)
        out[name] = values
    return out


def page_array(pages: ArrayLike | bytes) -> NDArray[np.uint8]:
    """Page contents, given as bytes or as numbers below 256, as an array of uint8 of shape (n, 4096)."""
    flat = np.frombuffer(pages, np.uint8) if isinstance(pages, bytes | bytearray | memoryview) else np.asarray(pages)
    if flat.size == 0:
        return np.zeros((0, PAGE_SIZE), np.uint8)
    if flat.dtype != np.uint8 or flat.size % PAGE_SIZE:
        raise TraceError(f"{flat.size} items of {flat.dtype} are not pages of {PAGE_SIZE} bytes", place="pages")
    return flat.reshape(-1, PAGE_SIZE)


class RecordingWriter:
    """Writes a recording as a stream; memory use is one chunk and one block of pages, however long it is.

    Args:
        path: the file to write. It appears (or is replaced) at `close`, whole; until then the data are in a hidden
            file beside it, which is removed if the ``with`` block ends by an exception.
        meta: what is known of the recording; more may be put into `meta` until the writer is closed. Required in the
            end are ``memory`` (bytes of guest RAM from gpa 0) and ``sregs`` (cr0, cr3, cr4, efer at the start);
            ``name``, ``guest``, ``made`` (str), ``vcpus`` (1) and ``sites`` (instruction addresses, [0]) have
            defaults; any further key that JSON can hold is kept.
        compression: "lzma" (smallest), "deflate" (writes ten times as fast, four times as big) or "none".
        chunk_rows: rows of a chunk, at most 262,144.

    The same rows, pages and meta give the same bytes.

    >>> import numpy as np, tempfile, shadowkvm.trace as trace
    >>> from shadowkvm.ops import Op, TRACE_DTYPE
    >>> rows = np.zeros(3, TRACE_DTYPE)
    >>> rows["op"], rows["size"], rows["addr"] = Op.READ, 8, [0x1000, 0x2000, 0x3000]
    >>> sregs = {"cr0": 0x80050033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with trace.RecordingWriter(f"{folder}/tiny.npz", {"memory": 1 << 20, "sregs": sregs}) as writer:
    ...         writer.append(rows)
    ...     with trace.Recording.open(f"{folder}/tiny.npz") as recording:
    ...         recording
    <Recording 'tiny': 3 rows, 0 pages, 1 MiB, 64-bit, 4-level>
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: Mapping[str, Any] | None = None,
        *,
        compression: str = "lzma",
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        if compression not in COMPRESSION:
            raise ValueError(f"compression {compression!r} is none of {', '.join(COMPRESSION)}")
        if not 1 <= chunk_rows <= CHUNK_ROWS:
            raise ValueError(f"chunk_rows {chunk_rows} is not from 1 to {CHUNK_ROWS}")
        self.path = Path(path)
        self.meta: dict[str, Any] = {"name": self.path.stem, "guest": "", "made": "", "vcpus": 1, "sites": [0]}
        self.meta.update(meta or {})
        self._method = COMPRESSION[compression]
        self._chunk = np.empty(chunk_rows, RECORD_DTYPE)
        self._block = np.empty((PAGE_BLOCK, PAGE_SIZE), np.uint8)
        self._rows = self._pages = 0
        self._tally = Tally()
        self._highest = {"vcpu": (-1, 0), "site": (-1, 0), "page": (-1, 0)}
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._archive: zipfile.ZipFile | None = zipfile.ZipFile(self._temporary, "x")

    def append(self, rows: NDArray[np.void], gfn: ArrayLike | None = None, dins: ArrayLike | None = None) -> None:
        """Add rows.

        Args:
            rows: TRACE_DTYPE, shape (n,).
            gfn: frame numbers to check translations against, uint32, shape (n,); NO_PAGE where there is none.
            dins: guest instructions since the previous row, uint32, shape (n,); 0 if left out.

        Raises:
            TraceError: wrong dtype or shape, or a row that no engine can run (``index`` is its number in the
                recording). Nothing of this call is then written.
        """
        new = records(rows, gfn, dins)
        # How many vCPUs, sites and pages there are is known at the end only: `close` compares.
        check_rows(new, self._rows, vcpus=1 << 8, sites=1 << 32, pages=1 << 32)
        self._note(new)
        done = 0
        while done < len(new):
            at = self._rows % len(self._chunk)
            part = new[done : done + len(self._chunk) - at]
            self._chunk[at : at + len(part)] = part
            self._rows += len(part)
            done += len(part)
            if self._rows % len(self._chunk) == 0:
                self._put(chunk_name(self._rows // len(self._chunk) - 1), npy_bytes(self._chunk))

    def add_pages(self, pages: ArrayLike | bytes) -> int:
        """Add page contents: bytes, or uint8 of shape (n, 4096). Returns the index of the first of them."""
        new = page_array(pages)
        first = self._pages
        done = 0
        while done < len(new):
            at = self._pages % PAGE_BLOCK
            part = new[done : done + PAGE_BLOCK - at]
            self._block[at : at + len(part)] = part
            self._pages += len(part)
            done += len(part)
            if self._pages % PAGE_BLOCK == 0:
                self._put(block_name(self._pages // PAGE_BLOCK - 1), npy_bytes(self._block))
        return first

    def close(self) -> dict[str, Any]:
        """Write what is left, check the whole, put the file in its place. Returns the meta as stored.

        Raises:
            TraceError: meta is not complete, or a row names a vCPU, site or page that there is not. No file is left.
        """
        if self._archive is None:
            return self.meta
        try:
            self._finish(self._archive)
        except BaseException:
            self.abort()
            raise
        return self.meta

    def abort(self) -> None:
        """Throw away what was written; the file that `path` may have named before is as it was."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _note(self, new: NDArray[np.void]) -> None:
        """Keep the sums that go into meta, and the highest vcpu, site and page index with the row that has it."""
        self._tally.add(new)
        pages = np.where(new["op"] == Op.PAGE, new["value"].astype(np.int64), -1)
        for key, column in (("vcpu", new["vcpu"]), ("site", new["site"]), ("page", pages)):
            at = int(np.argmax(column)) if len(column) else 0
            if len(column) and int(column[at]) > self._highest[key][0]:
                self._highest[key] = (int(column[at]), self._rows + at)

    def _finish(self, archive: zipfile.ZipFile) -> None:
        left, spare = self._rows % len(self._chunk), self._pages % PAGE_BLOCK
        if left:
            self._put(chunk_name(self._rows // len(self._chunk)), npy_bytes(self._chunk[:left]))
        if spare:
            self._put(block_name(self._pages // PAGE_BLOCK), npy_bytes(self._block[:spare]))
        self.meta.update(
            schema=SCHEMA,
            rows=self._rows,
            chunk_rows=len(self._chunk),
            pages=self._pages,
            page_block=PAGE_BLOCK,
            **self._tally.meta(),
        )
        check_meta(self.meta)
        self.meta.setdefault("mode", paging_mode(self.meta["sregs"]))
        limits = {"vcpu": self.meta["vcpus"], "site": len(self.meta["sites"]), "page": self._pages}
        for key, limit in limits.items():
            highest, row = self._highest[key]
            if highest >= limit:
                raise TraceError(f"{key} {highest} of {limit}", index=row)
        self._put(META, (json.dumps(self.meta, indent=1, sort_keys=True) + "\n").encode())
        archive.close()
        self._archive = None
        try:
            self._temporary.replace(self.path)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise

    def _put(self, name: str, data: bytes) -> None:
        if self._archive is None:
            raise ValueError("the writer is closed")
        # No clock and no platform in the file: the same recording is the same bytes.
        info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        info.create_system, info.external_attr, info.compress_type = 3, 0o644 << 16, self._method
        self._archive.writestr(info, data)
