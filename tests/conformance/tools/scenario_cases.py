"""Writes the 64-bit scenarios as cases, asks real KVM about them, and keeps its answers.

    python -m tests.conformance.tools.scenario_cases     # needs what `shadowkvm doctor` names; about a minute

The guest of a case is another one than that of the scenarios (docs/verify.md): its stubs take the place of gfns 7 and
8, so those two page tables move to 17 and 18, and PUSH and MOVAPS become MOVNTI, which KVM treats alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conformance.corpus import RAM, Op, Scenario, load

from shadowkvm.kvm import Case, Qemu, Slot, save
from shadowkvm.kvm import Op as CaseOp
from shadowkvm.kvm.record import record

OUT = Path(__file__).parents[1] / "data" / "directed.json.xz"
SYSCALL = 0x050F
TARGET = 0xF0  # where in its page a jump lands: what else is stored there does not hit it
F, S = 0x67, 0x63
# What the guest of a case cannot do: CR3 set by the host, INT3 with an IDT elsewhere, code of a scenario's own.
LEFT_OUT = {"O3-10", "O2-12", "O5-1", "O5-2"}
STORES = {"W": 8, "W64": 8, "W32": 4, "W16": 2, "W8": 1}
LOCKED = {"XCHG": "xchg", "LOR": "or", "ADDM": "add"}


def moved(value: int) -> int:
    """An address or an entry: gfns 7 and 8 are 17 and 18 here."""
    return value + 0x10000 if (value & 0xFFFFFFFFFF) >> 12 in (7, 8) else value


def pages_of(scenario: Scenario) -> dict[int, dict[int, int]]:
    """The start state of the corpus, with the stubs mapped."""
    pages: dict[int, dict[int, int]] = {0x1000: {0: 0x2000 | F}, 0x2000: {0: 0x3000 | F}, 0x3000: {}}
    for i in range(8):
        table = moved(0x4000 + 0x1000 * i)
        pages[0x3000][i] = table | F
        pages[table] = {j: (i * 512 + j) << 12 | S for j in range(512)}
    pages[0x4000].update({7: 0x7000 | S, 8: 0x8000 | F})
    for address, value in scenario.memory:
        at = moved(address)
        pages.setdefault(at & ~0xFFF, {})[at >> 3 & 511] = moved(value)
    for op in scenario.ops:
        if op.letter in ("CALL", "UEXEC") and op.address < 16 << 20:
            pages.setdefault(op.address & ~0xFFF, {})[TARGET >> 3] = SYSCALL
    return pages


def host_ops(number: int, pages: dict[int, dict[int, int]]) -> Iterator[CaseOp]:
    """What user space does on HOST `number` (tests/conformance/driver.py)."""
    drop = {6: [(0x400000, 0x2000)], 7: [(0x6000, 0x1000)], 10: [(0x400000, 0x1000)]}
    drop[11] = [(gpa, 0x1000) for gpa in (0x402000, 0x406000, 0x408000)]
    if number in (1, 3):
        yield CaseOp("dirty", addr=0, value=RAM, flags=int(number == 1))
    elif number == 2:
        yield CaseOp("dirtylog")
    elif number == 4:
        yield CaseOp("slot_add", slot=1, addr=0x10000000, value=0x100000)
    elif number == 5:
        yield CaseOp("slot_del", slot=1, addr=0x10000000)
    elif number == 9:
        yield CaseOp("quota", value=64)
    for gpa, size in drop.get(number, []):
        yield CaseOp("unmap", addr=gpa, value=size)
    if number == 7:
        for i, entry in list(pages[0x6000].items())[:24]:
            yield CaseOp("hwrite", addr=0x6000 + 8 * i, value=entry)


def case_ops(op: Op, pages: dict[int, dict[int, int]]) -> Iterator[CaseOp]:
    """One op of a scenario."""
    at, value, letter = moved(op.address), moved(op.value), op.letter
    if letter in STORES or letter == "UW":
        size = STORES.get(letter, 8)
        yield CaseOp("write", addr=at, value=value & (1 << 8 * size) - 1, size=size, cpl=3 * (letter == "UW"))
    elif letter in LOCKED:
        yield CaseOp(LOCKED[letter], addr=at, value=value)
    elif letter in ("CALL", "UEXEC"):
        if op.address < 16 << 20:
            yield CaseOp("fetch", addr=at & ~0xFFF | TARGET, cpl=3 * (letter == "UEXEC"))
    elif letter == "HOST":
        yield from host_ops(op.address, pages)
    else:
        others = {
            "R": CaseOp("read", addr=at),
            "UR": CaseOp("read", addr=at, cpl=3),
            "LCMPXCHG": CaseOp("cmpxchg", addr=at, value=value, expected=moved(op.extra)),
            "LCMPXCHG8B": CaseOp("cmpxchg", addr=at, value=value, expected=moved(op.extra)),
            "PUSH": CaseOp("movnti", addr=max(at - 8, 0), value=value),
            "MOVAPS": CaseOp("movnti", addr=at, value=value),
            "REPSTOS": CaseOp("rep", addr=at, value=op.extra, expected=value),
            "INV": CaseOp("invlpg", addr=op.address),
            "EFER": CaseOp("efer", value=op.address | 1),
            **{name: CaseOp(name.lower(), addr=op.address) for name in ("CR0", "CR3", "CR4")},
        }
        if letter in others:
            yield others[letter]


def case_of(scenario: Scenario) -> Case:
    pages, regs, ops = pages_of(scenario), scenario.regs, []
    slots = [Slot(0, 0, RAM)]
    for what, *args in scenario.setup:
        if what == "slot":
            slots.append(Slot(args[0], args[1], args[2], 2))
        elif what == "quota":
            ops.append(CaseOp("quota", value=args[0]))
        else:
            pages.setdefault(args[0] & ~0xFFF, {})[args[0] >> 3 & 511] = args[1]
    for op in scenario.ops:
        ops += case_ops(op, pages)
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
        cr4=regs["cr4"],
        efer=regs["efer"] | 1,
    )


def nx_huge_pages(base: Scenario) -> Case:
    """O4-0, of which no recording was published: huge pages that are split where the guest executes from them."""
    pages = {g: dict(e) for g, e in pages_of(base).items()}
    pages[0x3000].update({8: 0x10000E3, 9: 0x12000E3})
    for gpa in (0x1000000, 0x1200000):
        pages[gpa] = {TARGET >> 3: SYSCALL}
    ops = [CaseOp("read", addr=0x1000000), CaseOp("fetch", addr=0x1000000 | TARGET), CaseOp("read", addr=0x1010000)]
    ops += [CaseOp("fetch", addr=0x1200000 | TARGET), CaseOp("read", addr=0x1300000), CaseOp("write", addr=0x1300000)]
    ops += [CaseOp("write", addr=0x30A1, size=1), CaseOp("read", addr=0x1000000), CaseOp("read", addr=0x1200000)]
    shows = "a huge page is split by an instruction fetch, counted, and mapped large again after its table went"
    name = "O4-0 nx_huge_pages=force"
    return Case(RAM, [Slot(0, 0, RAM)], 0x1000, ops, pages, huge=(0, RAM), nx_huge_pages=True, name=name, shows=shows)


def two_vcpus(base: Scenario) -> Iterator[Case]:
    """The two scenarios with two vCPUs, of which no recording was published."""
    pages = {g: dict(e) for g, e in pages_of(base).items()}
    pages[0x1000] = {0: 0x2000 | F}

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
        yield Case(RAM, [Slot(0, 0, RAM)], 0x1000, ops, pages, name=name, shows=shows, vcpus=2)


def main() -> int:
    scenarios = load().scenarios
    cases = [case_of(s) for s in scenarios.values() if s.mode == "64-bit" and s.id not in LEFT_OUT]
    cases += [*two_vcpus(scenarios["O1-1"]), nx_huge_pages(scenarios["O1-1"])]
    backend = Qemu()
    kept = record(backend, cases, lambda text: print(text, file=sys.stderr))
    save(OUT, [c for c in kept if c.ops], meta=backend.about())
    print(f"{OUT}: {len(kept)} cases, {sum(len(c.ops) for c in kept)} operations, {OUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
