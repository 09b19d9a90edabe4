"""FramePool: which frames of guest memory are free, and in which order they are used again."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from shadowkvm.errors import ConfigError, GuestMemoryError

__all__ = ["FramePool", "Reuse"]

Reuse = Literal["lifo", "fifo"]

_HUGE: Final = 512


class FramePool:
    """Hands out frame numbers (gfn) of guest memory and takes them back.

    Args:
        first, last: the frames to hand out, ``first`` included, ``last`` not.
        reuse: "lifo": the frame that came back last goes out first, as Linux's per-CPU lists do (the guest's second
            stage stays warm); "fifo": a frame comes back into use only after all others.

    >>> pool = FramePool(0x100, 0x200)
    >>> pool.take(3).tolist()
    [256, 257, 258]
    >>> pool.give([257])
    >>> pool.take(2).tolist(), pool.free
    ([257, 259], 252)
    """

    def __init__(self, first: int, last: int, *, reuse: Reuse = "lifo") -> None:
        if reuse not in {"lifo", "fifo"}:
            raise ConfigError(f"reuse {reuse!r} is not known; there are: lifo, fifo")
        if not 0 <= first < last:
            raise ConfigError(f"frames {first:#x} to {last:#x}: none is left to hand out")
        self.first, self.last, self.reuse = first, last, reuse
        # Never handed out: [_low, _high). Huge pages come from the top, so that they stay aligned and together.
        self._low, self._high = first, last
        # Given back: in _back[_head:_tail].
        self._back = np.empty(1024, np.uint64)
        self._head = self._tail = 0
        self._huge: list[int] = []
        self._used = np.zeros(last - first, np.bool_)

    @property
    def free(self) -> int:
        """Frames that can still be had one by one."""
        return self._high - self._low + self._tail - self._head

    def take(self, count: int = 1) -> NDArray[np.uint64]:
        """``count`` frames: uint64, shape (count,).

        Raises:
            GuestMemoryError: there are not as many.
        """
        if count > self.free:
            raise GuestMemoryError(
                f"guest memory is used up: {count:,} frames are wanted, {self.free:,} of {self.last - self.first:,} are"
                f" free (give the guest more memory)"
            )
        used_before = self._tail - self._head
        fresh = self._high - self._low
        from_back = min(count, used_before) if self.reuse == "lifo" else max(0, count - fresh)
        new = np.arange(self._low, self._low + count - from_back, dtype=np.uint64)
        self._low += count - from_back
        if self.reuse == "lifo":
            back = self._back[self._tail - from_back : self._tail][::-1].copy()
            self._tail -= from_back
            out = np.concatenate((back, new))
        else:
            back = self._back[self._head : self._head + from_back].copy()
            self._head += from_back
            out = np.concatenate((new, back))
        self._used[(out - np.uint64(self.first)).astype(np.int64)] = True
        return out

    def take_pair(self) -> int:
        """Two neighbouring frames, the first one even: what Linux gives a process under KPTI for its two top tables."""
        low = self._low + (self._low & 1)
        if low + 2 > self._high:
            raise GuestMemoryError("guest memory is used up: no two neighbouring frames are left")
        if low > self._low:
            self._push(np.array([self._low], np.uint64))
        self._low = low + 2
        self._used[low - self.first : low - self.first + 2] = True
        return low

    def take_huge(self) -> int:
        """The first of 512 frames that together make a 2 MiB page."""
        if self._huge:
            gfn = self._huge.pop()
        else:
            gfn = (self._high - _HUGE) & ~(_HUGE - 1)
            if gfn < self._low:
                raise GuestMemoryError("guest memory is used up: no 2 MiB page is left")
            if gfn + _HUGE < self._high:
                self._push(np.arange(gfn + _HUGE, self._high, dtype=np.uint64))
            self._high = gfn
        self._used[gfn - self.first : gfn - self.first + _HUGE] = True
        return gfn

    def give(self, gfns: NDArray[np.uint64] | list[int]) -> None:
        """Take frames back, the last one to be used next (reuse "lifo").

        Raises:
            ConfigError: a frame that is free already, or not of this pool.
        """
        back = np.asarray(gfns, np.uint64)
        self._release(back)
        self._push(back)

    def give_huge(self, gfn: int) -> None:
        """Take 512 frames back that `take_huge` gave."""
        self._release(np.arange(gfn, gfn + _HUGE, dtype=np.uint64))
        self._huge.append(gfn)

    def _release(self, gfns: NDArray[np.uint64]) -> None:
        outside = (gfns < self.first) | (gfns >= self.last)
        at = np.where(outside, 0, gfns - np.uint64(self.first)).astype(np.int64)
        wrong = outside | ~self._used[at]
        if wrong.any() or len(np.unique(at)) < len(at):
            bad = int(gfns[int(np.argmax(wrong))]) if wrong.any() else int(gfns[0])
            raise ConfigError(f"frame {bad:#x} is given back, but was not in use ({self.first:#x} to {self.last:#x})")
        self._used[at] = False

    def _push(self, gfns: NDArray[np.uint64]) -> None:
        if self._tail + len(gfns) > len(self._back):
            held = self._back[self._head : self._tail]
            self._back = np.empty(2 * (len(held) + len(gfns)) + 1024, np.uint64)
            self._back[: len(held)] = held
            self._head, self._tail = 0, len(held)
        self._back[self._tail : self._tail + len(gfns)] = gfns
        self._tail += len(gfns)
