"""The registry: the workloads of this package, and those that other packages bring as entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final, NamedTuple

from shadowkvm.checks import nearest
from shadowkvm.errors import ConfigError
from shadowkvm.workloads.builtin import BUILTIN
from shadowkvm.workloads.workload import Workload

__all__ = ["GROUP", "Entry", "entries", "get"]

GROUP: Final = "shadowkvm.workloads"
"""The entry point group: the name of a workload = "package.module:OBJECT", a `Workload` of that name."""

_HERE: Final = "shadowkvm"


class Entry(NamedTuple):
    """A workload that is there, or one that cannot be had."""

    name: str
    workload: Workload | None
    origin: str
    """The distribution that brings it."""
    trouble: str = ""
    """Why it cannot be had."""
    cause: Exception | None = None


def entries() -> list[Entry]:
    """Every workload: this package's in their order, then those of others by name. A broken one raises nothing."""
    out = [Entry(workload.name, workload, _HERE) for workload in BUILTIN]
    taken = {entry.name: entry.origin for entry in out}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        origin = point.dist.name if point.dist is not None else "?"
        if point.name in taken:
            out.append(Entry(point.name, None, origin, f"the name is taken by {taken[point.name]}"))
            continue
        taken[point.name] = origin
        try:
            loaded = point.load()
        except Exception as error:  # noqa: BLE001 -- whatever a foreign module raises, the others are to be listed
            trouble = f"{point.value} cannot be loaded: {type(error).__name__}: {error}"
            out.append(Entry(point.name, None, origin, trouble, error))
            continue
        if not isinstance(loaded, Workload) or loaded.name != point.name:
            what = f"the workload {loaded.name!r}" if isinstance(loaded, Workload) else f"a {type(loaded).__name__}"
            out.append(Entry(point.name, None, origin, f"{point.value} is {what}, not the Workload {point.name!r}"))
            continue
        out.append(Entry(point.name, loaded, origin))
    return out


def get(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ConfigError: there is none (the message has the nearest), or it cannot be loaded (``__cause__`` says why).
    """
    known = entries()
    for entry in known:
        if entry.name == name and entry.workload is not None:
            return entry.workload
    for entry in known:
        if entry.name == name:
            raise ConfigError(f"workload {name!r} of {entry.origin}: {entry.trouble}") from entry.cause
    raise ConfigError(f"workload {name!r} is not known{nearest(name, [entry.name for entry in known])}")
