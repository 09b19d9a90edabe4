"""Directed cases that were written for this suite: instructions, event delivery, modes, the host's actions.

Their guests map 0 to 16 MiB one to one for the supervisor, and the first 4 MiB again from 16 MiB on for both CPLs. The
tables on the way to the first 2 or 4 MiB: 64-bit 1000, 2000, 3000, 4000; PAE 1000, 3000, 4000; two-level 1000, 4000.
"""

from __future__ import annotations

from collections.abc import Iterator

from shadowkvm.kvm import Case, Slot
from shadowkvm.kvm import Op as CaseOp
from shadowkvm.kvm.layout import IMAGE, LABELS, RT, STACK

MB = 1 << 20
RAM = 16 * MB
S, F = 0x63, 0x67
LONG = {"cr0": 0x80010033, "cr4": 0x220, "efer": 0xD01}
PAE = {"cr0": 0x80010033, "cr4": 0x220, "efer": 0x800}
TWO = {"cr0": 0x80010033, "cr4": 0x210, "efer": 0}
OFF = {"cr0": 0x10033, "cr4": 0x200, "efer": 0}
MODES = {"64-bit": LONG, "PAE": PAE, "two-level": TWO, "paging off": OFF}
ENTRY = {"64-bit": 8, "PAE": 8, "two-level": 4, "paging off": 4}
"""Bytes of an entry."""
UNMAPPED = 0x3F000000


def tables(mode: str) -> dict[int, dict[int, int]]:
    """The tables of a guest, by bytes, as qwords."""
    pages: dict[int, dict[int, int]] = {}

    def put(at: int, value: int, size: int) -> None:
        entries = pages.setdefault(at & ~0xFFF, {})
        entries[at >> 3 & 511] = entries.get(at >> 3 & 511, 0) | value << 8 * (at & 7 if size == 4 else 0)

    if mode == "paging off":
        return pages
    size = ENTRY[mode]
    each, n = 4096 // size << 12, 4096 // size
    directory = 0x1000 if mode == "two-level" else 0x3000
    if mode == "64-bit":
        put(0x1000, 0x2000 | F, 8)
        put(0x2000, 0x3000 | F, 8)
    elif mode == "PAE":
        put(0x1000, 0x3001, 8)
    for i in range(RAM // each):
        table = 0x10000 + (i << 12) if i else 0x4000
        put(directory + size * i, table | F, size)
        for j in range(n):
            put(table + size * j, (i * n + j) << 12 | (F if i * n + j == 8 else S), size)
    for i in range(4 * MB // each):
        put(directory + size * (RAM // each + i), 0x20000 + (i << 12) | F, size)
        for j in range(n):
            put(0x20000 + (i << 12) + size * j, (i * n + j) << 12 | F, size)
    return pages


def case(mode: str, name: str, shows: str, ops: list[CaseOp], **more: object) -> Case:
    """A case of a guest in this mode."""
    pages = tables(mode)
    pages.update(more.pop("pages", {}))  # type: ignore[call-overload]
    settings = {**MODES[mode], "slots": [Slot(0, 0, RAM)], **more}
    return Case(memory=RAM, cr3=0x1000, ops=ops, pages=pages, name=f"{name}, {mode}", shows=shows, **settings)  # type: ignore[arg-type]


def op(name: str, addr: int = 0, value: int = 0, **more: int) -> CaseOp:
    """Short for an operation."""
    return CaseOp(name, addr=addr, value=value, **more)


def word(mode: str) -> int:
    """Bytes of a word of its code."""
    return 8 if mode == "64-bit" else 4


def level2_entry(mode: str, i: int) -> int:
    """The address of an entry of the directory."""
    return (0x1000 + 4 * i) if mode == "two-level" else 0x3000 + 8 * i


def instructions(mode: str) -> Iterator[Case]:
    """Each read-modify-write and each store, at an unsync table, a tracked one and data."""
    n = word(mode)
    pde, pte = level2_entry(mode, 100), 0x4F00
    kinds = ["or", "and", "xor", "add", "inc", "xadd", "bts", "cmpxchg"]
    ops = [op("read", 0x400000, size=n)]
    places = (0x400000, pte, pde)
    ops += [op(kind, at, 2, size=n, flags=flags) for flags in (0, 1) for kind in kinds for at in places]
    shows = "to data, to a last-level table, to a directory: locked, then not; which are tried again first"
    yield case(mode, "read-modify-writes", shows, ops)
    ops = [op("read", 0x400000, size=n)]
    for kind in ("stos", "movnti", "push", "movups", "movaps"):
        for at in (0x400000, pte, pde):
            size = 16 if kind.startswith("mov") and kind != "movnti" else n
            ops.append(op(kind, at & ~15, size=size))
    for kind, at in (("movups", 0x400FF8), ("movups", pde & ~15 | 8), ("movups", 0x4000 - 8), ("movaps", 0x400008)):
        ops.append(op(kind, at, size=16))
    shows = "STOS, MOVNTI, PUSH, 16 bytes: to data, to both kinds of tables, across two pages, misaligned"
    yield case(mode, "stores of other instructions", shows, ops)
    ops = [op("read", 0x400000, size=n), op("write", 0x400000, 0x1234, size=n)]
    ops += [op("movs", at, 3, size=n, expected=0x400000) for at in (0x401000, pte, pde & ~15, 0x402000 - n)]
    ops += [op("movs", 0x403000, 2, size=1, expected=0x400000), op("rep", pde & ~15, 5, size=1)]
    ops += [op("movs", UNMAPPED, 1, size=n, expected=0x400000), op("movs", 0x400000, 1, size=n, expected=UNMAPPED)]
    yield case(mode, "REP MOVS", "to data, tables, across a page's end; both operands unmapped", ops)


def wide_exchanges() -> Iterator[Case]:
    """CMPXCHG8B and 16B."""
    for mode in MODES:
        n = word(mode)
        pde = level2_entry(mode, 100) & ~7
        ops = [op("read", 0x400000, size=n)]
        for at in (0x400000, 0x4F00, pde):
            for flags in (0, 1):
                ops.append(op("cmpxchg8b", at, 0x1122334455667788 & ~0x100000001, size=8, flags=flags))
                ops.append(op("cmpxchg8b", at, 0, expected=0x1122334455667788 & ~0x100000001, flags=flags))
                ops.append(op("cmpxchg8b", at, 7, expected=7, flags=flags))
        yield case(mode, "CMPXCHG8B", "equal and not, at data and tables, locked and not", ops)
    ops = [op("read", 0x400000)]
    for at in (0x400000, 0x4F00):
        ops += [op("cmpxchg16b", at, 2, size=16, flags=flags, expected=0) for flags in (0, 1)]
    ops.append(op("cmpxchg16b", 0x400008, 2, size=16))
    yield case("64-bit", "CMPXCHG16B", "data, unsync table, misaligned (#GP)", ops)


def delivery(mode: str) -> Iterator[Case]:
    """Events whose delivery faults."""
    n, bits = word(mode), 64 if mode == "64-bit" else 32
    log = op("dirty", 0, RAM, flags=1)
    ops = [op("int3"), op("int3", cpl=3), log, op("int3"), op("int3"), op("dirtylog"), op("int3", cpl=3)]
    ops += [op("dirtylog"), op("read", 0x1000000, size=n, cpl=3), op("dirtylog"), op("read", UNMAPPED, size=n)]
    ops += [op("dirtylog"), op("read", UNMAPPED, size=n, cpl=3), op("int3", cpl=3)]
    shows = "INT3, INT 0x80 (32-bit) and #PF onto a stack that the dirty log protects: decoded again at each entry"
    yield case(mode, "events under a dirty log", shows, ops)
    if mode == "paging off":
        return
    at, end = LABELS[bits]["idt"] - RT, LABELS[bits]["idt_end"] - RT
    gates = {i // 8: int.from_bytes(IMAGE[at + i : at + i + 8], "little") for i in range(0, end - at, 8)}
    gates = {i: v for i, v in gates.items() if i < 34 or i >= 128}  # between the two lies something else
    entry = 0x4000 + ENTRY[mode] * 0x60
    regs = MODES[mode]
    revive = op("set_sregs", 0x1000, regs["cr0"], expected=regs["cr4"], flags=regs["efer"])
    forbid = op("hwrite", entry, 0, size=4)
    allow = op("hwrite", entry, 0x60000 | S, size=4)
    lost = op("read", UNMAPPED, size=n)
    ops = [op("idt", 0x60000), op("int3"), lost, op("int3", cpl=3), forbid, op("invlpg", 0x60000), op("int3")]
    ops += [revive, op("idt", 0x60000), lost, revive, op("read", 0x400000, size=n), allow, op("idt", 0x60000), lost]
    shows = "an IDT elsewhere, first touched by an event; then forbidden: #PF, #DF, shutdown; the host revives the vCPU"
    yield case(mode, "IDT forbidden", shows, ops, pages={0x60000: gates})
    ops = [op("stack", 0x60E00), op("int3"), lost, op("read", UNMAPPED, size=n, cpl=3), forbid, op("invlpg", 0x60000)]
    ops += [lost, revive, op("int3"), revive, op("read", UNMAPPED, size=n, cpl=3), revive]
    ops += [op("stack", STACK), lost, op("read", 0x400000, size=n)]
    shows = "a stack elsewhere; then forbidden: in 64-bit mode #DF has a stack of its own, else the vCPU shuts down"
    yield case(mode, "stack forbidden", shows, ops)
    ops = [op("read", 0x400000, size=n), op("write", 0x4F00, size=n), op("stack", 0x4FF0), op("int3"), lost]
    ops += [op("stack", 0x11E00), op("read", 0x400000, size=n), lost, op("read", UNMAPPED, size=n, cpl=3)]
    shows = "a stack on a page table, in step or not: unprotected before the delivery goes on"
    yield case(mode, "stack on tables", shows, ops)


def modes() -> Iterator[Case]:
    """Changes of the paging mode."""
    moved = {}  # PAE's tables, 1 MiB further on
    for g, e in tables("PAE").items():
        moved[g + MB] = {i: v + MB if g in (0x1000, 0x3000) and v & 1 else v for i, v in e.items()}
    touch = [op("read", 0x400000, size=4), op("write", 0x4F00, 0, size=4), op("write", 0x104F00, 0, size=4)]
    ops = [*touch, op("cr0", 0x10033), *touch, op("cr4", 0x230), op("cr3", 0x101000), op("read", 0x400010, size=4)]
    ops += [op("cr0", 0x80010033), *touch, op("cr3", 0x101000), op("cr4", 0x2B0), *touch, op("cr0", 0x10033)]
    ops += [op("cr4", 0x210), op("cr3", 0x1000), op("cr0", 0x80000033), *touch, op("cr0", 0x80010033), *touch]
    shows = "paging off, CR4.PAE, another root, paging on; and back, CR0.WP changed on the way"
    yield case("two-level", "two-level, off, PAE", shows, ops, pages=moved)
    # A 64-bit guest's directory and tables, and PAE's PDPT above the same directory.
    pdpt = {0x100000: {0: 0x3001}}
    long, pae = MODES["64-bit"], MODES["PAE"]
    to_pae = op("set_sregs", 0x100000, pae["cr0"], expected=pae["cr4"], flags=pae["efer"])
    to_long = op("set_sregs", 0x1000, long["cr0"], expected=long["cr4"], flags=long["efer"])
    off = op("set_sregs", 0x1000, OFF["cr0"], expected=OFF["cr4"], flags=OFF["efer"])
    use = [op("read", 0x400000, size=4), op("write", 0x4F00, 0, size=4), op("write", 0x3F00, 0, size=4)]
    ops = [*use, to_pae, *use, to_long, *use, off, *use, to_pae, *use, to_long, op("cr3", 0x1000), *use]
    shows = (
        "the host switches between 64-bit and PAE over the same directory, and to paging off: shadow pages are shared"
    )
    yield case("64-bit", "modes by the host", shows, ops, pages=pdpt)
    bad = [op("hwrite", 0x1008, 0x3003, size=8), op("cr3", 0x1000), op("read", 0x400000, size=4), op("cr4", 0x2A0)]
    bad += [
        op("cr0", 0x80000033),
        op("hwrite", 0x1008, 0x3001, size=8),
        op("cr3", 0x1000),
        op("read", 0x40400000, size=4),
    ]
    bad += [
        op("hwrite", 0x1010, 1 << 45 | 0x3001, size=8),
        op("cr3", 0x1000),
        op("cr0", 0x10033),
        op("cr0", 0x80010033),
    ]
    bad += [op("hwrite", 0x1010, 0x3019, size=8), op("cr0", 0x80010033), op("read", 0x80400000, size=4)]
    yield case("PAE", "bad PDPTEs", "CR3, CR4 and CR0 loads with reserved bits in PDPTEs: #GP, nothing changes", bad)
    sregs = op("set_sregs", 0x1000, pae["cr0"] & ~0x10000, expected=pae["cr4"], flags=pae["efer"])
    ops = [op("read", 0x400000, size=4), op("hwrite", 0x1018, 0x3003, size=8), sregs, op("read", 0x400000, size=4)]
    ops += [op("hwrite", 0x1018, 0x3001, size=8), sregs, op("read", 0xC0400000, size=4)]
    yield case("PAE", "bad PDPTEs set by the host", "KVM_SET_SREGS takes them and the guest is lost; set again", ops)
    ops = [op("read", 0x400000, size=4), op("hwrite", 0x1008, 0xE0000001, size=8), op("cr3", 0x1000)]
    ops += [op("hwrite", 0x1008, 0, size=8), sregs, op("read", 0x400000, size=4)]
    yield case("PAE", "PDPTE outside the slots", "a root that no memory holds: the vCPU shuts down at entry", ops)


def host_actions() -> Iterator[Case]:
    """Slots, dirty logs by hand, the host's pages."""
    for mode in MODES:
        n = word(mode)
        size = 64 << 12
        far = 0x3E00000
        two = [Slot(0, 0, RAM), Slot(1, far, size)]
        yield case(
            mode,
            "slot moves",
            "a slot moves under the guest, and its memory with it",
            _move(mode, n, far, size),
            slots=two,
        )
        for manual in (1, 3):
            name, shows = f"dirty log by hand ({manual})", "GET only reads, CLEAR protects page by page"
            yield case(mode, name, shows, _clear(n), manual_dirty=manual)
        ops = [op("unmap", 0x400000, 0x8000), op("hread", 0x401000, 0x2000), op("read", 0x400000, size=n)]
        ops += [op("read", 0x401000, size=n), op("write", 0x401008, 1, size=n), op("write", 0x402008, 1, size=n)]
        ops += [op("read", 0x404000, size=n), op("write", 0x404008, 1, size=n), op("unmap", 0x404000, 0x1000)]
        ops += [op("write", 0x404008, 1, size=n), op("hwrite", 0x405000, 5, size=8), op("read", 0x405000, size=n)]
        yield case(mode, "absent and zero pages", "first reads, first writes, reads of the host before them", ops)
        ops = [op("read", 0x400000, size=n), op("dirty", 0, RAM, flags=1), op("read", 0x400000, size=n)]
        ops += [op("write", 0x400010, 1, size=n), op("dirtylog"), op("write", 0x400010, 1, size=n)]
        ops += [op("dirty", 0, RAM), op("read", 0x400010, size=n), op("write", 0x600010, 1, size=n)]
        name, shows = "huge pages and a dirty log", "huge leaves are split by writes and come back"
        yield case(mode, name, shows, ops, huge=(0, RAM), pages=_large(mode))
        ops = [op("read", 0x400000, size=n), op("quota", value=64)]
        ops += [op("read", 0x1000000 + (i << 12), size=n) for i in range(0, 1024, 130)]
        ops += [op("quota", value=200), op("read", 0x400000, size=n), op("quota", value=64)]
        yield case(mode, "quota at run time", "the limit of shadow pages changes", ops)


def _move(mode: str, n: int, far: int, size: int) -> list[CaseOp]:
    """A page of the slot hangs in the last entry of the first table."""
    at = far if mode == "paging off" else (4096 // ENTRY[mode] - 1) << 12

    def hang(gpa: int) -> list[CaseOp]:
        pte = 0x5000 - ENTRY[mode]
        return [op("write", pte, gpa | F, size=4), op("invlpg", at)] if mode != "paging off" else []

    there = [op("write", at + 0x10, 77, size=n), op("read", at + 0x10, size=n)]
    look = [op("read", at + 0x10, size=n), *hang(far + 0x1000), op("read", at + 0x10, size=n)]
    move, back = (op("slot_move", gpa, size, slot=1) for gpa in (far + 0x1000, far))
    host = op("hwrite", far + 0x10, 5, size=8)
    return [op("read", 0x400000, size=n), *hang(far), *there, move, *look, host, *look, back, *hang(far), *look]


def _clear(n: int) -> list[CaseOp]:
    ops = [op("write", 0x400000 + (i << 12), 1, size=n) for i in range(4)]
    ops += [op("dirty", 0, RAM, flags=1), op("write", 0x400008, 1, size=n), op("write", 0x401008, 1, size=n)]
    ops += [op("dirtylog"), op("write", 0x402008, 1, size=n), op("dirtylog")]
    ops += [op("cleardirty", 0x400, 64, expected=3), op("write", 0x400008, 1, size=n), op("write", 0x402008, 1, size=n)]
    ops += [op("dirtylog"), op("cleardirty", 0x400, 64, expected=(1 << 64) - 1), op("read", 0x402008, size=n)]
    ops += [op("cleardirty", 0, 4096, expected=(1 << 64) - 1), op("dirtylog"), op("write", 0x403008, 1, size=n)]
    return [*ops, op("dirty", 0, RAM), op("write", 0x403008, 1, size=n)]


def _large(mode: str) -> dict[int, dict[int, int]]:
    """A directory whose entries from 4 MiB on are large pages."""
    if mode == "paging off":
        return {}
    directory = 0x1000 if mode == "two-level" else 0x3000
    entries = dict(tables(mode)[directory])
    if mode == "two-level":
        entries[0] = entries[0] & 0xFFFFFFFF | 0x4000E3 << 32
        return {directory: entries}
    return {directory: {**entries, 2: 0x4000E3, 3: 0x6000E3}}


def code_over_a_page_end() -> Iterator[Case]:
    """A store whose bytes lie on two pages, which are there or not."""
    for mode in MODES:
        n = word(mode)
        code, length = (b"\x48\x89\x13\x0f\x05", 3) if n == 8 else (b"\x89\x13\xcd\x80", 2)
        first, rest = code[:1].rjust(8, b"\0"), code[1:].ljust(8, b"\0")
        pages = {0x300000: {511: int.from_bytes(first, "little")}, 0x301000: {0: int.from_bytes(rest, "little")}}
        start = 0x300FFF + (0 if mode == "paging off" else 16 * MB)  # the user's alias

        def run(at: int, cpl: int = 0, start: int = start, n: int = n, length: int = length) -> CaseOp:
            return op("run", start, 7, expected=at, size=n, length=length, cpl=cpl)

        targets = (0x402000, 0x4F00, level2_entry(mode, 99))
        ops = [*map(run, targets), *map(run, targets), run(0x402000, 3), run(0x1302000, 3)]
        if mode != "paging off":
            second = 0x20000 + ENTRY[mode] * 0x301 if mode == "two-level" else 0x21000 + 8 * 0x101
            ops += [op("hwrite", second, 0, size=4), op("invlpg", start + 1), run(0x402000), run(0x1302000, 3)]
            ops += [op("hwrite", second, 0x301000 | F, size=4), run(0x1302000, 3)]
        yield case(mode, "code over a page's end", "a store to data, an unsync table, a directory", ops, pages=pages)


def own_cases() -> list[Case]:
    """All of them."""
    out = [*wide_exchanges(), *modes(), *host_actions(), *code_over_a_page_end()]
    for mode in MODES:
        out += [*instructions(mode), *delivery(mode)]
    return out
