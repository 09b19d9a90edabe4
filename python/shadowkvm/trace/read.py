"""Recording: a recorded guest, read chunk by chunk."""

from __future__ import annotations

import operator
import os
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.errors import TraceError
from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE
from shadowkvm.trace.format import (
    CHUNK_ROWS,
    META,
    META_LIMIT,
    PAGE_BLOCK,
    RECORD_DTYPE,
    SCHEMA,
    Tally,
    block_name,
    check_meta,
    check_rows,
    chunk_name,
    damage,
    paging_mode,
    parse_meta,
    read_npy,
)
from shadowkvm.trace.write import RecordingWriter, page_array, records

_BLOCKS_KEPT = 8


class Chunk(NamedTuple):
    """Rows of a recording and their two columns; the arrays are read-only and of one length."""

    rows: NDArray[np.void]
    """TRACE_DTYPE, shape (n,)."""
    gfn: NDArray[np.uint32]
    """Frame number that the recorder saw for each row, NO_PAGE where there is none; uint32, shape (n,)."""
    dins: NDArray[np.uint32]
    """Guest instructions since the previous row; uint32, shape (n,)."""


class _Source(Protocol):
    """Where chunks and blocks of pages come from."""

    def chunk(self, number: int, rows: int) -> NDArray[np.void]: ...

    def block(self, number: int, pages: int) -> NDArray[np.uint8]: ...

    def close(self) -> None: ...


class _File:
    def __init__(self, archive: zipfile.ZipFile, handle: BinaryIO) -> None:
        self._archive, self._handle = archive, handle

    def chunk(self, number: int, rows: int) -> NDArray[np.void]:
        return read_npy(self._archive, chunk_name(number), RECORD_DTYPE, (rows,))

    def block(self, number: int, pages: int) -> NDArray[np.uint8]:
        return read_npy(self._archive, block_name(number), np.dtype(np.uint8), (pages, PAGE_SIZE))

    def close(self) -> None:
        self._archive.close()
        # ZipFile leaves open what it did not open itself.
        self._handle.close()


class _Arrays:
    def __init__(self, rows: NDArray[np.void], pages: NDArray[np.uint8]) -> None:
        self._rows, self._pages = rows, pages

    def chunk(self, number: int, rows: int) -> NDArray[np.void]:
        return self._rows[number * CHUNK_ROWS :][:rows]

    def block(self, number: int, pages: int) -> NDArray[np.uint8]:
        return self._pages[number * PAGE_BLOCK :][:pages]

    def close(self) -> None:
        pass


class Pages:
    """Page contents of a recording by index: 4,096 bytes each, read in blocks when they are asked for.

    >>> recording = Recording.from_arrays(np.zeros(0, TRACE_DTYPE), memory=4096, pages=bytes(8192))
    >>> len(recording.pages), recording.pages[1] == bytes(4096)
    (2, True)
    """

    def __init__(self, source: _Source, count: int, block: int) -> None:
        self._count, self._block = count, block
        # The last blocks are kept: PAGE rows of one stretch name neighbours.
        self._read = lru_cache(_BLOCKS_KEPT)(lambda n: source.block(n, min(block, count - n * block)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        number = operator.index(index)
        if not 0 <= number < self._count:
            raise TraceError(f"page index {number} of {self._count}", place="pages")
        block: NDArray[np.uint8] = self._read(number // self._block)
        content: bytes = block[number % self._block].tobytes()
        return content

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(self._count))

    def __repr__(self) -> str:
        return f"<Pages: {self._count:,}>"


class Recording:
    """A recorded guest: rows, the contents of its page tables, and what is known of how it was made.

    Open one with `open`, build one with `from_arrays`, write one with `save` or `RecordingWriter`. A recording is a
    context manager; it may be read by several threads.

    Attributes:
        path: the file, or None.
        meta: dict with ``schema``, ``name``, ``guest``, ``made`` (str), ``mode`` (paging mode at the start, in words),
            ``memory`` (bytes of RAM from gpa 0), ``vcpus``, ``sregs`` (cr0, cr3, cr4, efer at the start), ``sites``
            (instruction addresses; [0] is "none"), ``rows``, ``pages``, ``counts`` (rows of each op, by name),
            ``faults`` (rows with Flag.FAULTS), ``instructions`` (sum of dins), ``chunk_rows``, ``page_block``, and what
            else the maker put in.
        pages: page contents by index, see `Pages`.

    >>> from shadowkvm.ops import Op
    >>> rows = np.zeros(2, TRACE_DTYPE)
    >>> rows["op"], rows["addr"] = Op.FETCH, [0x1000, 0x2000]
    >>> recording = Recording.from_arrays(rows, memory=1 << 20, dins=[10, 5], name="two fetches")
    >>> recording
    <Recording 'two fetches': 2 rows, 0 pages, 1 MiB, paging off, 15 instructions>
    >>> [len(chunk.rows) for chunk in recording.chunks()]
    [2]
    """

    def __init__(self, meta: dict[str, Any], source: _Source, path: Path | None = None) -> None:
        self.meta = meta
        self.path = path
        self.pages = Pages(source, meta["pages"], meta["page_block"])
        self._source = source
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a recording file; reads its directory and meta only.

        Raises:
            OSError: the file is not there or may not be read.
            TraceError: it is no recording, of another version, or damaged; ``place`` names the member.
        """
        where = Path(path)
        handle = where.open("rb")
        try:
            with damage(str(where)):
                archive = zipfile.ZipFile(handle)
                names = set(archive.namelist())
            if META not in names:
                raise TraceError(f"no recording: it has no member {META}", place=str(where))
            if archive.getinfo(META).file_size > META_LIMIT:
                raise TraceError(f"larger than {META_LIMIT} bytes", place=META)
            with damage(META):
                text = archive.read(META)
            meta = parse_meta(text)
            _check_members(names, meta)
        except BaseException:
            handle.close()
            raise
        return cls(meta, _File(archive, handle), where)

    @classmethod
    def from_arrays(
        cls,
        rows: NDArray[np.void],
        *,
        memory: int,
        sregs: Mapping[str, int] | None = None,
        pages: ArrayLike | bytes = b"",
        gfn: ArrayLike | None = None,
        dins: ArrayLike | None = None,
        **meta: Any,
    ) -> Self:
        """A recording in memory; the arrays are copied.

        Args:
            rows: TRACE_DTYPE, shape (n,).
            memory: bytes of guest RAM from gpa 0.
            sregs: start values of cr0, cr3, cr4, efer; 0 where left out.
            pages: bytes, or uint8 of shape (n, 4096): what PAGE rows refer to.
            gfn, dins: uint32 of shape (n,), see `Chunk`.
            meta: further keys of meta: name, guest, made, vcpus, sites, ...

        Raises:
            TraceError: wrong dtype, shape or meta, or a row that no engine can run (``index``).
        """
        stored, contents = records(rows, gfn, dins), page_array(pages).copy()
        stored.flags.writeable = contents.flags.writeable = False
        full: dict[str, Any] = {"name": "", "guest": "", "made": "", "vcpus": 1, "sites": [0], **meta}
        full.update(
            schema=SCHEMA,
            memory=memory,
            sregs={"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0, **(sregs or {})},
            rows=len(stored),
            chunk_rows=CHUNK_ROWS,
            pages=len(contents),
            page_block=PAGE_BLOCK,
        )
        # Tally counts good rows only, and the limits of a good row are themselves checked first.
        check_meta({**full, **Tally().meta()})
        check_rows(stored, 0, vcpus=full["vcpus"], sites=len(full["sites"]), pages=len(contents))
        tally = Tally()
        tally.add(stored)
        full.update(tally.meta())
        full.setdefault("mode", paging_mode(full["sregs"]))
        return cls(full, _Arrays(stored, contents))

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.meta["rows"])

    def __bool__(self) -> bool:
        """True, also without rows: an open recording is no "nothing"."""
        return True

    def chunks(self) -> Iterator[Chunk]:
        """The rows in order, at most 262,144 at a time; one chunk is in memory.

        Raises:
            TraceError: while iterating, when a chunk is damaged (``place``) or has a row that no engine can run
                (``index``). The chunks before it are good.
        """
        return (_split(stored) for stored in self._stored())

    def to_arrays(self) -> Chunk:
        """All rows at once, as one `Chunk`: 32 bytes of memory a row."""
        parts = list(self._stored())
        return _split(np.concatenate(parts) if parts else np.empty(0, RECORD_DTYPE))

    def verify(self) -> None:
        """Read everything once and compare the sums in meta (counts, faults, instructions) with the rows.

        Raises:
            TraceError: a member is damaged, a row is bad, or meta does not fit.
        """
        tally = Tally()
        for stored in self._stored():
            tally.add(stored)
        for key, value in tally.meta().items():
            if self.meta.get(key) != value:
                raise TraceError(f"{self.meta.get(key)} stored, {value} in the rows", place=f"{META}: {key}")
        for _ in self.pages:
            pass

    def save(self, path: str | os.PathLike[str], *, compression: str = "lzma") -> None:
        """Write the recording to a file, see `RecordingWriter`."""
        with RecordingWriter(path, self.meta, compression=compression) as writer:
            for number in range(_parts(len(self.pages), PAGE_BLOCK)):
                last = min(len(self.pages), (number + 1) * PAGE_BLOCK)
                writer.add_pages(b"".join(self.pages[index] for index in range(number * PAGE_BLOCK, last)))
            for chunk in self.chunks():
                writer.append(*chunk)

    def close(self) -> None:
        """Close the file; chunks and pages can then no longer be read."""
        self._closed = True
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        memory = self.meta["memory"]
        unit, shift = next((pair for pair in (("GiB", 30), ("MiB", 20)) if memory % (1 << pair[1]) == 0), ("KiB", 10))
        parts = [f"{len(self):,} rows", f"{len(self.pages):,} pages", f"{memory >> shift:,} {unit}"]
        parts.append(self.meta.get("mode") or paging_mode(self.meta["sregs"]))
        if self.meta["instructions"]:
            parts.append(f"{self.meta['instructions']:,} instructions")
        return f"<Recording {self.meta['name']!r}: {', '.join(parts)}>"

    def _stored(self) -> Iterator[NDArray[np.void]]:
        """The chunks as RECORD_DTYPE, checked."""
        meta = self.meta
        limits = {"vcpus": meta["vcpus"], "sites": len(meta["sites"]), "pages": meta["pages"]}
        for number in range(_parts(len(self), meta["chunk_rows"])):
            if self._closed:
                raise ValueError("the recording is closed")
            first = number * meta["chunk_rows"]
            stored = self._source.chunk(number, min(meta["chunk_rows"], len(self) - first))
            check_rows(stored, first, **limits, place=chunk_name(number))
            yield stored


def _parts(total: int, size: int) -> int:
    return -(-total // size)


def _check_members(names: set[str], meta: Mapping[str, Any]) -> None:
    chunks, blocks = _parts(meta["rows"], meta["chunk_rows"]), _parts(meta["pages"], meta["page_block"])
    for name, count in ((chunk_name, chunks), (block_name, blocks)):
        # A count from a hostile meta may be huge: stop at the first that is missing.
        for number in range(count):
            if name(number) not in names:
                raise TraceError("the member is missing", place=name(number))


def _split(stored: NDArray[np.void]) -> Chunk:
    width = TRACE_DTYPE.itemsize
    head = stored.view(np.uint8).reshape(len(stored), RECORD_DTYPE.itemsize)[:, :width]
    rows = np.ascontiguousarray(head).reshape(-1).view(TRACE_DTYPE)
    gfn, dins = stored["gfn"].copy(), stored["dins"].copy()
    for array in (rows, gfn, dins):
        array.flags.writeable = False
    return Chunk(rows, gfn, dins)
