"""Cases: a small guest, the operations of its vCPUs and of its host, and what KVM answered to each.

Addresses are bytes, numbers are not signed. The guest's code is always the same (harness/guest.S, guest32.S): it lies
at the guest physical pages 0x7000 and 0x8000, and every root of a case must map these two one to one, or the guest is
lost. Whether a vCPU runs the 64-bit or the 32-bit code (PAE, two-level paging, paging off) EFER.LMA says, at the start
and whenever the host sets the registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Final

from shadowkvm.errors import TraceError

__all__ = ["GUEST_OPS", "HOST_OPS", "Answer", "Case", "Op", "Slot"]

LOCKABLE: Final = ("or", "and", "xor", "add", "cmpxchg", "cmpxchg8b", "cmpxchg16b", "inc", "xadd", "bts")
"""Read-modify-writes that there are with and without LOCK."""
SIZES: Final[dict[str, dict[int, tuple[int, ...]]]] = {
    **{op: {64: (1, 2, 4, 8), 32: (1, 2, 4)} for op in ("read", "write")},
    **{op: {64: (4, 8), 32: (4,)} for op in (*LOCKABLE, "xchg", "stos", "movnti")},
    **{op: {64: (1, 4, 8), 32: (1, 4)} for op in ("rep", "movs")},
    **{op: {64: (16,), 32: (16,)} for op in ("movups", "movaps")},
    "push": {64: (8,), 32: (4,)},
    "cmpxchg8b": {64: (8,), 32: (8,)},
    "cmpxchg16b": {64: (16,), 32: ()},
}
"""Instructions that have an operand size, and by mode the sizes for which the guest has a stub."""

CONTROL: Final = frozenset({"invlpg", "cr0", "cr3", "cr4", "efer", "idt"})
"""Instructions of the supervisor."""
GUEST_OPS: Final = frozenset({*SIZES, *CONTROL, "fetch", "run", "int3"})
HOST_OPS: Final = frozenset(
    {
        *("hwrite", "hread", "unmap", "quota", "set_sregs", "stack"),
        *("slot_add", "slot_del", "slot_move", "dirty", "dirtylog", "cleardirty"),
    }
)
UNLOCKED, AC = 1, 2
"""Flags of a guest's operation: a read-modify-write without LOCK; EFLAGS.AC is set."""
STATUSES: Final = (*("done", "page_fault", "mmio", "general_protection", "stopped", "double_fault", "shutdown"),)
U64: Final = (1 << 64) - 1
PE, PG, PAE, LME, LMA = 1, 1 << 31, 1 << 5, 1 << 8, 1 << 10


def bits_of(efer: int) -> int:
    """Which code a vCPU with this EFER runs: 64 or 32."""
    return 64 if efer & LMA else 32


def registers_problem(cr0: int, cr3: int, cr4: int, efer: int) -> str | None:
    """Why KVM, or the guest's code, cannot live with these registers; None: they can."""
    paging, lme, lma = cr0 & PG, efer & LME, efer & LMA
    if not cr0 & PE:
        return f"cr0 {cr0:#x}: the guest runs in protected mode, bit 0 must be set"
    if bool(lma) != bool(paging and lme) or (lma and not cr4 & PAE):
        return (
            f"cr0 {cr0:#x}, cr4 {cr4:#x}, efer {efer:#x}: EFER.LMA stands if, and only if, paging is on with"
            " EFER.LME, and needs CR4.PAE"
        )
    if not lma and (lme or max(cr0, cr3, cr4) >> 32):
        values = f"cr0 {cr0:#x}, cr3 {cr3:#x}, cr4 {cr4:#x}, efer {efer:#x}"
        return f"{values}: a 32-bit guest has 32-bit registers, no EFER.LME"
    return None


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
    length: int = 0

    def __str__(self) -> str:
        words = [f"{f.name}={getattr(self, f.name):#x}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return " ".join([self.op, *words])

    def problem(self, bits: int = 64) -> str | None:
        """What is wrong with this operation on a vCPU that runs the code of this mode, or None."""
        return next(self._problems(bits), None)

    def _problems(self, bits: int) -> Iterator[str]:
        if self.op not in GUEST_OPS and self.op not in HOST_OPS:
            yield f"operation {self.op!r} is unknown"
        for f in fields(self)[1:]:
            number = getattr(self, f.name)
            if not 0 <= number <= U64:
                yield f"{f.name} {number} is no 64-bit number"
        if self.op == "set_sregs" and (problem := registers_problem(self.value, self.addr, self.expected, self.flags)):
            yield problem
        if self.op == "hwrite" and self.size not in (1, 2, 4, 8):
            yield f"a host's write of {self.size} bytes: there are 1, 2, 4, 8"
        if self.op in GUEST_OPS:
            yield from self._guest_problems(bits)

    def _guest_problems(self, bits: int) -> Iterator[str]:
        sizes = SIZES.get(self.op, {}).get(bits, (self.size,))
        if self.size not in sizes:
            there = f"there are {', '.join(map(str, sizes))}" if sizes else "there is none"
            yield f"{self.op} of {self.size} bytes in {bits}-bit code: {there}"
        if self.cpl not in (0, 3):
            yield f"cpl {self.cpl}: there are 0 and 3"
        if self.cpl and self.op in CONTROL:
            yield f"{self.op} at CPL {self.cpl} is no operation of the guest"
        if self.flags & ~AC and (self.op not in LOCKABLE or self.flags & ~(AC | UNLOCKED)):
            yield f"{self.op} with flags {self.flags}: 1 (no LOCK) is for read-modify-writes, 2 is EFLAGS.AC"
        if self.op == "run" and not 1 <= self.length <= 15:
            yield f"run: length {self.length} is none of an instruction, 1 to 15 bytes"
        if bits == 32 and (problem := self._narrow_problem()):
            yield problem

    def _narrow_problem(self) -> str | None:
        """What a 32-bit guest cannot do with these operands."""
        limit = 1 << 32
        if self.op == "efer" and self.value & LME:
            return f"efer {self.value:#x}: long mode (bit 8) is entered by the host only (set_sregs)"
        wide = self.op in ("movups", "movaps", "cmpxchg8b")
        for name, top in (
            ("addr", limit),
            ("value", limit**2 if wide else limit),
            ("expected", limit**2 if wide else limit),
        ):
            if getattr(self, name) >= top:
                return f"{name} {getattr(self, name):#x} is no 32-bit number: the vCPU runs 32-bit code"
        span = self.value * self.size if self.op in ("rep", "movs") else self.size if self.op in SIZES else 1
        if self.addr + span > limit:
            return f"{self.op} at {self.addr:#x} leaves the 4 GiB of a 32-bit guest"
        return None


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
    manual_dirty: int = 0
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0 off, 1 on, 3 on with INITIALLY_SET."""
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
        if problem := registers_problem(self.cr0, self.cr3, self.cr4, self.efer):
            raise TraceError(problem, place=place)
        if self.manual_dirty not in (0, 1, 3):
            raise TraceError(f"manual_dirty {self.manual_dirty}: there are 0, 1, 3", place=place)
        for i, (op, bits) in enumerate(zip(self.ops, self.modes(place), strict=True)):
            if problem := op.problem(bits):
                raise TraceError(problem, index=i, place=place)
        if self.answers is not None and len(self.answers) > len(self.ops):
            raise TraceError(f"{len(self.answers)} answers to {len(self.ops)} operations", place=place)

    def modes(self, place: str | None = None) -> Iterator[int]:
        """For each operation whether its vCPU then runs 64-bit or 32-bit code.

        Raises:
            TraceError: the case has no such vCPU.
        """
        modes = [bits_of(self.efer)] * self.vcpus
        for i, op in enumerate(self.ops):
            if op.vcpu >= self.vcpus:
                raise TraceError(f"vcpu {op.vcpu}: the case has {self.vcpus}", index=i, place=place)
            yield modes[op.vcpu]
            if op.op == "set_sregs":
                modes[op.vcpu] = bits_of(op.flags)
