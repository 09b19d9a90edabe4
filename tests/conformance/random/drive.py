"""Replays recorded random cases in the engine and compares every op with what KVM did.

    python -m tests.conformance.random.drive FILE... [--case I] [--events] [-v]

Prints a table of agreement and, for each case, the first op that differs; exits 1 if any does.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
import traceback
from collections import Counter

import shadowkvm as sk

from ..kvm.layout import IMAGE, LABELS, RT, stub_of
from ..kvm.result import DONE, GENERAL_PROTECTION, MMIO, PAGE_FAULT, Result
from . import casefile

STATUS = {DONE: "done", PAGE_FAULT: "page_fault", MMIO: "mmio", GENERAL_PROTECTION: "general_protection"}
COUNTERS = ("insn_emulation", "invlpg", "nx_lpage_splits", "remote_tlb_flush_requests", "tlb_flush")
PREFIXES = ("pf_", "mmu_", "pages_")
RMW = {"or", "and", "xor", "add", "xchg", "cmpxchg"}
STORES = {"write": "mov", "movnti": "sse", "stos": "stos", "push": "push"}
CS, SS, USER_CS, USER_SS, FRAME_FLAGS = 0x08, 0x10, 0x23, 0x1B, 0x10002


def compared(name: str) -> bool:
    return name in COUNTERS or name.startswith(PREFIXES)


class Driver:
    """A VM of the engine that runs the guest of guest.S."""

    def __init__(self, case: dict, events: bool = False) -> None:
        self.vm = vm = sk.Vm(memory=case["memory"], vcpus=case["vcpus"], profile="qemu-tcg", events=events)
        for slot, gpa, size, flags in case["slots"]:
            if (slot, gpa, size, flags) == (0, 0, case["memory"], 0):
                continue  # the one that a Vm comes with
            vm.add_slot(slot, gpa, size, readonly=bool(flags & 2), dirty_log=bool(flags & 1))
        for gpa, entries in case["pages"].items():
            page = bytearray(4096)
            for i, v in entries.items():
                struct.pack_into("<Q", page, i * 8, v)
            vm.write_memory(gpa, bytes(page))
        vm.write_memory(RT, IMAGE)
        if case.get("huge"):
            vm.set_host_pages(case["huge"][0], case["huge"][1] - case["huge"][0], "huge-2m")
        for cpu in vm.vcpus:
            cpu.set_sregs(cr0=case["cr0"], cr3=case["cr3"], cr4=case["cr4"], efer=case["efer"])

    def step(self, op: dict) -> Result:
        """One op, as kvm/replay.c does it, with the counters that it moved."""
        cpu = self.vm.vcpus[op.get("vcpu", 0)]
        before = {**self.vm.counters, **cpu.counters}
        host = getattr(self, f"host_{op['op']}", None)
        result = Result(DONE, 0, host(op) or 0, 0) if host else self.guest(cpu, op)
        after = {**self.vm.counters, **cpu.counters}
        result.stats = {k: v - before[k] for k, v in after.items() if v != before[k] and compared(k)}
        return result

    # ---- what the host does between two runs of the guest

    def host_hwrite(self, op: dict) -> None:
        self.vm.write_memory(op["addr"], op["value"].to_bytes(op["size"], "little"))

    def host_dirty(self, op: dict) -> None:
        self.vm.set_dirty_log(op.get("slot", 0), bool(op.get("flags", 0) & 1))

    def host_dirtylog(self, op: dict) -> int:
        return len(self.vm.get_dirty_log(op.get("slot", 0)))

    def host_unmap(self, op: dict) -> None:
        self.vm.notifier_unmap(op["addr"], op["value"])

    def host_quota(self, op: dict) -> None:
        self.vm.set_page_quota(op["value"])

    def host_slot_add(self, op: dict) -> None:
        flags = op.get("flags", 0)
        self.vm.add_slot(
            op.get("slot", 0), op["addr"], op["value"], readonly=bool(flags & 2), dirty_log=bool(flags & 1)
        )

    def host_slot_del(self, op: dict) -> None:
        self.vm.delete_slot(op.get("slot", 0))

    # ---- one run of the guest: a stub of guest.S from its start to HLT

    def guest(self, cpu, op: dict) -> Result:
        user = op.get("cpl") == 3
        rip, end, setup = stub_of(op)
        if user:
            cpu.fetch(LABELS["k_user"])
        if setup:
            cpu.fetch(rip - setup, user)
        out = self.execute(cpu, op, rip, user)
        status = next(k for k, v in STATUS.items() if v == out.status) if out.status in STATUS.values() else out.status
        if status == PAGE_FAULT:
            self.deliver(cpu, 14, user, rip, out.error_code)
            cpu.hlt(rip=LABELS["pf_entry"])
        elif status == GENERAL_PROTECTION:
            self.deliver(cpu, 13, user, rip, out.error_code)
            cpu.hlt(rip=LABELS["gp_entry"])
        elif user or op["op"] == "fetch":
            if op["op"] != "fetch":
                cpu.fetch(end, True)
            cpu.hlt(rip=RT)
        else:
            cpu.hlt(rip=end)
        fault = status in (PAGE_FAULT, GENERAL_PROTECTION)
        value = out.value if op["op"] == "read" and not fault else 0
        return Result(status, out.error_code if fault else 0, value, out.address if status in (PAGE_FAULT, MMIO) else 0)

    def execute(self, cpu, op: dict, rip: int, user: bool):
        """The instruction under test."""
        kind, addr, value, size = op["op"], op["addr"], op.get("value", 0), op.get("size", 8)
        if kind == "read":
            return cpu.read(addr, size, user, rip=rip)
        if kind in STORES:
            return cpu.write(
                addr, op.get("expected", 0) if kind == "stos" else value, size, user, kind=STORES[kind], rip=rip
            )
        if kind in RMW:
            expected = {"expected": op.get("expected", 0)} if kind == "cmpxchg" else {}
            return cpu.rmw(addr, value, kind, size, user, rip=rip, **expected)
        if kind == "rep":
            return cpu.rep_stos(addr, op.get("expected", 0), value, 8, user, rip=rip)
        if kind == "fetch":
            out = cpu.fetch(rip, user)
            return cpu.fetch(addr, user) if out.status == "done" else out
        if kind == "invlpg":
            return cpu.invlpg(addr, rip=rip)
        if kind == "efer":
            return cpu.wrmsr_efer(value, rip=rip)
        return getattr(cpu, f"load_{kind}")(addr, rip=rip)

    def deliver(self, cpu, vector: int, user: bool, rip: int, code: int) -> None:
        """The accesses of the CPU while it delivers an exception: IDT, GDT, from CPL 3 the TSS, six pushes."""
        for at in (RT + 0x900 + vector * 16, RT + 0x808, *([RT + 0xA04] if user else [])):
            cpu.read(at, 8, user, delivery=True)
        top = RT + (0xFF0 if user else 0xFE0)
        frame = (USER_SS if user else SS, top, FRAME_FLAGS, USER_CS if user else CS, rip, code)
        for i, v in enumerate(frame, 1):
            cpu.write(top - 8 * i, v, 8, user, delivery=True)


def same(want: Result, got: Result) -> bool:
    stats = {k: v for k, v in want.stats.items() if compared(k)}
    if got.stats != stats or (got.status, got.value) != (want.status, want.value):
        return False
    if want.status == MMIO:
        return got.addr in {m[0] for m in want.mmio}
    return want.status not in (PAGE_FAULT, GENERAL_PROTECTION) or (got.err, got.addr) == (want.err, want.addr)


def text(op: dict) -> str:
    return " ".join([op["op"], *(f"{k}={v:#x}" for k, v in op.items() if k != "op")])


def show(r: Result) -> str:
    stats = " ".join(f"{k}{v:+d}" for k, v in sorted(r.stats.items()) if compared(k))
    mmio = " mmio " + ",".join(f"{g:x}:{n}{'w' if w else 'r'}" for g, n, w in r.mmio) if r.mmio else ""
    return f"{STATUS.get(r.status, r.status)} err {r.err:x} value {r.value:x} addr {r.addr:x}{mmio} | {stats}"


def replay(case: dict, label: str, events: bool, verbose: bool, blame: Counter) -> tuple[int, int | None]:
    """(ops that agree, first op that does not)"""
    agreed, first = 0, None
    driver = Driver(case)
    for i, (op, want) in enumerate(zip(case["ops"], case["results"], strict=True)):
        try:
            got = driver.step(op)
        except Exception:  # noqa: BLE001 - the engine broke: say where, and leave this case
            print(f"{label} op {i}: {text(op)}\n  expected {show(want)}\n{traceback.format_exc(limit=-3)}")
            return agreed, i if first is None else first
        if same(want, got):
            agreed += 1
            continue
        if first is None or verbose:
            print(f"{label} op {i}")
            for j in range(max(0, i - 4), i):
                print(f"    before {j}: {text(case['ops'][j])} -> {show(case['results'][j])}")
            print(f"  op       {text(op)}\n  expected {show(want)}\n  got      {show(got)}")
        if first is None:
            first = i
            keys = {
                k for k in {**want.stats, **got.stats} if compared(k) and want.stats.get(k, 0) != got.stats.get(k, 0)
            }
            blame[f"{op['op']}: {', '.join(sorted(keys)) or 'outcome'}"] += 1
            if events:
                print("  events of the engine:", *events_of(case, i), sep="\n    ")
    return agreed, first


def events_of(case: dict, index: int) -> list[str]:
    driver = Driver(case, events=True)
    for op in case["ops"][:index]:
        driver.step(op)
    n = len(driver.vm.event_text())
    driver.step(case["ops"][index])
    return driver.vm.event_text()[n:]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("files", nargs="+")
    p.add_argument("--case", type=int, help="only the case with this index")
    p.add_argument("--events", action="store_true", help="print the engine's events of each first difference")
    p.add_argument("-v", "--verbose", action="store_true", help="print every difference")
    a = p.parse_args()
    rows, blame, began = [], Counter(), time.time()
    for path in a.files:
        for i, case in enumerate(casefile.load(path)):
            if a.case is None or i == a.case:
                agreed, first = replay(
                    case, f"{path} case {i} (seed {case['seed']}, {case['theme']})", a.events, a.verbose, blame
                )
                rows.append((i, case["theme"], agreed, len(case["ops"]), first))
    for i, theme, agreed, n, first in rows:
        if first is not None:
            print(f"case {i:4} {theme:13} {agreed:5} of {n:5} ops agree, first difference at op {first}")
    for what, n in blame.most_common(12):
        print(f"{n:4} cases differ first in {what}")
    agreed, total = sum(r[2] for r in rows), sum(r[3] for r in rows)
    whole = sum(r[4] is None for r in rows)
    print(f"{agreed} of {total} ops agree, {whole} of {len(rows)} cases whole, {time.time() - began:.1f} s")
    return 0 if whole == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
