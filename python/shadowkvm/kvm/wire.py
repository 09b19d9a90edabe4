"""What goes to harness/replay.c and what comes back: a case in binary, answers and traces as text."""

from __future__ import annotations

import re
import struct
from typing import Final

from shadowkvm.kvm.case import STATUSES, Answer, Case, Op
from shadowkvm.kvm.layout import IMAGE, LABELS, RT, USER, stub_of

__all__ = ["case_bytes", "split_cases"]

MAGIC: Final = 0x334B4853
HOST_KIND: Final = 16
KINDS: Final = {
    "fetch": 1,
    "read": 2,
    "efer": 3,
    "hwrite": 16,
    "slot_add": 17,
    "slot_del": 17,
    "dirty": 17,
    "dirtylog": 18,
    "unmap": 19,
    "quota": 20,
}
# The other statistics of KVM depend on the host's timer (exits, irq_exits) or are of the harness (io_exits).
KEPT: Final = re.compile(
    r"pf_|mmu_|max_mmu_|invlpg|tlb_flush|remote_tlb_flush|pages_|nx_lpage|insn_emulation|mmio_exits"
)
TRACE_LINE: Final = re.compile(r"\s*\S+-\d+\s+\[\d+\]\s+\S+\s+[\d.]+: (.*)")


def op_bytes(o: Op) -> bytes:
    """An operation as replay.c reads it (struct op)."""
    kind, arg, rip, end, size = KINDS.get(o.op, 0), o.flags, 0, 0, o.size
    if kind < HOST_KIND:
        rip, end, arg = stub_of(o)
    elif kind in (17, 18):
        size = o.slot
    return struct.pack("<4B3I3Q", kind, size, o.cpl, o.vcpu, arg, rip, end, o.addr, o.value, o.expected)


def case_bytes(case: Case, phys_bits: int = 0) -> bytes:
    """A case as replay.c reads it: struct head, slots, pages (the guest's code last), operations.

    Args:
        case: what to replay.
        phys_bits: physical address width that the guest is told; 0: what KVM offers.
    """
    tops = [s.gpa + s.size for s in case.slots]
    tops += [o.addr + o.value for o in case.ops if o.op == "slot_add"]
    labels = (LABELS["pf_entry"], LABELS["gp_entry"], LABELS["k_user"])
    numbers = (case.memory, max([case.memory, *tops]), case.cr0, case.cr3, case.cr4, case.efer, case.vcpus)
    counts = (len(case.slots), len(case.pages) + 2, len(case.ops))
    out = [struct.pack("<17Q", MAGIC, *numbers, *counts, *labels, *(case.huge or (0, 0)), phys_bits)]
    out += [struct.pack("<4Q", s.slot, s.gpa, s.size, s.flags) for s in case.slots]
    for gpa, entries in sorted(case.pages.items()):
        page = bytearray(4096)
        for i, v in entries.items():
            struct.pack_into("<Q", page, i * 8, v)
        out.append(struct.pack("<Q", gpa) + page)
    out += [struct.pack("<Q", gpa) + IMAGE[gpa - RT : gpa - RT + 4096] for gpa in (RT, USER)]
    return b"".join([*out, *map(op_bytes, case.ops)])


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
