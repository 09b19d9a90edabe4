"""GuestMemory: what a builder knows of guest memory, and the stores that its changes would be in a guest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE, Op
from shadowkvm.pagetables.entries import W
from shadowkvm.pagetables.frames import FramePool, Reuse
from shadowkvm.pagetables.modes import PagingMode, paging
from shadowkvm.pagetables.weave import Weave, make_rows

if TYPE_CHECKING:
    from shadowkvm.vm import Vm

__all__ = ["GuestMemory"]

_EMPTY: Final = np.zeros(0, TRACE_DTYPE)
_FIRST: Final = 1 << 20
_PAGE_SHIFT, _IN_PAGE = np.uint64(12), np.uint64(PAGE_SIZE - 1)


class GuestMemory:
    """The content of a guest's page tables, which frames are free, and a log of the stores to tables.

    Only pages that were written are held; all others read as zeros. What is in data pages never matters here.

    Args:
        size: bytes of guest memory from gpa 0, a multiple of 4,096.
        mode: paging mode of the guest (a key of `MODES`): it decides how wide an entry and a store are.
        first: gpa of the first frame to hand out; what is below is left to the caller.
        reuse: in which order freed frames come back into use, see `FramePool`.

    >>> memory = GuestMemory(64 << 20)
    >>> table = memory.new_table()
    >>> with memory.logging() as log:
    ...     _ = memory.write(np.array([table + 8], np.uint64), 0x5067)
    >>> [(Op(row["op"]).name, hex(row["addr"]), hex(row["value"])) for row in log.rows()]
    [('WRITE', '0x100008', '0x5067')]
    """

    def __init__(
        self, size: int, mode: str | PagingMode = "4-level", *, first: int = _FIRST, reuse: Reuse = "lifo"
    ) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"memory {size:#x} is not a multiple of {PAGE_SIZE} above 0")
        if first % PAGE_SIZE or not 0 <= first < size:
            raise ConfigError(f"first {first:#x} is not a page of the memory of {size:#x} bytes")
        self.size, self.mode = size, paging(mode)
        if size > 1 << self.mode.physical_bits:
            raise ConfigError(f"memory {size:#x}: {self.mode.name} paging reaches {1 << self.mode.physical_bits:#x}")
        self.frames = FramePool(first >> 12, size >> 12, reuse=reuse)
        # One row a page that is held; row 0 is the page of zeros that stands for every page that was never written.
        self._words: NDArray[Any] = np.zeros((64, PAGE_SIZE // self.mode.entry_bytes), self.mode.dtype)
        self._held = 1
        # The row of each frame, and of what is beyond memory.
        self._where = np.zeros((size >> 12) + 1, np.int64)
        self._beyond = np.uint64(size >> 12)
        self._shift = self.mode.entry_bytes.bit_length() - 1
        self._logs: list[_Log] = []

    # -- content --------------------------------------------------------------------------------------------------

    def read(self, gpas: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The entries (of the mode's width) at ``gpas``, of any shape; 0 where nothing was written or no memory is."""
        row = self._where[np.minimum(gpas >> _PAGE_SHIFT, self._beyond)]
        out: NDArray[np.uint64] = self._words[row, (gpas & _IN_PAGE) >> self._shift].astype(np.uint64, copy=False)
        return out

    def table(self, gpa: int) -> NDArray[np.uint64]:
        """A copy of all entries of the table at ``gpa`` (512, 1,024, or 4 at the top of PAE)."""
        count = PAGE_SIZE - gpa % PAGE_SIZE >> self._shift
        start = gpa % PAGE_SIZE >> self._shift
        return self._words[self._where[gpa >> 12], start : start + count].astype(np.uint64)

    def poke(self, gpas: NDArray[np.uint64], values: NDArray[np.uint64] | int) -> None:
        """Change entries without a store: what the CPU itself does when it sets A and D."""
        if len(gpas):
            self._words[self._rows_for(gpas >> _PAGE_SHIFT), (gpas & _IN_PAGE) >> self._shift] = values

    def _rows_for(self, gfns: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The arena's rows of these frames; new ones for those that have none yet."""
        if len(gfns) and gfns.max() >= self._beyond:
            raise ConfigError(f"gpa {int(gfns.max()) << 12:#x} is beyond the memory of {self.size:#x} bytes")
        rows: NDArray[np.int64] = self._where[gfns]
        if not rows.all():
            missing = np.unique(gfns[rows == 0])
            need = self._held + len(missing)
            if need > len(self._words):
                grown = np.zeros((2 * need, self._words.shape[1]), self._words.dtype)
                grown[: self._held] = self._words[: self._held]
                self._words = grown
            self._where[missing] = np.arange(self._held, need)
            self._held = need
            rows = self._where[gfns]
        return rows

    # -- stores ---------------------------------------------------------------------------------------------------

    def write(
        self, gpas: NDArray[np.uint64], values: NDArray[np.uint64] | int, op: Op = Op.WRITE, *, log: bool = True
    ) -> NDArray[np.void]:
        """Store entries, in the order given.

        Args:
            gpas: of the entries, uint64, shape (n,); none twice.
            values: the new entries, or one for all.
            op: the instruction: WRITE (MOV, ``set_pte``), XCHG (``ptep_get_and_clear``), STORE (a string instruction).
            log: note the stores in the open logs.

        Returns:
            The stores as rows with ``addr`` = gpa: TRACE_DTYPE, shape (n, k). k is 2 where the guest stores half an
            entry at a time (PAE): the high half first, or when it clears, the low one; so that no CPU ever sees a
            present entry with half an address.
        """
        entries = np.broadcast_to(np.asarray(values, np.uint64), gpas.shape)
        self.poke(gpas, entries)
        width = self.mode.word
        if width == self.mode.entry_bytes or op == Op.XCHG:
            # CMPXCHG8B does for a PAE guest what XCHG does for others: one store of 8 bytes.
            out = make_rows(op, gpas, entries, size=self.mode.entry_bytes).reshape(-1, 1)
        else:
            out = self._halves(gpas, entries, op)
        if log:
            self.note(out.reshape(-1))
        return out

    def _halves(self, gpas: NDArray[np.uint64], entries: NDArray[np.uint64], op: Op) -> NDArray[np.void]:
        low = make_rows(op, gpas, entries & np.uint64(0xFFFF_FFFF), size=4)
        high = make_rows(op, gpas + np.uint64(4), entries >> np.uint64(32), size=4)
        clears = (entries == 0)[:, None]
        return np.where(clears, np.stack((low, high), 1), np.stack((high, low), 1))

    def write_protect(self, gpas: NDArray[np.uint64], *, log: bool = True) -> NDArray[np.void]:
        """Take bit W away as Linux does when it forks (``ptep_set_wrprotect``): a locked AND of one byte.

        Returns:
            The stores, shape (n, 1), as `write`.
        """
        self.poke(gpas, self.read(gpas) & ~np.uint64(W))
        out = make_rows(Op.AND, gpas, 0xFF ^ W, size=1).reshape(-1, 1)
        if log:
            self.note(out.reshape(-1))
        return out

    def clear(self, gpa: int) -> None:
        """Zero a page as a kernel does before it becomes a table (``clear_page``, a string instruction).

        Logged are the first word and those that were not 0 before. That is enough: the first store settles with the
        shadow MMU whether the page is writable, and it stays so for the others.
        """
        word = self.mode.word
        gfn = np.array([gpa >> 12], np.uint64)
        row = int(self._rows_for(gfn)[0])
        words = self._words[row].view(f"<u{word}")
        used = np.union1d(np.flatnonzero(words), 0).astype(np.uint64)
        self._words[row] = 0
        self.note(make_rows(Op.STORE, np.uint64(gpa) + used * np.uint64(word), size=word))

    def new_table(self) -> int:
        """A zeroed frame for a table; its gpa."""
        gpa = int(self.frames.take()[0]) << 12
        self.clear(gpa)
        return gpa

    def new_tables(self, count: int) -> NDArray[np.uint64]:
        """Frames for ``count`` tables, zeroed without a store: for what is there before the guest runs. Their gpas."""
        gfns = self.frames.take(count)
        rows = self._rows_for(gfns)
        self._words[rows] = 0
        return gfns << np.uint64(12)

    # -- the log --------------------------------------------------------------------------------------------------

    def note(self, rows: NDArray[np.void]) -> None:
        """Put rows (``addr`` = gpa) into the open logs."""
        for log in self._logs:
            log.parts.append(rows)

    @property
    def logged(self) -> bool:
        """Whether anybody notes the stores."""
        return bool(self._logs)

    @contextmanager
    def logging(self) -> Iterator[_Log]:
        """Note every store of the ``with`` block; ``log.rows()`` has them, ``addr`` = gpa."""
        log = _Log()
        self._logs.append(log)
        try:
            yield log
        finally:
            self._logs.remove(log)

    # -- out of here ----------------------------------------------------------------------------------------------

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Every page that was written and is not all zeros: gpa and content, in the order of gpa."""
        for gfn in np.flatnonzero(self._where).tolist():
            content = self._words[self._where[gfn]]
            if content.any():
                yield gfn << 12, content.tobytes()

    def install(self, vm: Vm) -> None:
        """Write every page into the memory of ``vm``, from the host's side.

        Raises:
            GuestMemoryError: the VM has less memory.
        """
        for gpa, content in self.pages():
            vm.write_memory(gpa, content)

    def __repr__(self) -> str:
        return f"<GuestMemory {self.size >> 20} MiB, {self.mode.name}, {self.frames.free:,} frames free>"


class _Log:
    """Stores in their order."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.void]] = []

    def rows(self) -> NDArray[np.void]:
        """The stores so far: TRACE_DTYPE, shape (n,), ``addr`` = gpa."""
        return np.concatenate(self.parts) if self.parts else _EMPTY

    def take(self) -> NDArray[np.void]:
        """The stores so far, which are then forgotten."""
        rows = self.rows()
        self.parts.clear()
        return rows


def interleave(*columns: NDArray[np.void] | tuple[NDArray[np.void], NDArray[np.int64]]) -> NDArray[np.void]:
    """Rows of shape (n, k), woven so that all rows of item 0 come first, then those of item 1, ...

    A column can be a pair: rows of shape (m, k), and the m items (ascending) that they belong to. The last column has
    rows for every item.
    """
    last = columns[-1]
    weave = Weave(len(last[0] if isinstance(last, tuple) else last))
    for column in columns:
        rows, at = column if isinstance(column, tuple) else (column, None)
        for part in rows.T:
            weave.add(part, at)
    return weave.rows()
