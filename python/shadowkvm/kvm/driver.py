"""Replays a case in the engine, instruction by instruction as the guest of harness/guest.S executes them."""

from __future__ import annotations

import struct
from typing import Any, Final

from shadowkvm._core import COUNTERS, EVENTS, Vm
from shadowkvm.kvm.case import Answer, Case, Op
from shadowkvm.kvm.layout import IMAGE, LABELS, RT, stub_of
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

RMW: Final = frozenset({"or", "and", "xor", "add", "xchg", "cmpxchg"})
STORES: Final = {"write": "mov", "movnti": "sse", "stos": "stos", "push": "push"}
CS, SS, USER_CS, USER_SS, FRAME_FLAGS = 0x08, 0x10, 0x23, 0x1B, 0x10002


class Driver:
    """A VM of the engine that runs the guest of guest.S.

    Args:
        case: its start state is set up; its operations are given to `step` one by one.
        events: record events, for `events_of_step`.
        model: the kernel whose rules hold; default: that of the kernel which answered.
    """

    def __init__(self, case: Case, *, events: bool = False, model: str | None = None) -> None:
        mask, model = ALL_EVENTS if events else 0, model or model_of(case.kernel)
        self.vm: Any = Vm(case.memory, case.vcpus, "kvm", case.profile, mask, case.nx_huge_pages, model)
        self.events: list[str] = []
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
        cpu = self.vm.vcpus[op.vcpu]
        before = self._counters(cpu)
        host = getattr(self, f"_host_{op.op}", None)
        answer = Answer(value=host(op) or 0) if host else self._guest(cpu, op)
        after = self._counters(cpu)
        answer.counters = {name: after[i] - before[i] for i, name in WATCHED if after[i] != before[i]}
        if self._tracing:
            self.events = self.vm.event_lines()
            self.vm.clear_events()
        return answer

    def _counters(self, cpu: Any) -> list[int]:
        values: list[int] = self.vm.counter_values()
        if len(self.vm.vcpus) > 1:
            own = cpu.counter_values()
            for i, value in zip(VCPU_SCOPE, own, strict=True):
                values[i] = value
        return values

    # ---- what the host does between two runs of the guest

    def _host_hwrite(self, op: Op) -> None:
        self.vm.write_memory(op.addr, op.value.to_bytes(8, "little")[: op.size])

    def _host_dirty(self, op: Op) -> None:
        self.vm.set_dirty_log(op.slot, bool(op.flags & 1))

    def _host_dirtylog(self, op: Op) -> int:
        return len(self.vm.get_dirty_log(op.slot))

    def _host_unmap(self, op: Op) -> None:
        self.vm.notifier_unmap(op.addr, op.value)

    def _host_quota(self, op: Op) -> None:
        self.vm.set_page_quota(op.value)

    def _host_slot_add(self, op: Op) -> None:
        self.vm.add_slot(op.slot, op.addr, op.value, readonly=bool(op.flags & 2), dirty_log=bool(op.flags & 1))

    def _host_slot_del(self, op: Op) -> None:
        self.vm.delete_slot(op.slot)

    # ---- one run of the guest: a stub of guest.S from its start to HLT

    def _guest(self, cpu: Any, op: Op) -> Answer:
        user = op.cpl == 3
        rip, end, setup = stub_of(op)
        if user:
            cpu.fetch(LABELS["k_user"])
        if setup:
            cpu.fetch(rip - setup, user)
        out = self._execute(cpu, op, rip, user)
        if out.status in ("page_fault", "general_protection"):
            vector, label = (14, "pf_entry") if out.status == "page_fault" else (13, "gp_entry")
            self._deliver(cpu, vector, user, rip, out.error_code)
            cpu.hlt(rip=LABELS[label])
            return Answer(out.status, out.error_code, 0, out.address if vector == 14 else 0)
        if user or op.op == "fetch":
            if op.op != "fetch":
                cpu.fetch(end, True)  # noqa: FBT003 - CPL 3
            cpu.hlt(rip=RT)
        else:
            cpu.hlt(rip=end)
        return Answer(out.status, 0, out.value if op.op == "read" else 0, out.address if out.status == "mmio" else 0)

    def _execute(self, cpu: Any, op: Op, rip: int, user: bool) -> Any:
        """The instruction under test."""
        if op.op == "read":
            return cpu.read(op.addr, op.size, user, rip=rip)
        if op.op in STORES:
            value = op.expected if op.op == "stos" else op.value
            return cpu.write(op.addr, value, op.size, user, kind=STORES[op.op], rip=rip)
        if op.op in RMW:
            expected = {"expected": op.expected} if op.op == "cmpxchg" else {}
            return cpu.rmw(op.addr, op.value, op.op, op.size, user, rip=rip, **expected)
        if op.op == "rep":
            return cpu.rep_stos(op.addr, op.expected, op.value, 8, user, rip=rip)
        if op.op == "fetch":
            out = cpu.fetch(rip, user)
            return cpu.fetch(op.addr, user) if out.status == "done" else out
        if op.op == "invlpg":
            return cpu.invlpg(op.addr, rip=rip)
        if op.op == "efer":
            return cpu.wrmsr_efer(op.value, rip=rip)
        return getattr(cpu, f"load_{op.op}")(op.addr, rip=rip)

    def _deliver(self, cpu: Any, vector: int, user: bool, rip: int, code: int) -> None:
        """The accesses of the CPU while it delivers an exception: IDT, GDT, from CPL 3 the TSS, six pushes."""
        for at in (RT + 0x900 + vector * 16, RT + 0x808, *([RT + 0xA04] if user else [])):
            cpu.read(at, 8, user, delivery=True)
        top = RT + (0xFF0 if user else 0xFE0)
        frame = (USER_SS if user else SS, top, FRAME_FLAGS, USER_CS if user else CS, rip, code)
        for i, v in enumerate(frame, 1):
            cpu.write(top - 8 * i, v, 8, user, delivery=True)
