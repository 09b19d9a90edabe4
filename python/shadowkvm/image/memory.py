"""PhysicalMemory: pieces of physical memory, and where each stands."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shadowkvm.checks import integer
from shadowkvm.errors import ConfigError, GuestMemoryError

__all__ = ["CpuState", "MemoryLike", "PhysicalMemory"]

MemoryLike = Any
"""What `translate` and `walk` take as memory: a `PhysicalMemory`; an object with the buffer protocol (bytes, mmap, a
NumPy array or memmap), whose first byte stands at gpa 0; or (gpa, buffer) pairs."""


class CpuState(NamedTuple):
    """What a dump says of a CPU that looked at this memory."""

    cr0: int
    cr3: int
    cr4: int
    mode: str
    """Paging mode that these registers select, as `translate` takes it; "" if paging is off."""
    rip: int


class PhysicalMemory:
    """Pieces of physical memory: each a buffer, with the guest physical address (gpa) of its first byte.

    Nothing is copied; the buffers are held as long as this is. What lies in no piece is no memory.

    Args:
        pieces: (gpa, buffer) pairs in any order.
        cpus: states of CPUs, where the source has them.

    Raises:
        ConfigError: pieces overlap, or one goes beyond 2**64.
        TypeError: a piece is no (gpa, buffer).

    >>> memory = PhysicalMemory([(0x1000, bytes(4096)), (0x10_0000, b"abc")])
    >>> memory.size, memory.end, memory.read(0x10_0001, 2)
    (4099, 1048579, b'bc')
    """

    __slots__ = ("_bases", "cpus", "segments")

    segments: tuple[tuple[int, NDArray[np.uint8]], ...]
    """(gpa, bytes) in the order of addresses; each a one-dimensional uint8 array, a view of what was given."""
    cpus: tuple[CpuState, ...]
    """States of the CPUs; () if they are not known."""

    def __init__(self, pieces: Iterable[tuple[int, Any]], cpus: Iterable[CpuState] = ()) -> None:
        found = []
        for number, piece in enumerate(pieces):
            try:
                base, buffer = piece
                data = np.frombuffer(buffer, np.uint8)
            except (TypeError, ValueError, BufferError) as error:
                raise TypeError(f"piece {number}: (gpa, buffer) is expected, the buffer contiguous: {error}") from None
            found.append((integer(f"gpa of piece {number}", base), data))
        self.segments = tuple(sorted((s for s in found if len(s[1])), key=lambda s: s[0]))
        self.cpus = tuple(cpus)
        self._bases = [base for base, _ in self.segments]
        end = 0
        for base, data in self.segments:
            if base < end:
                raise ConfigError(f"the piece at {base:#x} overlaps the one that ends at {end:#x}")
            end = base + len(data)
            if end > 1 << 64:
                raise ConfigError(f"the piece at {base:#x}: its {len(data):,} bytes go beyond 2**64")

    @classmethod
    def of(cls, memory: MemoryLike) -> Self:
        """``memory`` itself, or made of a buffer or of pieces (see `MemoryLike`)."""
        if isinstance(memory, cls):
            return memory
        if isinstance(memory, (list, tuple)):
            return cls(memory)
        try:
            memoryview(memory)
        except TypeError:
            raise TypeError(
                f"memory: a buffer, (gpa, buffer) pairs or a PhysicalMemory is expected, not {type(memory).__name__}"
            ) from None
        return cls([(0, memory)])

    @property
    def size(self) -> int:
        """Bytes in all pieces."""
        return sum(len(data) for _, data in self.segments)

    @property
    def end(self) -> int:
        """One more than the highest address; 0 if there is no piece."""
        return self.segments[-1][0] + len(self.segments[-1][1]) if self.segments else 0

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``, from as many pieces as they lie in.

        Raises:
            GuestMemoryError: some of them lie in none.
        """
        at, rest = integer("gpa", gpa), integer("size", size)
        out = bytearray()
        while rest:
            number = bisect.bisect_right(self._bases, at) - 1
            base, data = self.segments[number] if number >= 0 else (0, np.zeros(0, np.uint8))
            part = data[at - base : at - base + rest]
            if not len(part):
                raise GuestMemoryError(
                    f"gpa {at:#x} is not in the image ({len(self.segments)} pieces, {self.size:,} bytes)"
                )
            out += part.tobytes()
            at, rest = at + len(part), rest - len(part)
        return bytes(out)

    def __repr__(self) -> str:
        return f"<PhysicalMemory: {len(self.segments)} pieces, {self.size:,} bytes below {self.end:#x}>"
