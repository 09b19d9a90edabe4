"""Writes the scenarios as cases, with some more, asks real KVM about them, and keeps its answers.

    python -m tests.conformance.tools.scenario_cases     # needs what `shadowkvm doctor` names; about a minute

The guest of a case is another one than that of the scenarios (docs/verify.md): its stubs take the place of gfns 7 and
8, so page tables that lie there move to 17 and 18.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.corpus import RAM, Op, Scenario, load
from tests.conformance.tools.own_cases import own_cases

from shadowkvm.kvm import Case, Qemu, Slot, save
from shadowkvm.kvm import Op as CaseOp
from shadowkvm.kvm.case import AC
from shadowkvm.kvm.layout import IMAGE, LABELS, RT
from shadowkvm.kvm.record import batches, record

OUT = Path(__file__).parents[1] / "data" / "directed.json.xz"
SYSCALL = 0x050F
TARGET = 0xF0  # where in its page a jump lands: what else is stored there does not hit it
F, S, P = 0x67, 0x63, 0x1
STORES = {"W": 8, "W64": 8, "W32": 4, "W16": 2, "W8": 1}
LOCKED = {"XCHG": "xchg", "LOR": "or"}
OSFXSR = 1 << 9


@dataclass(frozen=True)
class Mode:
    """How a scenario's guest pages: bytes of a word of its code and of an entry."""

    word: int
    entry: int


MODES = {"64-bit": Mode(8, 8), "32-bit": Mode(4, 4), "PAE": Mode(4, 8), "no paging": Mode(4, 4)}


def moved(value: int) -> int:
    """An address or an entry: gfns 7 and 8 are 17 and 18 here."""
    return value + 0x10000 if (value & 0xFFFFFFFFFF) >> 12 in (7, 8) else value


class Pages:
    """A memory image in the making."""

    def __init__(self) -> None:
        self.image: dict[int, dict[int, int]] = {}

    def put(self, address: int, value: int, size: int = 8) -> None:
        """A word of 1 to 8 bytes."""
        for i, byte in enumerate(value.to_bytes(size, "little")):
            at = address + i
            entries, shift = self.image.setdefault(at & ~0xFFF, {}), 8 * (at & 7)
            index = at >> 3 & 511
            entries[index] = entries.get(index, 0) & ~(0xFF << shift) | byte << shift


def table_pages(mode: str) -> Pages:
    """The tables of the corpus's start state, with the stubs mapped."""
    pages, entry = Pages(), MODES[mode].entry
    if mode == "no paging":
        return pages
    if mode == "64-bit":
        pages.put(0x1000, 0x2000 | F)
        pages.put(0x2000, 0x3000 | F)
    elif mode == "PAE":
        pages.put(0x1000, 0x3000 | P)
    directory, tables = (0x1000, 4) if mode == "32-bit" else (0x3000, 8)
    per_table = 4096 // entry
    for i in range(tables):
        table = moved(0x4000 + 0x1000 * i)
        pages.put(directory + entry * i, table | (F if mode == "64-bit" else S), entry)
        for j in range(per_table):
            pages.put(table + entry * j, (i * per_table + j) << 12 | S, entry)
    pages.put(0x4000 + 7 * entry, RT | S, entry)
    pages.put(0x4000 + 8 * entry, RT + 0x1000 | F, entry)
    return pages


def pages_of(scenario: Scenario) -> dict[int, dict[int, int]]:
    """The start state of the corpus."""
    pages, size = table_pages(scenario.mode), MODES[scenario.mode].entry
    for address, value in scenario.memory:
        if scenario.regs["idt"] == address & ~0xFFF or address & ~0xFFF == 0x201000:
            continue  # gates, which lead elsewhere here
        for i in range(0, 8, size):
            word = value >> 8 * i & (1 << 8 * size) - 1
            pages.put(moved(address) + i, moved(word), size)
    for op in scenario.ops:
        if op.letter in ("CALL", "UEXEC") and op.address < 16 << 20:
            pages.put(op.address & ~0xFFF | TARGET, SYSCALL)
    if scenario.id == "O2-12":  # its IDT is on a page of its own
        first, last = LABELS[64]["idt"] - RT, LABELS[64]["idt_end"] - RT
        for i in range(0, last - first, 8):
            pages.put(scenario.regs["idt"] + i, int.from_bytes(IMAGE[first + i : first + i + 8], "little"))
    if scenario.id == "O5-2":  # mov %rdx, (%rbx); syscall
        pages.put(0x430FFE, int.from_bytes(b"\x48\x89\x13\x0f\x05", "little"), 5)
    return pages.image


def host_ops(scenario: Scenario, number: int, pages: dict[int, dict[int, int]]) -> Iterator[CaseOp]:
    """What user space does on HOST `number` (tests/conformance/driver.py)."""
    drop = {6: [(0x400000, 0x2000)], 7: [(0x6000, 0x1000)], 10: [(0x400000, 0x1000)]}
    drop[11] = [(gpa, 0x1000) for gpa in (0x402000, 0x406000, 0x408000)]
    regs = scenario.regs
    if number in (1, 3):
        yield CaseOp("dirty", addr=0, value=RAM, flags=int(number == 1))
    elif number == 2:
        yield CaseOp("dirtylog")
    elif number == 4:
        yield CaseOp("slot_add", slot=1, addr=0x10000000, value=0x100000)
    elif number == 5:
        yield CaseOp("slot_del", slot=1, addr=0x10000000)
    elif number == 8:
        yield CaseOp("set_sregs", addr=0x31000, value=regs["cr0"], expected=regs["cr4"], flags=regs["efer"] | 1)
    elif number == 9:
        yield CaseOp("quota", value=64)
    for gpa, size in drop.get(number, []):
        yield CaseOp("unmap", addr=gpa, value=size)
    if number == 7:
        for i, entry in list(pages[0x6000].items())[:24]:
            yield CaseOp("hwrite", addr=0x6000 + 8 * i, value=entry)


def store(op: Op, at: int, value: int, word: int) -> Iterator[CaseOp]:
    """A store, by as many instructions as the scenario's guest uses."""
    size = STORES.get(op.letter, 8)
    for i in range(0, size, word):
        part = min(size, word)
        rest = value >> 8 * i & (1 << 8 * part) - 1
        yield CaseOp("write", addr=at + i, value=rest, size=part, cpl=3 * (op.letter == "UW"))


def called(scenario: Scenario, op: Op, at: int) -> Iterator[CaseOp]:
    """A call. Code of the scenario's own is CMPXCHG16B (O5-1), a store across a page's end (O5-2), or a way back."""
    if scenario.id == "O5-1":
        entry = 0x17063 if op.value == 0x20000 else 0
        yield CaseOp("cmpxchg16b", addr=op.value, value=entry, size=16, expected=entry)
    elif scenario.id == "O5-2":
        yield CaseOp("run", addr=op.address, expected=op.value, value=moved(op.extra), length=3)
    else:
        offset = TARGET if op.address < 16 << 20 else op.address & 0xFFF  # nothing of ours lies beyond the tables
        yield CaseOp("fetch", addr=at & ~0xFFF | offset, cpl=3 * (op.letter == "UEXEC"))


def case_ops(scenario: Scenario, op: Op, pages: dict[int, dict[int, int]]) -> Iterator[CaseOp]:
    """One op of a scenario."""
    at, value, letter, word = moved(op.address), moved(op.value), op.letter, MODES[scenario.mode].word
    if letter in STORES or letter == "UW":
        yield from store(op, at, value, word)
    elif letter in LOCKED:
        yield CaseOp(LOCKED[letter], addr=at, value=value)
    elif letter in ("CALL", "UEXEC"):
        yield from called(scenario, op, at)
    elif letter == "HOST":
        yield from host_ops(scenario, op.address, pages)
    else:
        yield {
            "R": CaseOp("read", addr=at, size=word),
            "UR": CaseOp("read", addr=at, cpl=3),
            "RAC": CaseOp("read", addr=at, flags=AC),
            "LCMPXCHG": CaseOp("cmpxchg", addr=at, value=value, expected=moved(op.extra)),
            "LCMPXCHG8B": CaseOp("cmpxchg8b", addr=at, value=value, expected=moved(op.extra)),
            "ADDM": CaseOp("add", addr=at, value=value, flags=1),
            "PUSH": CaseOp("push", addr=max(at - 8, 0), value=value),
            "MOVAPS": CaseOp("movaps", addr=at, size=16),
            "REPSTOS": CaseOp("rep", addr=at, value=op.extra, expected=value),
            "INV": CaseOp("invlpg", addr=op.address),
            "INT3": CaseOp("int3"),
            "EFER": CaseOp("efer", value=op.address | 1),
            "CR0": CaseOp("cr0", addr=op.address),
            "CR3": CaseOp("cr3", addr=op.address),
            "CR4": CaseOp("cr4", addr=op.address),
        }[letter]


def case_of(scenario: Scenario) -> Case:
    """A scenario as a case."""
    pages, regs, ops = pages_of(scenario), scenario.regs, []
    slots, cr4 = [Slot(0, 0, RAM)], regs["cr4"]
    for what, *args in scenario.setup:
        if what == "slot":
            slots.append(Slot(args[0], args[1], args[2], 2))
        elif what == "quota":
            ops.append(CaseOp("quota", value=args[0]))
        else:
            pages.setdefault(args[0] & ~0xFFF, {})[args[0] >> 3 & 511] = args[1]
    if scenario.id == "O2-12":
        ops.append(CaseOp("idt", addr=regs["idt"]))
    for op in scenario.ops:
        ops += case_ops(scenario, op, pages)
    if any(op.op == "movaps" for op in ops):
        cr4 |= OSFXSR
    return Case(
        memory=RAM if scenario.host != "untouched" else 4 << 20,
        huge=(0, RAM) if scenario.host == "huge" else None,
        slots=slots,
        pages=pages,
        ops=ops,
        name=f"{scenario.id} {scenario.name}",
        shows=scenario.shows,
        cr0=regs["cr0"],
        cr3=regs["cr3"],
        cr4=cr4,
        efer=regs["efer"] | (scenario.mode == "64-bit"),
    )


def odd_stores() -> Case:
    """O2-37. One of its stores clears the directory's first entry, so the stubs need a directory of their own."""
    pages = table_pages("64-bit")
    pages.put(0x2000, 0x9000 | F)
    pages.put(0x2008, 0x3000 | F)
    pages.put(0x9000, 0x4000 | F)
    there = 1 << 30 | 0x400000
    ops = [CaseOp("read", addr=there), CaseOp("write", addr=0x30A6), CaseOp("write", addr=0x2FFF)]
    ops += [CaseOp("cmpxchg8b", addr=0x30B0), CaseOp("read", addr=there)]
    shows = "to a directory: 64-bit at +6, over its start from the page before, CMPXCHG8B"
    return Case(RAM, [Slot(0, 0, RAM)], 0x1000, ops, pages.image, name="O2-37 odd stores", shows=shows)


def nx_huge_pages() -> Case:
    """O4-0, of which no recording was published: huge pages that are split where the guest executes from them."""
    pages = table_pages("64-bit")
    pages.put(0x3040, 0x10000E3)
    pages.put(0x3048, 0x12000E3)
    for gpa in (0x1000000, 0x1200000):
        pages.put(gpa | TARGET, SYSCALL)
    ops = [CaseOp("read", addr=0x1000000), CaseOp("fetch", addr=0x1000000 | TARGET), CaseOp("read", addr=0x1010000)]
    ops += [CaseOp("fetch", addr=0x1200000 | TARGET), CaseOp("read", addr=0x1300000), CaseOp("write", addr=0x1300000)]
    ops += [CaseOp("write", addr=0x30A1, size=1), CaseOp("read", addr=0x1000000), CaseOp("read", addr=0x1200000)]
    shows = "a huge page is split by an instruction fetch, counted, and mapped large again after its table went"
    name, image = "O4-0 nx_huge_pages=force", pages.image
    return Case(RAM, [Slot(0, 0, RAM)], 0x1000, ops, image, huge=(0, RAM), nx_huge_pages=True, name=name, shows=shows)


def two_vcpus() -> Iterator[Case]:
    """The two scenarios with two vCPUs, of which no recording was published."""

    def at(vcpu: int, op: str, **more: int) -> CaseOp:
        return CaseOp(op, vcpu=vcpu, **more)

    sync = [at(0, "read", addr=0x400000), at(1, "read", addr=0x400000), at(0, "write", addr=0x6048, value=0x500063)]
    sync += [at(1, "read", addr=0x409000), at(0, "invlpg", addr=0x409000), at(1, "read", addr=0x409000)]
    sync += [at(0, "cr3", addr=0x1000), at(1, "cr3", addr=0x1000), at(1, "read", addr=0x409000)]
    zap = [at(0, "read", addr=0x400000), at(1, "read", addr=0x400000), at(0, "write", addr=0x30A1, value=0, size=1)]
    zap += [at(1, "read", addr=0x401000), at(0, "write", addr=0x1049, value=0, size=1), at(1, "read", addr=0x401000)]
    zap += [at(0, "read", addr=0x402000), at(1, "read", addr=0x402000)]
    for name, shows, ops in (
        ("O3-8 2 vCPUs sync", "A makes a table unsync; B sees it after A's INVLPG and its own CR3 load", sync),
        ("O3-9 2 vCPUs zap", "A zaps the page directory, then the root, under B", zap),
    ):
        pages = table_pages("64-bit").image
        yield Case(RAM, [Slot(0, 0, RAM)], 0x1000, ops, pages, name=name, shows=shows, vcpus=2)


def all_cases() -> list[Case]:
    """Every scenario of the corpus and of the published list, and the cases that were written for this suite."""
    cases = [case_of(s) for s in load().scenarios.values() if s.id != "O2-37"]
    return [*cases, odd_stores(), *two_vcpus(), nx_huge_pages(), *own_cases()]


def main() -> int:
    cases, backend = all_cases(), Qemu()
    for case in cases:
        case.check(case.title)
    kept = [done for group in batches(cases, backend.batch // 2) for done in record(backend, group)]
    for _ in range(3):  # the host rescheduled, or the case is cut for good
        short = [i for i, case in enumerate(cases) if len(kept[i].ops) < len(case.ops)]
        again = record(backend, [cases[i] for i in short], lambda text: print(text, file=sys.stderr)) if short else []
        for i, case in zip(short, again, strict=True):
            kept[i] = max(kept[i], case, key=lambda c: len(c.ops))
    save(OUT, kept, meta=backend.about())
    print(f"{OUT}: {len(kept)} cases, {sum(len(c.ops) for c in kept)} operations, {OUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
