"""Steps of a scenario: rows of a trace, or an act of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError
from shadowkvm.ops import TRACE_DTYPE, Op
from shadowkvm.pagetables import make_rows

if TYPE_CHECKING:
    from shadowkvm.vm import Vm

__all__ = ["START", "HostAct", "Step"]

START: Final = "start"
"""The phase in which the shadow tables are first built; no unit of work is done in it."""

_NO_ROWS: Final = np.zeros(0, TRACE_DTYPE)


def _slot_row(slot: int, gpa: int, size: int, readonly: bool = False, dirty_log: bool = False) -> NDArray[np.void]:
    return make_rows([Op.SLOT_ADD], gpa, size, size=slot, flags=int(readonly) | int(dirty_log) << 1)


_ROWS: Final[Mapping[str, Callable[..., NDArray[np.void]]]] = {
    "add_slot": _slot_row,
    "delete_slot": lambda slot: make_rows([Op.SLOT_DEL], size=slot),
    "get_dirty_log": lambda slot: make_rows([Op.GET_DIRTY_LOG], value=slot),
    "set_dirty_log": lambda slot, enabled: make_rows([Op.SET_DIRTY_LOG], slot, int(enabled)),
    "notifier_unmap": lambda gpa, size: make_rows([Op.UNMAP], gpa, size),
    "set_page_quota": lambda n: make_rows([Op.QUOTA], value=n),
}


@dataclass(frozen=True, slots=True)
class HostAct:
    """What the host does between two pieces of the trace: a method of `Vm` by its name, and its arguments.

    >>> HostAct("get_dirty_log", (0,)).row()["op"].tolist()
    [22]
    """

    method: str
    """add_slot, delete_slot, get_dirty_log, set_dirty_log, notifier_unmap or set_page_quota."""
    arguments: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in _ROWS:
            raise ConfigError(f"the host cannot {self.method!r}{nearest(self.method, _ROWS)}")

    def apply(self, vm: Vm) -> int:
        """Do it; of a dirty log the number of frames that it had, else 0."""
        done = getattr(vm, self.method)(*self.arguments)
        return len(done) if isinstance(done, list) else 0

    def row(self) -> NDArray[np.void]:
        """The same as one row of a trace."""
        return _ROWS[self.method](*self.arguments)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A piece of a scenario."""

    phase: str
    """What it is for; steps of one phase are counted together."""
    rows: NDArray[np.void] = field(default_factory=lambda: _NO_ROWS)
    """TRACE_DTYPE, shape (n,)."""
    act: HostAct | None = None
    """Done before the rows."""
    units: float = 0
    """How much of the scenario's work is done with it, in the workload's unit."""

    def trace(self) -> NDArray[np.void]:
        """Act and rows as rows."""
        return self.rows if self.act is None else np.concatenate((self.act.row(), self.rows))
