"""shadowkvm: Linux KVM's x86 shadow MMU as a library.

Give it a guest's memory accesses, and it answers with what KVM would have done, in KVM's own counters and tracepoints.

>>> import shadowkvm as sk
>>> vm = sk.Vm(memory=32 << 20, events=True)
>>> vm.vcpus[0].read(0x1000)
Outcome(status='page_fault', value=0x0, error_code=0x0, address=0x1000)
>>> vm.counters["pf_guest"], vm.event_text()[-1]
(1, 'kvm_inj_exception: #PF (0x0)')

`Vm` is the machine, ``vm.vcpus`` its CPUs; `Vm.run` replays a trace (an array of `TRACE_DTYPE`) or a `Recording`.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import Final

from shadowkvm._core import MODEL_VERSION, MODEL_VERSIONS, Outcome, Snapshot, Vcpu
from shadowkvm.counters import COUNTER_INFO, CounterInfo, Counters
from shadowkvm.errors import (
    ConfigError,
    CostError,
    GuestMemoryError,
    InvariantError,
    PolicyError,
    SavedStateError,
    ShadowKvmError,
    TraceError,
)
from shadowkvm.eventlog import Events
from shadowkvm.events import EVENT_DTYPE, EVENT_INFO, EventInfo
from shadowkvm.image import (
    AddressWalk,
    PageFlag,
    PhysicalMemory,
    Translations,
    WalkFault,
    WalkStep,
    open_image,
    translate,
    walk,
)
from shadowkvm.nested import NestedStatistics
from shadowkvm.ops import NO_PAGE, PAGE_SIZE, TRACE_DTYPE, Flag, Op
from shadowkvm.policy import POLICIES, PageView, Policy
from shadowkvm.result import OUTCOME_DTYPE, STATUS_NAMES, RunResult
from shadowkvm.shadow import Page, Role, Root, ShadowTree
from shadowkvm.tlb import TlbStatistics
from shadowkvm.trace import Chunk, Recording, RecordingWriter, import_raw
from shadowkvm.vm import HOST_STATES, Vm

__all__ = [
    "COUNTER_INFO",
    "EVENT_DTYPE",
    "EVENT_INFO",
    "HOST_STATES",
    "MODELS",
    "NO_PAGE",
    "OUTCOME_DTYPE",
    "PAGE_SIZE",
    "POLICIES",
    "STATUS_NAMES",
    "TRACE_DTYPE",
    "AddressWalk",
    "Chunk",
    "ConfigError",
    "CostError",
    "CounterInfo",
    "Counters",
    "EventInfo",
    "Events",
    "Flag",
    "GuestMemoryError",
    "InvariantError",
    "NestedStatistics",
    "Op",
    "Outcome",
    "Page",
    "PageFlag",
    "PageView",
    "PhysicalMemory",
    "Policy",
    "PolicyError",
    "Recording",
    "RecordingWriter",
    "Role",
    "Root",
    "RunResult",
    "SavedStateError",
    "ShadowKvmError",
    "ShadowTree",
    "Snapshot",
    "TlbStatistics",
    "TraceError",
    "Translations",
    "Vcpu",
    "Vm",
    "WalkFault",
    "WalkStep",
    "__version__",
    "import_raw",
    "model_version",
    "open_image",
    "translate",
    "walk",
]

__version__: Final = _version("shadowkvm")
"""Version of the package."""

model_version: Final = MODEL_VERSION
"""The kernel whose rules a VM follows unless it is told another of `MODELS`; every result names it."""

MODELS: Final = tuple(MODEL_VERSIONS)
"""The kernels whose rules the engine has, oldest first; for ``Vm(..., model_version=...)``."""
