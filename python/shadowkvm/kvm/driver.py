"""Replays a case in the engine, instruction by instruction as the guest of harness/guest*.S executes them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from shadowkvm._core import COUNTERS, EVENTS, Vm
from shadowkvm.kvm.case import AC, HOST_OPS, UNLOCKED, Answer, Case, Op, bits_of
from shadowkvm.kvm.hostops import HostOps
from shadowkvm.kvm.layout import IMAGE, LABELS, RT, STACK, stub_of
from shadowkvm.kvm.model import model_of

__all__ = ["COMPARED", "Driver"]

NAMES: Final = [row[0] for row in COUNTERS]
COMPARED: Final = frozenset(
    name
    for name in NAMES
    if name.startswith(("pf_", "mmu_", "pages_"))
    or name in ("insn_emulation", "invlpg", "nx_lpage_splits", "remote_tlb_flush_requests", "tlb_flush")
)
"""The counters that every operation is compared by."""
WATCHED: Final = [(i, name) for i, name in enumerate(NAMES) if name in COMPARED]
VCPU_SCOPE: Final = [i for i, row in enumerate(COUNTERS) if row[1] == "vcpu"]
ALL_EVENTS: Final = (1 << len(EVENTS)) - 1

STORES: Final = {"write": "mov", "movnti": "sse", "movups": "sse", "movaps": "sse", "stos": "stos", "push": "push"}
RMW: Final = {
    **{kind: kind for kind in ("or", "and", "xor", "add", "xchg", "cmpxchg")},
    "cmpxchg8b": "cmpxchg",
    "cmpxchg16b": "cmpxchg",
    "inc": "add",
    "xadd": "add",
    "bts": "or",
}
"""What a read-modify-write is to the engine: INC and XADD are ADD to KVM's MMU, BTS is OR."""
ALIGNED: Final = frozenset({"movaps", "cmpxchg16b"})
JUMPS: Final = frozenset({"fetch", "run", "int3"})
BP, DF, GP, PF, SYS = 3, 8, 13, 14, 0x80
FAULTS: Final = {"page_fault": PF, "general_protection": GP}
HANDLERS: Final = {PF: "pf", GP: "gp", DF: "df", BP: "bp", SYS: "back"}


@dataclass(slots=True)
class Guest:
    """What the driver knows of a vCPU."""

    cpu: Any
    bits: int
    """The code that it runs: 64 or 32."""
    idt: int
    stack: int = STACK

    @property
    def labels(self) -> dict[str, int]:
        """The addresses in that code."""
        return LABELS[self.bits]

    def mode(self, efer: int) -> None:
        """The host has set its registers: code and IDT are those of the mode."""
        self.bits = bits_of(efer)
        self.idt = self.labels["idt"]


class Driver:
    """A VM of the engine that runs the guest of the harness.

    Args:
        case: its start state is set up; its operations are given to `step` one by one.
        events: record events, for `events_of_step`.
        model: the kernel whose rules hold; default: that of the kernel which answered.
    """

    def __init__(self, case: Case, *, events: bool = False, model: str | None = None) -> None:
        mask, model = ALL_EVENTS if events else 0, model or model_of(case.kernel)
        settings = (case.memory, case.vcpus, "kvm", case.profile, mask, case.nx_huge_pages)
        self.vm: Any = Vm(*settings, model_version=model)
        if case.manual_dirty:
            self.vm.set_manual_dirty_log(enabled=True, initially_set=bool(case.manual_dirty & 2))
        self.guests = [Guest(cpu, bits_of(case.efer), LABELS[bits_of(case.efer)]["idt"]) for cpu in self.vm.vcpus]
        self.host = HostOps(self.vm, case.slots)
        self.events: list[str] = []
        self._rsp0 = dict.fromkeys(LABELS, STACK)
        self._tracing = events
        self._set_up(case)
        self.vm.clear_events()

    def _set_up(self, case: Case) -> None:
        for s in case.slots:
            if (s.slot, s.gpa, s.size, s.flags) != (0, 0, case.memory, 0):  # a Vm comes with that one
                if s.slot == 0:
                    self.vm.delete_slot(0)
                self.vm.add_slot(s.slot, s.gpa, s.size, readonly=bool(s.flags & 2), dirty_log=bool(s.flags & 1))
        for gpa, entries in case.pages.items():
            page = bytearray(4096)
            for i, v in entries.items():
                struct.pack_into("<Q", page, i * 8, v)
            self.vm.write_memory(gpa, bytes(page))
        self.vm.write_memory(RT, IMAGE)
        if case.huge:
            self.vm.set_host_pages(case.huge[0], case.huge[1] - case.huge[0], "huge-2m")
        for cpu in self.vm.vcpus:
            cpu.set_sregs(cr0=case.cr0, cr3=case.cr3, cr4=case.cr4, efer=case.efer)

    def step(self, op: Op) -> Answer:
        """One operation, as replay.c does it, with the counters that it moved (of the VM and of its vCPU)."""
        guest = self.guests[op.vcpu]
        before = self._counters(guest.cpu)
        answer = Answer(value=self.host.do(op, guest)) if op.op in HOST_OPS else self._guest(guest, op)
        after = self._counters(guest.cpu)
        answer.counters = {name: after[i] - before[i] for i, name in WATCHED if after[i] != before[i]}
        if self._tracing:
            self.events = self.vm.event_lines()
            self.vm.clear_events()
        return answer

    def _counters(self, cpu: Any) -> list[int]:
        values: list[int] = self.vm.counter_values()
        if len(self.guests) > 1:
            own = cpu.counter_values()
            for i, value in zip(VCPU_SCOPE, own, strict=True):
                values[i] = value
        return values

    # ---- one run of the guest: a stub from its start to HLT

    def _guest(self, guest: Guest, op: Op) -> Answer:
        cpu, user = guest.cpu, op.cpl == 3
        rip, end, setup = stub_of(op, guest.bits)
        if user:
            cpu.fetch(guest.labels["k_user"])
        if setup:
            cpu.fetch(rip - setup, user)
        out = self._execute(guest, op, rip, user)
        if out.status == "shutdown":
            return Answer("shutdown")
        jump = op.op in ("fetch", "run")
        if out.status in FAULTS:
            return self._fault(guest, op, op.addr if jump else rip, out)
        if op.op == "int3":
            return self._event(guest, op, BP, rip, soft=True) or Answer()
        if op.op == "idt":
            guest.idt = op.addr
        if user or jump:
            if (lost := self._way_back(guest, op, op.addr + op.length if jump else end)) is not None:
                return lost
        elif (lost := cpu.hlt(rip=end)).status == "page_fault":  # no stubs in the new address space
            return self._fault(guest, op, end, lost)
        value = out.value if op.op == "read" else 0
        return Answer(out.status, 0, value, out.address if out.status == "mmio" else 0)

    def _way_back(self, guest: Guest, op: Op, end: int) -> Answer | None:
        """From a stub of CPL 3, or from where a jump led: SYSCALL, in 32-bit code INT 0x80. An answer: it was lost."""
        cpu = guest.cpu
        if op.op != "fetch":
            for at in (end, end + 1) if end & 0xFFF == 0xFFF else (end,):  # both bytes of it
                out = cpu.fetch(at, op.cpl == 3)
                if out.status == "page_fault":
                    return self._fault(guest, op, end, out)
        if guest.bits == 64:
            cpu.hlt(rip=guest.labels["k_back"])
            return None
        return self._event(guest, op, SYS, end, soft=True)

    def _fault(self, guest: Guest, op: Op, rip: int, out: Any) -> Answer:
        """A fault of the instruction is delivered."""
        vector, code = FAULTS[out.status], out.error_code
        address = out.address if vector == PF else 0
        return self._event(guest, op, vector, rip, code) or Answer(out.status, code, 0, address)

    def _event(
        self, guest: Guest, op: Op, vector: int, rip: int, code: int | None = None, *, soft: bool = False
    ) -> Answer | None:
        """Delivers an event, and runs its handler; an answer if it has become another one."""
        cpu, labels, user = guest.cpu, guest.labels, op.cpl == 3
        if self._rsp0.get(guest.bits) != guest.stack:  # the harness sets it before each run
            self.vm.write_memory(labels["tss"] + 4, (guest.stack + 0x10).to_bytes(8, "little")[: guest.bits // 8])
            self._rsp0[guest.bits] = guest.stack
        stack = op.addr + op.size if op.op == "push" and not user else guest.stack
        tables = {"idt": guest.idt, "gdt": LABELS[64]["gdt"], "tss": labels["tss"]}
        out = cpu.deliver(vector, rsp=stack, error_code=code, rip=rip, user=user, soft=soft, **tables)
        if out.status == "shutdown":
            return Answer("shutdown")
        came, address = out.error_code, cpu.cr2
        handler = HANDLERS[came]
        cpu.fetch(labels[f"{handler}_entry"])
        # The handler takes error code and RIP off the stack; on the guest's own page that cannot exit.
        popped = code
        if out.value >> 12 != RT >> 12 or came != vector:
            popped = cpu.read(out.value, guest.bits // 8, rip=labels[f"{handler}_entry"]).value
        cpu.hlt(rip=labels[f"{handler}_hlt"])
        if came == vector:
            return None
        return Answer("double_fault") if came == DF else Answer("page_fault", popped or 0, 0, address)

    # ---- the instruction under test

    def _execute(self, guest: Guest, op: Op, rip: int, user: bool) -> Any:
        cpu, ac = guest.cpu, bool(op.flags & AC)
        if op.op in ALIGNED and op.addr % 16:
            out = cpu.fetch(rip, user)
            return Answer("general_protection") if out.status == "done" else out
        if op.op == "read":
            return cpu.read(op.addr, op.size, user, rip=rip, ac=ac)
        if op.op in STORES:
            value = op.expected if op.op == "stos" else op.value
            if op.size == 16:
                value |= op.expected << 64
            return cpu.write(op.addr, value, op.size, user, kind=STORES[op.op], rip=rip, ac=ac)
        if op.op in RMW:
            operand = {"inc": 1, "bts": 1 << op.value % (8 * op.size)}.get(op.op, op.value)
            expected = {"expected": op.expected} if RMW[op.op] == "cmpxchg" else {}
            locked = not op.flags & UNLOCKED
            return cpu.rmw(op.addr, operand, RMW[op.op], op.size, user, locked=locked, rip=rip, ac=ac, **expected)
        if op.op in ("rep", "movs"):
            repeat = cpu.rep_stos if op.op == "rep" else cpu.rep_movs
            return repeat(op.addr, op.expected, op.value, op.size, user, rip=rip)
        return self._jump(cpu, op, rip, user) if op.op in JUMPS else self._control(cpu, op, rip)

    def _jump(self, cpu: Any, op: Op, rip: int, user: bool) -> Any:
        out = cpu.fetch(rip, user)
        if out.status != "done" or op.op == "int3":
            return out
        ac = bool(op.flags & AC)
        if op.op == "fetch":
            return cpu.fetch(op.addr, user, ac=ac)
        return cpu.write(op.expected, op.value, op.size, user, rip=op.addr, length=op.length, ac=ac)

    def _control(self, cpu: Any, op: Op, rip: int) -> Any:
        if op.op == "idt":
            return cpu.fetch(rip)
        if op.op == "invlpg":
            return cpu.invlpg(op.addr, rip=rip)
        if op.op == "efer":
            return cpu.wrmsr_efer(op.value, rip=rip)
        return getattr(cpu, f"load_{op.op}")(op.addr, rip=rip)
