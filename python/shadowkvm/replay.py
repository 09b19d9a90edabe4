"""Replay: a trace or a recording run from its start on a fresh VM, with all that a report tells of it."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shadowkvm import feed
from shadowkvm._core import MODEL_VERSION
from shadowkvm.breakdown import EVENTS_NEEDED, Breakdown
from shadowkvm.errors import ConfigError, TraceError
from shadowkvm.events import event_array
from shadowkvm.result import RunResult
from shadowkvm.trace import CHUNK_ROWS, Recording, paging_mode
from shadowkvm.vm import Vm

__all__ = ["EventSink", "Replay", "fresh_vm", "open_trace", "replay", "told_of"]

# Events wait in memory until a piece is done; a row raises a dozen of 40 bytes at worst, but for zaps.
_PIECE_ROWS: Final = 1 << 15
_DEFAULT_MEMORY: Final = 128 << 20


class EventSink(Protocol):
    """Where events go, piece by piece."""

    def put(self, vm: Vm, events: NDArray[np.void]) -> None:
        """Take events (EVENT_DTYPE), all that ``vm`` holds at the moment."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay that is done: what was run, how, what it came to."""

    trace: dict[str, Any]
    """name, guest, made, mode, memory (bytes), rows; of a plain trace what is known."""
    settings: dict[str, Any]
    """policy, profile, quota (None: KVM's default), vcpus."""
    result: RunResult
    breakdown: Breakdown
    recorded: bool
    """It was a Recording, so that its faults and frames can be held against the replay's."""
    elapsed: float
    """Wall-clock seconds of it all: reading, engine, breakdown, writing of events."""
    model: str
    """The kernel whose rules held."""

    @property
    def mismatches(self) -> int:
        """Faults and translations that are not the recorded guest's; 0 for a plain trace."""
        result = self.result
        if not self.recorded:
            return 0
        return result.faults_missed + result.faults_unexpected + self.breakdown.checks.wrong


def open_trace(path: str | Path) -> Recording | NDArray[np.void]:
    """Open a recording, or a plain trace saved by ``numpy.save`` (as a memory map).

    Raises:
        OSError: the file is not there or may not be read.
        TraceError: it is neither, or damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] == b"PK\x03\x04" or zipfile.is_zipfile(path):
        return Recording.open(path)
    if head[:6] == b"\x93NUMPY":
        try:
            rows: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise TraceError(f"damaged: {error}", place=str(path)) from error
        feed.check_trace(rows)
        return rows
    raw = head[:4] == b"\x28\xb5\x2f\xfd"
    hint = "; a raw recording is imported by: shadowkvm trace import" if raw else ""
    raise TraceError(f"neither a recording (.npz) nor a trace (.npy){hint}", place=str(path))


def told_of(trace: Recording | NDArray[np.void], name: str, vm: Vm) -> dict[str, Any]:
    """What is known of a trace that is to run on a VM: name, guest, made, mode, rows, memory."""
    if isinstance(trace, Recording):
        keys = ("name", "guest", "made", "mode", "rows")
        return {**{key: trace.meta.get(key, "") for key in keys}, "memory": vm.memory}
    mode = paging_mode(vm.vcpus[0].sregs)
    return {"name": name, "guest": "", "made": "", "mode": mode, "rows": len(trace), "memory": vm.memory}


def _machine(trace: Recording, memory: int | None, **settings: Any) -> Vm:
    """A VM as the recording has it. Settings are the caller's fault, all else is the recording's."""
    meta = trace.meta
    if memory is not None and memory < meta["memory"]:
        raise ConfigError(f"memory {memory:#x}: the recording needs {meta['memory']:#x} bytes")
    Vm(4096, **settings)
    try:
        vm = Vm(memory or meta["memory"], vcpus=meta["vcpus"], **settings)
        feed.prepare(vm, trace)
    except ConfigError as error:
        raise TraceError(str(error), place=str(trace.path or meta["name"])) from error
    return vm


def _vcpus(trace: NDArray[np.void]) -> int:
    chunks = (trace["vcpu"][at : at + CHUNK_ROWS] for at in range(0, len(trace), CHUNK_ROWS))
    return 1 + max((int(chunk.max()) for chunk in chunks), default=0)


def fresh_vm(trace: Recording | NDArray[np.void], *, memory: int | None = None, **settings: Any) -> Vm:
    """A VM that a trace can run on: as the recording has it; for a plain trace of 128 MiB, with the vCPUs in it.

    Args:
        trace: a Recording, or an array of TRACE_DTYPE.
        memory: bytes of guest memory, if it is to be otherwise.
        settings: of `Vm`.

    Raises:
        ConfigError: a setting that cannot be.
        TraceError: no VM can be as the recording says.
    """
    if isinstance(trace, Recording):
        return _machine(trace, memory, **settings)
    return Vm(memory or _DEFAULT_MEMORY, vcpus=_vcpus(trace), **settings)


def replay(
    trace: Recording | NDArray[np.void],
    *,
    name: str = "",
    policy: str | None = None,
    profile: str = "zen",
    model_version: str = MODEL_VERSION,
    memory: int | None = None,
    quota: int | None = None,
    sink: EventSink | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Run ``trace`` on a fresh VM.

    Args:
        trace: a Recording, or an array of TRACE_DTYPE.
        name: what to call a plain trace.
        policy, profile, model_version: see `Vm`.
        memory: bytes of guest memory; None: what the recording says, 128 MiB for a plain trace.
        quota: number of shadow pages; None: KVM's default.
        sink: takes every event.
        progress: called with the number of rows so far and of all rows.

    Raises:
        ConfigError: a setting that cannot be, or a recording in a paging mode that the engine lacks.
        TraceError: a row that cannot be run, or damage (``index``, ``place``).
    """
    start = time.perf_counter()
    feed.check_trace(trace)
    settings: dict[str, Any] = {"policy": policy, "profile": profile, "model_version": model_version}
    settings["events"] = True if sink else EVENTS_NEEDED
    vm = fresh_vm(trace, memory=memory, **settings)
    if quota is not None:
        vm.set_page_quota(quota)
    breakdown = Breakdown([cpu.sregs["cr3"] for cpu in vm.vcpus])

    def each(piece: feed.Piece) -> None:
        events = event_array(vm.event_records())
        # The VM is fresh: operations are numbered as the rows are.
        breakdown.add(piece, events, piece.first)
        if sink is not None:
            sink.put(vm, events)
        vm.clear_events()
        if progress is not None:
            progress(piece.first + len(piece.rows), len(trace))

    about = told_of(trace, name, vm)
    result = feed.run(vm, trace, each=each, limit=_PIECE_ROWS)
    return Replay(
        trace=about,
        settings={"policy": vm.policy, "profile": vm.profile, "quota": quota, "vcpus": len(vm.vcpus)},
        result=result,
        breakdown=breakdown,
        recorded=isinstance(trace, Recording),
        elapsed=time.perf_counter() - start,
        model=vm.model_version,
    )
