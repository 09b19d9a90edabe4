"""Cases: a small guest, the operations of its vCPUs and of its host, and what KVM answered to each.

Addresses are bytes, numbers are not signed. The guest's code is always the same (harness/guest.S): it lies at the
guest physical pages 0x7000 and 0x8000, and every root of a case must map these two one to one, or the guest is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

from shadowkvm.errors import TraceError

__all__ = ["GUEST_OPS", "HOST_OPS", "Answer", "Case", "Op", "Slot"]

SIZES: Final[dict[str, tuple[int, ...]]] = {
    "read": (1, 2, 4, 8),
    "write": (1, 2, 4, 8),
    "or": (4, 8),
    "and": (4, 8),
    "xor": (4, 8),
    "add": (4, 8),
    "xchg": (4, 8),
    "cmpxchg": (4, 8),
    "stos": (4, 8),
    "movnti": (4, 8),
    "push": (8,),
    "rep": (8,),
}
"""Instructions that have an operand size, and the sizes for which the guest has a stub."""

GUEST_OPS: Final = frozenset({*SIZES, "fetch", "invlpg", "cr0", "cr3", "cr4", "efer"})
HOST_OPS: Final = frozenset({"hwrite", "slot_add", "slot_del", "dirty", "dirtylog", "unmap", "quota"})
SUPERVISOR_ONLY: Final = frozenset({"invlpg", "cr0", "cr3", "cr4", "efer"})
STATUSES: Final = ("done", "page_fault", "mmio", "general_protection", "stopped")
U64: Final = (1 << 64) - 1


@dataclass(slots=True)
class Op:
    """One operation: an instruction of the guest, or an action of the host between two runs of it.

    What the fields mean for which `op` stands in docs/verify.md.
    """

    op: str
    addr: int = 0
    value: int = 0
    size: int = 8
    cpl: int = 0
    vcpu: int = 0
    expected: int = 0
    flags: int = 0
    slot: int = 0

    def __str__(self) -> str:
        words = [f"{f.name}={getattr(self, f.name):#x}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return " ".join([self.op, *words])

    def problem(self, vcpus: int) -> str | None:
        """What is wrong with this operation, or None."""
        if self.op not in GUEST_OPS and self.op not in HOST_OPS:
            return f"operation {self.op!r} is unknown"
        for f in fields(self)[1:]:
            number = getattr(self, f.name)
            if not 0 <= number <= U64:
                return f"{f.name} {number} is no 64-bit number"
        if self.op in SIZES and self.size not in SIZES[self.op]:
            return f"{self.op} of {self.size} bytes: there are {', '.join(map(str, SIZES[self.op]))}"
        if self.op == "hwrite" and self.size not in (1, 2, 4, 8):
            return f"a host's write of {self.size} bytes: there are 1, 2, 4, 8"
        if self.cpl not in (0, 3):
            return f"cpl {self.cpl}: there are 0 and 3"
        if (self.cpl and self.op in SUPERVISOR_ONLY) or (not self.cpl and self.op == "push"):
            return f"{self.op} at CPL {self.cpl} is no operation of the guest"
        return None if self.vcpu < vcpus else f"vcpu {self.vcpu}: the case has {vcpus}"


@dataclass(slots=True)
class Answer:
    """What happened in one operation: the outcome, and which statistics of KVM it moved by how much."""

    status: str = "done"
    error_code: int = 0
    value: int = 0
    """What a read gave; for "dirtylog" the number of dirty pages."""
    address: int = 0
    """CR2 of a page fault; the guest physical address of the first MMIO exit."""
    mmio: list[tuple[int, int, int]] = field(default_factory=list)
    """MMIO exits: guest physical address, bytes, 1 for a write."""
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Slot:
    """A memslot at the start of a case. `flags`: 1 dirty log, 2 read-only (KVM's own numbers)."""

    slot: int
    gpa: int
    size: int
    flags: int = 0


@dataclass(slots=True)
class Case:
    """One guest and what is done with it."""

    memory: int
    """Bytes from guest physical 0 whose host pages are there from the start."""
    slots: list[Slot]
    cr3: int
    ops: list[Op]
    pages: dict[int, dict[int, int]] = field(default_factory=dict)
    """Memory image: guest physical address of a page -> index of a qword -> its value. The rest is zero."""
    cr0: int = 0x80010033
    cr4: int = 0x20
    efer: int = 0xD01
    vcpus: int = 1
    huge: tuple[int, int] | None = None
    """Guest memory from, to which the host backs by pages of 2 MiB."""
    nx_huge_pages: bool = False
    """KVM splits huge pages from which the guest executes (module parameter nx_huge_pages=force)."""
    name: str = ""
    shows: str = ""
    """One line: what there is to see."""
    seed: int | None = None
    theme: str = ""
    answers: list[Answer] | None = None
    """What KVM said to each operation; None: nobody has asked yet."""
    kernel: str = ""
    """Version of the kernel that answered."""
    profile: str = "qemu-tcg"
    """Profile of the CPU on which it answered."""

    @property
    def title(self) -> str:
        """How a report calls this case."""
        if self.name:
            return self.name
        return f"seed {self.seed} {self.theme}".strip() if self.seed is not None else "case"

    def check(self, place: str | None = None) -> None:
        """Refuse a case that cannot be run.

        Raises:
            TraceError: with the number of the operation if one is at fault.
        """
        if not 1 <= self.vcpus <= 8:
            raise TraceError(f"vcpus {self.vcpus}: 1 to 8 are possible", place=place)
        if self.memory < 0x9000 or self.memory % 4096:
            raise TraceError(f"memory {self.memory}: whole pages, at least 0x9000 bytes, are needed", place=place)
        for gpa, entries in self.pages.items():
            if gpa % 4096 or any(not 0 <= i < 512 or not 0 <= v <= U64 for i, v in entries.items()):
                raise TraceError(
                    f"page {gpa:#x}: not at a page's start, or an index or value is out of range", place=place
                )
            if not any(s.gpa <= gpa < s.gpa + s.size for s in self.slots) and gpa >= self.memory:
                raise TraceError(f"page {gpa:#x} lies in no memslot", place=place)
        for i, op in enumerate(self.ops):
            if problem := op.problem(self.vcpus):
                raise TraceError(problem, index=i, place=place)
        if self.answers is not None and len(self.answers) > len(self.ops):
            raise TraceError(f"{len(self.answers)} answers to {len(self.ops)} operations", place=place)
