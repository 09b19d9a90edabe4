"""Events: KVM's tracepoints as one structured array, and the choice of those that are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm._core import EVENTS
from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError

__all__ = ["ALL_EVENTS", "EVENT_DTYPE", "EVENT_INFO", "EventInfo", "event_array", "event_mask"]

EVENT_DTYPE: Final = np.dtype(
    [
        ("op", "<u8"),
        ("a", "<u8"),
        ("b", "<u8"),
        ("c", "<u8"),
        ("code", "<u4"),
        ("kind", "<u1"),
        ("vcpu", "<u1"),
        ("level", "<u1"),
        ("flag", "<u1"),
    ]
)
"""One event: 40 bytes, packed, little-endian.

op u8 (number of the operation that raised it, from 0 over the VM's life), kind u1 (code in `EVENT_INFO`), vcpu u1;
what a u8, b u8, c u8, code u4, level u1 and flag u1 hold depends on the kind, see ``EVENT_INFO[name].doc``.
"""


class EventInfo(NamedTuple):
    """One kind of event: the row of the engine's own table."""

    code: int
    """What the field ``kind`` holds."""
    name: str
    """The tracepoint's name in the kernel."""
    doc: str
    """When it is raised, and what its fields hold."""


EVENT_INFO: Final[Mapping[str, EventInfo]] = {row[1]: EventInfo(*row) for row in EVENTS}
"""Every kind of event by its name."""

ALL_EVENTS: Final = (1 << len(EVENT_INFO)) - 1


def event_mask(events: bool | Iterable[str]) -> int:
    """The engine's mask for a choice of events.

    Args:
        events: True (all), False (none), or names of tracepoints.

    Raises:
        ConfigError: a name that is no event; the message has the nearest ones.

    >>> event_mask(["kvm_exit", "kvm_page_fault"])
    3
    """
    if isinstance(events, bool):
        return ALL_EVENTS if events else 0
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise ConfigError(f"events {events!r}: True, False or a list of names is expected")
    mask = 0
    for name in events:
        if name not in EVENT_INFO:
            raise ConfigError(f"event {name!r} is not known{nearest(str(name), EVENT_INFO)}")
        mask |= 1 << EVENT_INFO[name].code
    return mask


def event_array(records: bytes) -> NDArray[np.void]:
    """The engine's packed records as a read-only array of EVENT_DTYPE, shape (n,)."""
    array: NDArray[Any] = np.frombuffer(records, EVENT_DTYPE)
    return array
