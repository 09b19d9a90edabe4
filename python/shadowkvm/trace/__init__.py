"""Traces and recordings: read them, write them, import them.

`Recording` and `RecordingWriter` handle the format of docs/recordings.md; `import_raw` makes a recording from what the
recorder wrote. A trace in memory is a plain array of `TRACE_DTYPE`.
"""

from __future__ import annotations

from shadowkvm.ops import NO_PAGE, PAGE_SIZE, TRACE_DTYPE, Flag, Op
from shadowkvm.trace.format import CHUNK_ROWS, RECORD_DTYPE, SCHEMA, paging_mode
from shadowkvm.trace.raw import RAW_DTYPE, import_raw
from shadowkvm.trace.read import Chunk, Pages, Recording
from shadowkvm.trace.write import RecordingWriter

__all__ = [
    "CHUNK_ROWS",
    "NO_PAGE",
    "PAGE_SIZE",
    "RAW_DTYPE",
    "RECORD_DTYPE",
    "SCHEMA",
    "TRACE_DTYPE",
    "Chunk",
    "Flag",
    "Op",
    "Pages",
    "Recording",
    "RecordingWriter",
    "import_raw",
    "paging_mode",
]
