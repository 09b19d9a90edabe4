"""The exceptions of shadowkvm: one base, one class for each kind of misuse.

Guest faults are results, never exceptions. What is raised here is a mistake of the caller or a bad file, and the
message names the value, the limit and the place. The compiled engine raises these same classes.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CostError",
    "GuestMemoryError",
    "InvariantError",
    "PolicyError",
    "SavedStateError",
    "ShadowKvmError",
    "TraceError",
]


class ShadowKvmError(Exception):
    """Base of everything that shadowkvm raises on purpose."""


class ConfigError(ShadowKvmError, ValueError):
    """A machine that cannot be built or a setting out of its range (sizes, slots, registers, paging modes)."""


class CostError(ShadowKvmError, ValueError):
    """A cost table that cannot be used: no TOML, an unknown or missing key, a figure without a source."""


class TraceError(ShadowKvmError, ValueError):
    """A trace or a recording that cannot be read.

    Attributes:
        index: number of the row (or raw record) at fault, counted from 0; None where no single row is to blame.
        place: the file, member or field at fault ("chunk-00003.npy", "meta.json: memory"); None for a plain array.

    >>> error = TraceError("op code 77 is unknown", index=3)
    >>> str(error), error.index
    ('row 3: op code 77 is unknown', 3)
    """

    def __init__(self, message: str, index: int | None = None, place: str | None = None) -> None:
        super().__init__(message)
        self.index = index
        self.place = place

    def __str__(self) -> str:
        where = [] if self.place is None else [self.place]
        if self.index is not None:
            where.append(f"row {self.index}")
        return ": ".join([", ".join(where), str(self.args[0])]) if where else str(self.args[0])


class PolicyError(ShadowKvmError):
    """A policy hook failed; the exception that it raised is the ``__cause__``."""


class GuestMemoryError(ShadowKvmError, LookupError):
    """A guest physical address that no memslot holds.

    Attributes:
        gpa: the first guest physical address (bytes) that could not be reached; None if unknown.
    """

    def __init__(self, message: str, gpa: int | None = None) -> None:
        super().__init__(message)
        self.gpa = gpa


class SavedStateError(ShadowKvmError, ValueError):
    """A pickled `Vm` or `Snapshot` whose bytes are damaged, or were written by another version of shadowkvm."""


class InvariantError(ShadowKvmError):
    """The audit found the shadow state inconsistent: a bug of the engine or of a policy.

    Attributes:
        replay: command or seed that shows the bug again; None if there is none.
    """

    def __init__(self, message: str, replay: str | None = None) -> None:
        super().__init__(message)
        self.replay = replay
