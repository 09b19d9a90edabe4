"""What goes to harness/replay.c and what comes back: a case in binary, answers and traces as text."""

from __future__ import annotations

import re
import struct
from typing import Final

from shadowkvm.kvm.case import STATUSES, Answer, Case, Op
from shadowkvm.kvm.layout import CODE, IMAGE, LABELS, RT, USER, stub_of

__all__ = ["case_bytes", "split_cases"]

MAGIC: Final = 0x344B4853
HOST_KIND: Final = 16
KINDS: Final = {
    "fetch": 1,
    "read": 2,
    "efer": 3,
    "cmpxchg8b": 4,
    "run": 5,
    "int3": 6,
    "idt": 7,
    "movups": 8,
    "movaps": 8,
    "cmpxchg16b": 9,
    "hwrite": 16,
    "slot_del": 17,
    "slot_move": 17,
    "dirty": 17,
    "dirtylog": 18,
    "unmap": 19,
    "quota": 20,
    "cleardirty": 21,
    "hread": 22,
    "set_sregs": 23,
    "stack": 24,
    "slot_add": 25,
}
OF_A_SLOT: Final = frozenset({"slot_add", "slot_del", "slot_move", "dirty", "dirtylog", "cleardirty"})
HEAD: Final = "<17Q22Q"
# The other statistics of KVM depend on the host's timer (exits, irq_exits) or are of the harness (io_exits).
KEPT: Final = re.compile(
    r"pf_|mmu_|max_mmu_|invlpg|tlb_flush|remote_tlb_flush|pages_|nx_lpage|insn_emulation|mmio_exits"
)
TRACE_LINE: Final = re.compile(r"\s*\S+-\d+\s+\[\d+\]\s+\S+\s+[\d.]+: (.*)")


def op_bytes(o: Op, bits: int = 64) -> bytes:
    """An operation as replay.c reads it (struct op)."""
    kind, arg, rip, end, size, length = KINDS.get(o.op, 0), o.flags, 0, 0, o.size, o.length
    if kind < HOST_KIND:
        rip, end, arg = stub_of(o, bits)
        if o.op == "push":
            length = o.size
    elif o.op in OF_A_SLOT:
        size = o.slot
    return struct.pack(
        "<4B5I3Q", kind, size, o.cpl, o.vcpu, arg, rip, end, o.flags, length, o.addr, o.value, o.expected
    )


def mode_numbers(bits: int) -> tuple[int, ...]:
    """Where things are in the code of one mode (struct mode)."""
    labels = LABELS[bits]
    back = labels["k_back" if bits == 64 else "back_hlt"]
    names = ("pf_hlt", "gp_hlt", "df_hlt", "bp_hlt", "k_user", "idt")
    limit = labels["idt_end"] - labels["idt"] - 1
    return back, *(labels[n] for n in names), limit, labels["tss"], labels["idtr"], CODE[bits]


def case_bytes(case: Case, phys_bits: int = 0) -> bytes:
    """A case as replay.c reads it: struct head, slots, pages (the guest's code last), operations.

    Args:
        case: what to replay.
        phys_bits: physical address width that the guest is told; 0: what KVM offers.
    """
    tops = [s.gpa + s.size for s in case.slots]
    tops += [o.addr + o.value for o in case.ops if o.op in ("slot_add", "slot_move")]
    modes = mode_numbers(64) + mode_numbers(32)
    gdt = (LABELS[64]["gdt"], LABELS[64]["gdt_end"] - LABELS[64]["gdt"] - 1)
    numbers = (case.memory, max([case.memory, *tops]), case.cr0, case.cr3, case.cr4, case.efer, case.vcpus)
    counts = (len(case.slots), len(case.pages) + 2, len(case.ops))
    rest = (*(case.huge or (0, 0)), phys_bits, case.manual_dirty, *gdt, *modes)
    out = [struct.pack(HEAD, MAGIC, *numbers, *counts, *rest)]
    out += [struct.pack("<4Q", s.slot, s.gpa, s.size, s.flags) for s in case.slots]
    for gpa, entries in sorted(case.pages.items()):
        page = bytearray(4096)
        for i, v in entries.items():
            struct.pack_into("<Q", page, i * 8, v)
        out.append(struct.pack("<Q", gpa) + page)
    out += [struct.pack("<Q", gpa) + IMAGE[gpa - RT : gpa - RT + 4096] for gpa in (RT, USER)]
    return b"".join([*out, *map(op_bytes, case.ops, case.modes())])


def parse_answer(line: str) -> Answer:
    """A line "R op status error value address words..." of replay.c."""
    p = line.split()
    mmio: list[tuple[int, int, int]] = []
    counters: dict[str, int] = {}
    for word in p[6:]:
        if word.startswith("mmio:"):
            _, gpa, length, write = word.split(":")
            mmio.append((int(gpa, 16), int(length), int(write)))
        elif (m := re.match(r"(\w+)([+-]\d+)$", word)) and KEPT.match(m[1]):
            counters[m[1]] = int(m[2])
    status = STATUSES[int(p[2])]
    # For MMIO replay.c says in the place of the error code whether the last exit was a write: `mmio` says it better.
    error = int(p[3], 16) if status != "mmio" else 0
    return Answer(status, error, int(p[4], 16), int(p[5], 16), mmio, counters)


def split_cases(text: str) -> list[tuple[list[Answer], list[list[str]], str]]:
    """Of what a run printed, for each case: answers, events of each operation (if traced), what went wrong."""
    cases: list[tuple[list[Answer], list[list[str]], str]] = []
    for line in text.replace("\0", "").replace("\r", "").splitlines():
        if line.startswith("CASE "):
            cases.append(([], [], "the harness did not end"))
            continue
        if not cases:
            continue
        answers, events, _ = cases[-1]
        if line.startswith("R "):
            answers.append(parse_answer(line))
        elif line == "DONE":
            cases[-1] = (answers, events, "")
        elif line.startswith("ERROR "):
            cases[-1] = (answers, events, line.removeprefix("ERROR "))
        elif m := TRACE_LINE.match(line):
            if re.match(r"tracing_mark_write: op \d+", m[1]):
                events.append([])
            elif events:
                events[-1].append(m[1].rstrip())
    return cases
