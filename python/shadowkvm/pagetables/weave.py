"""Rows of a trace, made many at a time, and woven together in the order of events."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.ops import TRACE_DTYPE, Op

__all__ = ["Weave", "make_rows"]

_WORDS: Final = TRACE_DTYPE.itemsize // 8


def make_rows(
    op: Op | ArrayLike, addr: ArrayLike = 0, value: ArrayLike = 0, *, size: int = 8, flags: ArrayLike = 0, vcpu: int = 0
) -> NDArray[np.void]:
    """Rows of TRACE_DTYPE, shape (n,): as many as the longest of ``op``, ``addr``, ``value``, ``flags``.

    >>> make_rows(Op.READ, [0x1000, 0x2000])["addr"].tolist()
    [4096, 8192]
    """
    ops, addrs = np.asarray(op, np.uint8), np.asarray(addr, np.uint64)
    values, bits = np.asarray(value, np.uint64), np.asarray(flags, np.uint8)
    count = max(part.size if part.ndim else 1 for part in (ops, addrs, values, bits))
    if any(part.ndim and not part.size for part in (ops, addrs, values, bits)):
        count = 0
    rows = np.zeros(count, TRACE_DTYPE)
    rows["op"], rows["addr"], rows["value"] = ops, addrs, values
    rows["size"], rows["flags"], rows["vcpu"] = size, bits, vcpu
    return rows


class Weave:
    """Puts rows in the order of the events that they belong to.

    Each of ``count`` events gets any number of rows; within an event they keep the order in which they were added.

    >>> weave = Weave(2)
    >>> weave.add(make_rows(Op.READ, [1, 2]))
    >>> weave.add(make_rows(Op.WRITE, [9]), at=np.array([1]))
    >>> weave.add(make_rows(Op.HLT), at=np.array([0, 1]))
    >>> weave.rows()["addr"].tolist()
    [1, 0, 2, 9, 0]
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # Rows as three numbers of 8 bytes each: NumPy moves those several times faster than records.
        self._parts: list[tuple[NDArray[np.int64] | None, NDArray[np.uint64]]] = []

    def add(self, rows: NDArray[np.void], at: NDArray[np.int64] | None = None) -> None:
        """Give each event of ``at`` (ascending; None: every event) one row; a single row goes to all of them."""
        if self._count if at is None else len(at):
            self._parts.append((at, _words(rows)))

    def add_block(self, event: int, rows: NDArray[np.void]) -> None:
        """Give one event several rows."""
        if len(rows):
            self._parts.append((np.full(len(rows), event), _words(rows)))

    def rows(self) -> NDArray[np.void]:
        """All rows in their order: TRACE_DTYPE."""
        counts = np.zeros(self._count, np.int64)
        for at, words in self._parts:
            if at is None:
                counts += 1
            elif at[0] == at[-1]:
                counts[at[0]] += len(words)
            else:
                counts[at] += 1
        following = np.cumsum(counts) - counts
        out = np.empty((int(counts.sum()), _WORDS), np.uint64)
        for at, words in self._parts:
            if at is None:
                out[following] = words
                following += 1
            elif at[0] == at[-1]:
                out[following[at[0]] : following[at[0]] + len(words)] = words
                following[at[0]] += len(words)
            else:
                out[following[at]] = words
                following[at] += 1
        return out.reshape(-1).view(TRACE_DTYPE)


def _words(rows: NDArray[np.void]) -> NDArray[np.uint64]:
    """Rows as numbers: shape (n, 3). A copy, so that the caller may go on with his rows."""
    return np.array(rows).view(np.uint64).reshape(-1, _WORDS)
