# The compiled engine: what rust/python exports. `shadowkvm` is the public face; the order of tuples is told here only.

from collections.abc import Sequence
from typing import Final, Self, final

from typing_extensions import Buffer, disjoint_base

# Rows are name, scope, kind, meaning.
COUNTERS: Final[list[tuple[str, str, str, str]]]
# Rows are code, name, meaning.
EVENTS: Final[list[tuple[int, str, str]]]
OPS: Final[list[tuple[int, str, str]]]
# Rows are name, meaning.
# Name, what a number behind it means, what it does otherwise than KVM, source.
POLICIES: Final[list[tuple[str, str, str, str]]]
PROFILES: Final[list[str]]
STATUSES: Final[list[str]]
# Oldest first. MODEL_VERSION: the default.
MODEL_VERSIONS: Final[list[str]]
# Entries, ways, page-walk caches.
USUAL_TLB: Final[tuple[int, int, tuple[int, int, int]]]
USUAL_NESTED_TLB: Final[int]
MODEL_VERSION: Final[str]

__all__ = [
    "COUNTERS",
    "EVENTS",
    "MODEL_VERSION",
    "MODEL_VERSIONS",
    "OPS",
    "POLICIES",
    "PROFILES",
    "STATUSES",
    "USUAL_NESTED_TLB",
    "USUAL_TLB",
    "Outcome",
    "PageView",
    "Snapshot",
    "Vcpu",
    "Viewer",
    "Vm",
    "event_text",
]

def event_text(records: bytes) -> list[str]: ...

@final
class Viewer:
    def __new__(
        cls,
        mode: str,
        *,
        access: str = "read",
        user: bool = False,
        wp: bool = True,
        nx: bool = True,
        smep: bool = False,
        smap: bool = False,
        maxphyaddr: int = 52,
    ) -> Self: ...
    # Steps (level, table, index, entry, rights), then gpa, level, flags, fault.
    def walk(
        self, segments: Sequence[tuple[int, Buffer]], cr3: int, gva: int
    ) -> tuple[list[tuple[int, int, int, int | None, int]], int, int, int, int]: ...
    def translate(
        self,
        segments: Sequence[tuple[int, Buffer]],
        cr3: int,
        gvas: Buffer,
        gpa: Buffer,
        level: Buffer,
        flags: Buffer,
        fault: Buffer,
        threads: int,
    ) -> None: ...

@final
class PageView:
    @property
    def gfn(self) -> int: ...
    @property
    def level(self) -> int: ...
    @property
    def write(self) -> bool: ...
    @property
    def user(self) -> bool: ...
    @property
    def execute(self) -> bool: ...

@final
class Snapshot:
    # The bytes that `__reduce__` gives, the name of the built-in policy, and what decides beside it.
    def __new__(
        cls, state: bytes, policy: str, decider: tuple[object, Sequence[str], dict[str, object]] | None = None
    ) -> Self: ...
    def __reduce__(
        self,
    ) -> tuple[type[Snapshot], tuple[bytes, str, tuple[object, list[str], dict[str, object]] | None]]: ...
    def state_hash(self) -> int: ...

@final
class Outcome:
    @property
    def status(self) -> str: ...
    @property
    def value(self) -> int: ...
    @property
    def error_code(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Vcpu:
    @property
    def id(self) -> int: ...
    @property
    def cr2(self) -> int: ...
    @property
    def sregs(self) -> dict[str, int]: ...
    @property
    def counters(self) -> dict[str, int]: ...
    def counter_values(self) -> list[int]: ...
    def set_sregs(
        self,
        *,
        cr0: int | None = None,
        cr3: int | None = None,
        cr4: int | None = None,
        efer: int | None = None,
        cs_l: bool | None = None,
    ) -> None: ...
    def invpcid(self, kind: int, gva: int, *, rip: int | None = None) -> Outcome: ...
    def set_pkru(self, value: int) -> None: ...
    def read(
        self,
        gva: int,
        size: int = 8,
        user: bool = False,
        *,
        rip: int | None = None,
        length: int = 1,
        ac: bool = False,
        implicit: bool = False,
        delivery: bool = False,
    ) -> Outcome: ...
    def write(
        self,
        gva: int,
        value: int,
        size: int = 8,
        user: bool = False,
        *,
        kind: str = "mov",
        rip: int | None = None,
        length: int = 1,
        ac: bool = False,
        implicit: bool = False,
        delivery: bool = False,
    ) -> Outcome: ...
    def rmw(
        self,
        gva: int,
        operand: int,
        kind: str = "or",
        size: int = 8,
        user: bool = False,
        *,
        expected: int | None = None,
        locked: bool = True,
        rip: int | None = None,
        length: int = 1,
        ac: bool = False,
    ) -> Outcome: ...
    def rep_stos(
        self, gva: int, value: int, count: int, size: int = 8, user: bool = False, *, rip: int | None = None
    ) -> Outcome: ...
    def rep_movs(
        self, gva: int, source: int, count: int, size: int = 8, user: bool = False, *, rip: int | None = None
    ) -> Outcome: ...
    def fetch(self, gva: int, user: bool = False, *, rip: int | None = None, ac: bool = False) -> Outcome: ...
    def load_cr0(self, value: int, *, rip: int | None = None) -> Outcome: ...
    def load_cr3(self, value: int, *, rip: int | None = None) -> Outcome: ...
    def load_cr4(self, value: int, *, rip: int | None = None) -> Outcome: ...
    def wrmsr_efer(self, value: int, *, rip: int | None = None) -> Outcome: ...
    def invlpg(self, gva: int, *, rip: int | None = None) -> Outcome: ...
    def deliver(
        self,
        vector: int,
        *,
        idt: int,
        gdt: int,
        rsp: int,
        tss: int = 0,
        error_code: int | None = None,
        rip: int = 0,
        user: bool = False,
        soft: bool = False,
    ) -> Outcome: ...
    def hlt(self, rip: int | None = None) -> Outcome: ...
    def io(self, rip: int | None = None) -> Outcome: ...

@disjoint_base
class Vm:
    def __new__(
        cls,
        memory: int,
        vcpus: int = 1,
        policy: str = "kvm",
        profile: str = "zen",
        event_mask: int = 0,
        nx_huge_pages: bool = False,
        features: Sequence[tuple[str, str]] = ...,
        model_version: str = "linux-6.1",
        decider: tuple[object, Sequence[str], dict[str, object]] | None = None,
    ) -> Self: ...
    @property
    def model_version(self) -> str: ...
    @property
    def vcpus(self) -> tuple[Vcpu, ...]: ...
    def add_slot(self, slot: int, gpa: int, size: int, readonly: bool = False, dirty_log: bool = False) -> None: ...
    def delete_slot(self, slot: int) -> None: ...
    def move_slot(self, slot: int, gpa: int) -> None: ...
    def get_dirty_log(self, slot: int) -> list[int]: ...
    def set_dirty_log(self, slot: int, enabled: bool) -> None: ...
    def set_manual_dirty_log(self, enabled: bool, initially_set: bool) -> None: ...
    def clear_dirty_log(self, slot: int, frames: Sequence[int]) -> None: ...
    def notifier_change(self, gpa: int, size: int) -> None: ...
    def notifier_age(self, gpa: int, size: int, flush: bool) -> bool: ...
    def notifier_test_young(self, gpa: int, size: int) -> bool: ...
    def set_nx_huge_pages(self, enabled: bool) -> None: ...
    def recover_nx_huge_pages(self) -> int: ...
    def notifier_unmap(self, gpa: int, size: int) -> None: ...
    def set_host_pages(self, gpa: int, size: int, state: str) -> None: ...
    def set_page_quota(self, n: int) -> None: ...
    def set_sites(self, sites: Sequence[int]) -> None: ...
    def write_memory(self, gpa: int, data: Buffer) -> None: ...
    def read_memory(self, gpa: int, size: int, touch: bool = False) -> bytes: ...
    def audit(self) -> None: ...
    # `beside`: with the TLBs that are followed and nested paging, and over to another number of vCPUs.
    def take_snapshot(self, beside: bool = False) -> Snapshot: ...
    def go_back(self, snapshot: Snapshot, beside: bool = False) -> None: ...
    def state_hash(self) -> int: ...
    # Entries, ways, page-walk caches for tables of level 1, 2, 3.
    def set_tlb(self, sizes: tuple[int, int, tuple[int, int, int]] | None) -> None: ...
    # Entries, ways, page-walk caches; then the nested TLB, warm, level of the second stage's entries, and interval and
    # roots of agile paging.
    def set_nested(
        self, sizes: tuple[int, int, tuple[int, int, int]], stage: tuple[int, bool, int, tuple[int, int] | None]
    ) -> None: ...
    # The fields of NestedStatistics.
    def nested_counts(self) -> list[int] | None: ...
    # Accesses, hits, misses, references, flushes.
    def tlb_counts(self) -> tuple[int, int, int, int, int] | None: ...
    # The mask before.
    def set_event_mask(self, mask: int) -> int: ...
    # Bytes, by what for.
    def memory_use(self) -> dict[str, int]: ...
    # In the order of COUNTERS: the VM's, then the sums over the vCPUs.
    def counter_values(self) -> list[int]: ...
    # (rows of each of STATUSES, faults matched, missed, unexpected, first mismatch, outcomes of 24 bytes each)
    def run_rows(
        self, rows: Buffer, first_row: int = 0, pages: Buffer | None = None, outcomes: bool = False
    ) -> tuple[list[int], int, int, int, int | None, bytes | None]: ...
    # 40 bytes an event, shadowkvm.EVENT_DTYPE
    def event_records(self) -> bytes: ...
    def event_lines(self, first: int = 0) -> list[str]: ...
    def clear_events(self) -> None: ...
    # (id, gfn, level, access, direct, invalid, unsync, root count, unsync children, flood, generation, role's word,
    #  [(index, spte)], [id of the page below or -1 for each of those])
    def shadow_pages(
        self,
    ) -> list[
        tuple[int, int, int, str, bool, bool, bool, int, int, int, int, int, list[tuple[int, int]], list[int]]
    ]: ...
    # (ids of the current root's pages: none, one, or the four of a PAE root; those of the cached roots; -1: none)
    # for each vCPU
    def roots(self) -> list[tuple[list[int], list[int]]]: ...
