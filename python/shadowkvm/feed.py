"""The way of a trace into the engine: checked, cut into pieces, run piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.counters import Counters
from shadowkvm.errors import ConfigError, TraceError
from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE, Op
from shadowkvm.result import OUTCOME_DTYPE, STATUS_NAMES, RunResult
from shadowkvm.trace import CHUNK_ROWS, Recording

if TYPE_CHECKING:
    from shadowkvm._core import Vm

__all__ = ["Piece", "check_trace", "pieces", "run"]

# Page contents are handed over beside the rows; 16 MiB at a time.
_PAGES_AT_ONCE: Final = 4096


class Piece(NamedTuple):
    """Consecutive rows of a trace, ready for the engine."""

    first: int
    """Number of the first row in the whole trace."""
    rows: NDArray[np.void]
    """TRACE_DTYPE, shape (n,), C order; the values of PAGE rows index `pages`."""
    pages: bytes
    """Page contents, 4,096 bytes each."""
    gfn: NDArray[np.uint32] | None
    """The recording's check column for these rows; None for a plain trace."""
    instructions: NDArray[np.uint32] | None
    """Guest instructions since the row before; None for a plain trace."""


def check_trace(trace: object) -> None:
    """Refuse what is neither a Recording nor a one-dimensional array of TRACE_DTYPE; the message has the reason.

    Raises:
        TraceError: another type, dtype, byte order or number of dimensions.
    """
    if isinstance(trace, Recording):
        return
    if not isinstance(trace, np.ndarray):
        hint = (
            "; open a file with Recording.open"
            if isinstance(trace, str | bytes) or hasattr(trace, "__fspath__")
            else ""
        )
        raise TraceError(f"a trace is a NumPy array of TRACE_DTYPE or a Recording, not {type(trace).__name__}{hint}")
    if trace.dtype != TRACE_DTYPE:
        swapped = trace.dtype.newbyteorder("S") == TRACE_DTYPE
        why = "big-endian; little-endian is expected" if swapped else f"of dtype {_dtype(trace.dtype)}, not TRACE_DTYPE"
        raise TraceError(f"the array is {why} ({_dtype(TRACE_DTYPE)})")
    if trace.ndim != 1:
        raise TraceError(f"the array has shape {trace.shape}; one dimension is expected")


def _dtype(dtype: np.dtype[Any]) -> str:
    if dtype.names is None or dtype.fields is None:
        return str(dtype)
    fields = ", ".join(f"{name} {dtype.fields[name][0].str}" for name in dtype.names)
    return f"{{{fields}; {dtype.itemsize} bytes}}"


def pieces(trace: NDArray[np.void] | Recording, limit: int = CHUNK_ROWS) -> Iterator[Piece]:
    """A checked trace as pieces of at most ``limit`` rows; one chunk of a recording is in memory."""
    first = 0
    if not isinstance(trace, Recording):
        for at in range(0, len(trace), limit):
            # A copy only if the array is strided: the engine makes its own.
            yield Piece(at, np.ascontiguousarray(trace[at : at + limit]), b"", None, None)
        return
    for chunk in trace.chunks():
        for start, end in pairwise(_cuts(chunk.rows, limit)):
            rows, blob = _with_pages(chunk.rows[start:end], trace)
            yield Piece(first + start, rows, blob, chunk.gfn[start:end], chunk.dins[start:end])
        first += len(chunk.rows)


def _cuts(rows: NDArray[np.void], limit: int) -> list[int]:
    """Where to cut, both ends included: after ``limit`` rows, and before there are too many pages."""
    bounds = set(range(0, len(rows), limit)) | {len(rows)}
    bounds.update(np.flatnonzero(rows["op"] == Op.PAGE)[_PAGES_AT_ONCE::_PAGES_AT_ONCE].tolist())
    return sorted(bounds)


def _with_pages(rows: NDArray[np.void], recording: Recording) -> tuple[NDArray[np.void], bytes]:
    """The rows with the indices of their PAGE rows counted anew, and the contents they then refer to."""
    where = np.flatnonzero(rows["op"] == Op.PAGE)
    if not len(where):
        return rows, b""
    wanted, local = np.unique(rows["value"][where], return_inverse=True)
    rows = rows.copy()
    rows["value"][where] = local
    return rows, b"".join(recording.pages[int(index)] for index in wanted)


def prepare(vm: Vm, recording: Recording) -> None:
    """Give vCPU 0 the registers that the recording starts with, and the engine its instruction addresses.

    Raises:
        ConfigError: the VM is too small for the recording, or the engine has no such paging mode.
    """
    count = len(vm.vcpus)
    if count < recording.meta["vcpus"]:
        raise ConfigError(f"the recording has {recording.meta['vcpus']} vCPUs, the VM {count}")
    last = recording.meta["memory"] - PAGE_SIZE
    try:
        vm.read_memory(last, PAGE_SIZE)
    except LookupError:
        need = recording.meta["memory"]
        raise ConfigError(f"the recording needs {need:#x} bytes of guest memory from 0 (memory={need})") from None
    vm.vcpus[0].set_sregs(**recording.meta["sregs"])
    vm.set_sites(recording.meta["sites"])


def run(
    vm: Vm,
    trace: NDArray[np.void] | Recording,
    *,
    outcomes: bool = False,
    each: Callable[[Piece], None] | None = None,
    limit: int = CHUNK_ROWS,
) -> RunResult:
    """Run a trace; `shadowkvm.Vm.run` has the whole story.

    Args:
        vm: the machine.
        trace: rows, or a recording.
        outcomes: keep the outcome of each row.
        each: called after each piece was run.
        limit: rows of a piece.
    """
    check_trace(trace)
    if isinstance(trace, Recording):
        prepare(vm, trace)
    before = Counters(vm.counter_values())
    kept = np.zeros(len(trace), OUTCOME_DTYPE) if outcomes else None
    status, faults = np.zeros(len(STATUS_NAMES), np.int64), np.zeros(3, np.int64)
    first_mismatch: int | None = None
    rows = instructions = 0
    seconds = 0.0
    for piece in pieces(trace, limit):
        # A view, not a copy: the engine copies the bytes itself before it lets go of the GIL.
        data = piece.rows.view(np.uint8).data
        start = time.perf_counter()
        by_status, *counts, mismatch, packed = vm.run_rows(data, piece.first, piece.pages, outcomes)
        seconds += time.perf_counter() - start
        status += by_status
        faults += counts
        first_mismatch = mismatch if first_mismatch is None else first_mismatch
        if kept is not None and packed is not None:
            kept[rows : rows + len(piece.rows)] = np.frombuffer(packed, OUTCOME_DTYPE)
        rows += len(piece.rows)
        instructions += int(piece.instructions.sum(dtype=np.int64)) if piece.instructions is not None else 0
        if each is not None:
            each(piece)
    if kept is not None:
        kept.flags.writeable = False
    return RunResult(
        rows=rows,
        seconds=seconds,
        status=dict(zip(STATUS_NAMES, status.tolist(), strict=True)),
        counters=Counters(vm.counter_values()) - before,
        faults_matched=int(faults[0]),
        faults_missed=int(faults[1]),
        faults_unexpected=int(faults[2]),
        first_mismatch=first_mismatch,
        instructions=instructions,
        outcomes=kept,
    )
