"""Rows of a trace, made many at a time, and woven together in the order of events."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.ops import TRACE_DTYPE, Op

__all__ = ["Weave", "make_rows"]


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
        self._parts: list[tuple[NDArray[np.int64] | None, NDArray[np.void]]] = []

    def add(self, rows: NDArray[np.void], at: NDArray[np.int64] | None = None) -> None:
        """Give each event of ``at`` (ascending; None: every event) one row; a single row goes to all of them."""
        wanted = self._count if at is None else len(at)
        if wanted:
            self._parts.append((at, rows if len(rows) == wanted else np.broadcast_to(rows, wanted)))

    def add_block(self, event: int, rows: NDArray[np.void]) -> None:
        """Give one event several rows."""
        if len(rows):
            self._parts.append((np.full(len(rows), event), rows))

    def rows(self) -> NDArray[np.void]:
        """All rows in their order: TRACE_DTYPE."""
        counts = np.zeros(self._count, np.int64)
        for at, rows in self._parts:
            if at is None:
                counts += 1
            elif len(at) and at[0] == at[-1]:
                counts[at[0]] += len(rows)
            else:
                counts[at] += 1
        following = np.cumsum(counts) - counts
        out = np.empty(int(counts.sum()), TRACE_DTYPE)
        for at, rows in self._parts:
            if at is None:
                out[following] = rows
                following += 1
            elif len(at) and at[0] == at[-1]:
                out[following[at[0]] : following[at[0]] + len(rows)] = rows
                following[at[0]] += len(rows)
            else:
                out[following[at]] = rows
                following[at] += 1
        return out
