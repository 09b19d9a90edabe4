"""Seeded random cases for the conformance harness.

    case = generate(seed, ops=500)      # the same seed gives the same case

A guest in 64-bit mode with several roots that share tables, self-maps, aliases, 2M pages; its tables are mapped at their own addresses, so that it
can edit every level. Each case draws its own mix of operations, so that some are full of unsync tables, some of flooding, MMIO and so on.
"""
from __future__ import annotations

import random
from dataclasses import dataclass

from .memory import (A, D, FULL, G, NX, P, PCD, PS, PWT, SYSCALL, SYSCALL_INDEX, U, USER, W, Cpu, Memory, compose)

MB = 1 << 20
EXTRA = [(1, 64 * MB), (2, 96 * MB)]                          # slots beside slot 0, and where
MMIO_GFNS = [0xFE000 + i for i in range(8)] + [0x3F00, 0x3F01, 0x3F08, 0xFEE00, (1 << 27) + 5]
L4, L3, L2 = [0, 1, 2, 255, 256, 511], [0, 1, 2, 3, 511], [0, 1, 2, 3, 4, 8, 511]
L1_GROUPS = [0, 9, 16, 64, 128, 248, 256, 504]
CR0, EFER = 0x80010033, 0xD01
WP, PSE, PGE, SMEP, SMAP = 1 << 16, 1 << 4, 1 << 7, 1 << 20, 1 << 21

# How often each kind of step is taken, by the case's theme; each case then moves every weight at random.
STEPS = dict(access=30, edit=25, flood=2, alias_edit=6, invlpg=5, cr3=6, crs=1.5, mmio=3, scan=1.5, switch=2, cow=2, cross=1.5, reuse=1, host=1.5,
             tour=0.1, dirty=0, unmap=0, slots=0, quota=0.2)
THEMES = {
    "everything": dict(dirty=1, unmap=1, slots=0.6, quota=0.6, host=2),
    "unsync": dict(edit=60, alias_edit=15, cr3=12, invlpg=10, switch=5),
    "flood": dict(flood=20, reuse=4, edit=30),
    "mmio": dict(mmio=25, edit=15, slots=0.5),
    "user": dict(access=60, cow=6),
    "roots": dict(cr3=25, switch=10, crs=2),
    "control": dict(crs=12, access=45),
    "dirty": dict(dirty=6, host=3, access=50),
    "slots": dict(slots=4, mmio=8),
    "unmap": dict(unmap=8, host=4, edit=30),
    "quota": dict(quota=2, scan=4, switch=8, alias_edit=10, tour=12, crs=4),
    "instructions": dict(edit=40, flood=4, alias_edit=12),
    "self": dict(alias_edit=30, edit=10),
    "huge": dict(access=45, dirty=2, slots=0.3, reuse=2, quota=0.3),
}


@dataclass
class Odds:
    """How this case draws entries and accesses."""
    user: float
    clear: dict[int, float]
    nx: float
    reserved: float
    absent: float
    table: float
    device: float
    large: float
    cross_level: float
    invlpg: float
    partial: float
    locked: float
    identity_user: float


class Generator:
    def __init__(self, seed: int, theme: str | None = None) -> None:
        self.r = r = random.Random(seed)
        self.seed, self.theme = seed, theme or list(THEMES)[seed % len(THEMES)]
        weights = {**STEPS, **THEMES[self.theme]}
        self.weights = {k: v * 10 ** r.uniform(-0.7, 0.7) * (r.random() > 0.1 or k in THEMES[self.theme]) for k, v in weights.items()}
        low = lambda top: r.choice([0, top * r.random() ** 2, top * r.random()])  # noqa: E731
        self.odds = Odds(user=r.choice([0, 0.1, 0.5, 0.9]) if self.theme != "user" else r.uniform(0.6, 0.95),
                         clear={W: low(0.5), U: low(0.4), A: low(0.4), D: low(0.6)}, nx=low(0.2), reserved=low(0.05), absent=r.uniform(0.01, 0.15),
                         table=r.uniform(0.05, 0.5), device=0.3 if self.theme == "mmio" else low(0.15), large=r.uniform(0.2, 0.7) if self.theme == "huge" else low(0.3), cross_level=low(0.2),
                         invlpg=r.choice([0, 0.3, 0.7, 1]), partial=low(0.25), locked=low(0.3), identity_user=r.choice([0, 0, 0.3, 1]))
        self.kinds = self.theme == "instructions" or r.random() < 0.15      # other instructions than MOV and locked OR
        self.efer_changes = r.random() < 0.2
        self.memory_bytes = r.choice([8, 8, 16, 32] if self.theme != "quota" else [8]) * MB
        self.huge = r.choice([(0, 2), (2, 4), (2, 6), (0, 8), (4, 6)]) if self.theme == "huge" else None   # MiB in host pages of 2 MiB
        self.mem = Memory()
        self.ops: list[dict] = []
        self.working: list[int] = []
        self.absent: set[int] = set()
        self.vcpu = 0
        self._lay_out()

    # ---- the initial image

    def _lay_out(self) -> None:
        r, mem = self.r, self.mem
        mem.slots[0] = (0, self.memory_bytes >> 12, 0)
        if r.random() < 0.5:
            mem.slots[1] = (64 * MB >> 12, r.choice([16, 64, 512]), 0)
        full = self.theme == "quota"
        big = full or self.theme == "roots" or r.random() < 0.2
        counts = dict(root=r.randint(3, 9), sp3=r.randint(1, 2), sp2=r.randint(1, 2), sp1=r.randint(1, 2), p3=r.randint(1, 5), p2=r.randint(2, 7),
                      p1=r.randint(3, 24 if big or self.theme == "unsync" else 10))
        if full:                                              # more tables than the quota of 64 shadow pages
            counts.update(root=9, p3=r.randint(5, 8), p2=r.randint(8, 11), p1=r.randint(25, 34))
        gfns = list(range(0x10, 0x60))
        if r.random() < 0.7:
            r.shuffle(gfns)
        take = lambda n: [gfns.pop(0) for _ in range(n)]  # noqa: E731
        self.roots = take(counts["root"])
        stub = {3: take(counts["sp3"]), 2: take(counts["sp2"]), 1: take(counts["sp1"])}
        self.tables = {4: list(self.roots), 3: stub[3] + take(counts["p3"]), 2: stub[2] + take(counts["p2"]), 1: stub[1] + take(counts["p1"])}
        for level, pages in [(4, self.roots), *stub.items()]:
            mem.stub.update({g: level for g in pages})
        self.data = [g for g in gfns if g < 0x60][:6] + list(range(0x68, 0x68 + r.choice([4, 12, 24]))) + [0x200, 0x201, 0x209, 0x3FF, 0x400, 0x410]
        self.l1 = sorted({g + i for g in r.sample(L1_GROUPS, r.randint(2, 5)) for i in range(r.choice([3, 7, 9])) if g + i < 512 and not 24 <= g + i < 32} | {1, 2})
        self.l2, self.l3, self.l4 = (sorted({0, *r.sample(x, len(x) if full else r.randint(2, len(x)))}) for x in (L2, L3, L4))
        self.cpus = [Cpu(r.choice(self.roots) << 12, CR0, 0x20 | (r.random() < 0.15) * SMEP | (r.random() < 0.1) * SMAP, EFER)
                     for _ in range(2 if r.random() < 0.25 else 1)]
        for c in self.cpus:
            c.cr3, c.cr4 = (c.cr3 if r.random() < 0.5 else self.cpus[0].cr3), self.cpus[0].cr4
        self._fill(stub)
        self.start = dict(memory=self.memory_bytes, slots=[[i, f << 12, n << 12, fl] for i, (f, n, fl) in sorted(mem.slots.items())],
                          cr0=CR0, cr3=self.cpus[0].cr3, cr4=self.cpus[0].cr4, efer=EFER, vcpus=len(self.cpus))
        if self.huge:
            self.start["huge"] = [x * MB for x in self.huge]
        for v, c in enumerate(self.cpus[1:], 1):
            if c.cr3 != self.cpus[0].cr3:
                self.emit("cr3", vcpu=v, addr=c.cr3)
        self.image = {g << 12: dict(e) for g, e in mem.pages.items()}

    def _fill(self, stub: dict[int, list[int]]) -> None:
        r, mem = self.r, self.mem
        dense = r.uniform(0.5, 1)
        for level, indices in ((4, self.l4), (3, self.l3), (2, self.l2), (1, self.l1)):
            for g in self.tables[level]:
                for i in indices:
                    if r.random() < dense and not mem.protected(g, i):
                        mem.set(g, i, self.entry(level))
                mem.set(g, SYSCALL_INDEX, SYSCALL)
        for g in self.data:
            mem.pages[g] = {0: 0xDA7A0000 + (g << 1), SYSCALL_INDEX: SYSCALL}
        for g in self.roots:
            mem.set(g, 0, r.choice(stub[3]) << 12 | FULL)
            if r.random() < 0.3:
                mem.set(g, self.l4[-1], r.choice(self.roots) << 12 | FULL)             # a self-map, or another's
        for level in (3, 2):
            for g in stub[level]:
                mem.set(g, 0, r.choice(stub[level - 1]) << 12 | FULL)
        for g in stub[1]:
            mem.set(g, 7, 7 << 12 | FULL & ~U)
            mem.set(g, 8, 8 << 12 | FULL)
            for t in range(0x10, 0x100):
                if r.random() < 0.97:
                    mem.set(g, t, t << 12 | FULL & ~(U if r.random() >= self.odds.identity_user else 0))
            mem.set(g, SYSCALL_INDEX, SYSCALL)

    # ---- drawing values

    def entry(self, level: int) -> int:
        r, o = self.r, self.odds
        if r.random() < o.absent:
            return r.choice([0, 0, 0, r.getrandbits(40) & ~1 & ~0xF000])
        flags, target = FULL | r.choice([0, 0, 0, 0, PWT, PCD, 1 << 9, 1 << 11]), 0
        if level == 1:
            x = r.random()
            if x < o.table:
                target = r.choice(self.any_table())
            elif x < o.table + o.device:
                target = r.choice(MMIO_GFNS)
            elif x < o.table + o.device + 0.08:
                target = (r.choice(EXTRA)[1] >> 12) + r.randrange(12)
            else:
                target = r.choice(self.data)
            flags |= r.choice([0, 0, 0, G])
        elif level < 4 and r.random() < (o.large if level == 2 else o.large / 8):
            flags |= PS | r.choice([0, 0, G, 1 << 12])
            target = r.choice([0, 0x200, 0x400, 0x600, 0xFE000, 64 * MB >> 12]) if level == 2 else 0
        elif r.random() < o.cross_level:
            target = r.choice(self.any_table() + self.data[:3] + MMIO_GFNS[:1])
        else:
            target = r.choice(self.tables[level - 1])
        for bit, odds in o.clear.items():
            if r.random() < (odds if level == 1 else odds / 5):
                flags &= ~bit
        if r.random() < o.nx:
            flags |= NX
        if r.random() < o.reserved:
            flags |= r.choice([1 << 45, 1 << 51, 1 << 40, *([1 << 13, 1 << 20] if flags & PS else []), *([PS, G] if level == 4 else [])])
        return target << 12 | flags

    def edited(self, level: int, old: int) -> int:
        """A new value for an entry that holds `old`."""
        x = self.r.random()
        if x < 0.35 and old:
            return old ^ self.r.choice([W, W, U, A, D, D, NX, P, W | D, A | D, PCD])
        if x < 0.45:
            return old
        return 0 if x < 0.55 else self.entry(level)

    def any_table(self) -> list[int]:
        return [g for level in self.tables.values() for g in level]

    def level_of(self, gfn: int) -> int:
        levels = [lv for lv, pages in self.tables.items() if gfn in pages]
        return self.r.choice(levels) if levels else 0

    @property
    def cpu(self) -> Cpu:
        return self.cpus[self.vcpu]

    def fresh_va(self) -> int:
        r = self.r
        i4, i3, i2, i1 = (r.choice(x) for x in (self.l4, self.l3, self.l2, self.l1))
        if r.random() < 0.3:
            i1 = r.choice(self.any_table() + self.data[:-6])          # through the tables' own addresses, or the same page of a large one
        if r.random() < 0.1:
            i4 = i3 = self.l4[-1]                                     # through self-maps
        return compose(i4, i3, i2, i1)

    def page_va(self, write: bool = False) -> int:
        """A page's address, mostly one that may be used this way."""
        r = self.r
        va = r.choice(self.working) if self.working and r.random() < 0.5 else self.fresh_va()
        for _ in range(r.choice([0, 10, 40, 40])):
            hit = self.cpu.walk(self.mem, va)
            if hit and any(self.cpu.allows(hit[1], write, user) for user in (False, True)):
                break
            va = self.fresh_va()
        if va not in self.working:
            self.working = [*self.working[-11:], va]
        return va

    def va_of(self, wanted, tries: int = 40) -> int | None:
        """The address of a page that leads to a gfn that is wanted."""
        for _ in range(tries):
            va = self.r.choice(self.working) if self.working and self.r.random() < 0.2 else self.fresh_va()
            hit = self.cpu.walk(self.mem, va)
            if hit and wanted(hit[0] >> 12):
                return va
        return None

    # ---- emitting operations

    def emit(self, op: str, **args) -> None:
        if "vcpu" not in args and self.vcpu:
            args["vcpu"] = self.vcpu
        self.ops.append({"op": op, **{k: v for k, v in args.items() if v or k in ("addr", "value")}})

    def user(self, va: int, write: bool = False) -> int:
        """The CPL of an access to that page: mostly one that may."""
        user, hit = self.r.random() < self.odds.user, self.cpu.walk(self.mem, va)
        if hit and self.r.random() < 0.85 and not self.cpu.allows(hit[1], write, user):
            user = not user
        return 3 * user

    def read(self, va: int, cpl: int | None = None) -> None:
        size = self.r.choice([1, 2, 4, 8, 8, 8])
        cpl = self.user(va) if cpl is None else cpl
        self.cpu.access(self.mem, va, False, cpl == 3)
        self.emit("read", addr=va, size=size, cpl=cpl)

    def store(self, va: int, data: bytes, cpl: int, kind: str = "write") -> None:
        """A store of these bytes, if it cannot hurt the stub pages (by what is believed of memory)."""
        gpa = self.cpu.access(self.mem, va, True, cpl == 3)
        parts = [(gpa, data)]
        if va % 4096 + len(data) > 4096:
            cut = 4096 - va % 4096
            parts = [(gpa, data[:cut]), (self.cpu.access(self.mem, va + cut, True, cpl == 3), data[cut:])]
        if any(g is not None and not self.mem.safe(g, d) for g, d in parts) or any(g is None and not va & 0xFF8 for g, _ in parts):
            return self.read(va, cpl)
        if all(g is not None for g, _ in parts):
            for g, d in parts:
                if self.mem.backed(g >> 12):
                    self.mem.put(g, d)
        value = int.from_bytes(data, "little")
        args = dict(expected=value) if kind in ("stos",) else dict(value=value)
        self.emit(kind, addr=va, size=len(data), cpl=cpl, **args)

    def locked(self, va: int, gpa: int, new: int, cpl: int, size: int = 8) -> None:
        """Brings the qword at gpa to `new`, as far as the instruction can."""
        kind = self.r.choice(["or", "or", "and", "xor", "add", "xchg", "cmpxchg"]) if self.kinds else "or"
        old, mask = self.mem.get(gpa >> 12, gpa >> 3 & 511), (1 << 64) - 1
        operand, result = {"or": (new & ~old, new | old), "and": (new | ~old & mask, new & old), "xor": (old ^ new, new), "add": (new - old & mask, new),
                           "xchg": (new, new), "cmpxchg": (new, new)}[kind]
        if not self.mem.keeps_stub(gpa >> 12, gpa >> 3 & 511, result):
            return
        if kind == "cmpxchg" and self.r.random() < 0.1:
            old ^= 2
            result = old ^ 2
        if self.cpu.access(self.mem, va, True, cpl == 3) is not None:
            self.mem.set(gpa >> 12, gpa >> 3 & 511, result)
        self.emit(kind, addr=va, value=operand, size=size, cpl=cpl, **(dict(expected=old) if kind == "cmpxchg" else {}))

    def write_entry(self, va: int, gfn: int, index: int, new: int, cpl: int) -> None:
        """The guest brings the entry at va to `new`: whole, in part, misaligned, or by a locked instruction."""
        r, at = self.r, index * 8
        if r.random() < self.odds.locked:
            return self.locked(va | at, gfn << 12 | at, new, cpl)
        image = new.to_bytes(8, "little")
        if r.random() >= self.odds.partial:
            kind = "write"
            if self.kinds and r.random() < 0.4:
                kind = r.choice(["stos", "movnti", *(["push"] if cpl else [])])
            return self.store(va | at, image, cpl, kind)
        size, shift = r.choice([(4, 0), (4, 0), (4, 4), (1, 0), (1, 1), (2, 0), (1, 7), (2, 6), (4, 2)])
        if r.random() < 0.3 and 1 < index < 510:                                  # misaligned: the end of this entry, the start of the next
            both = image + self.mem.get(gfn, index + 1).to_bytes(8, "little")
            size, shift = r.choice([(8, 4), (8, 1), (8, 7), (4, 6), (2, 7)])
            return self.store((va | at) + shift, both[shift:shift + size], cpl)
        return self.store((va | at) + shift, image[shift:shift + size], cpl)

    def pick_index(self, level: int, gfn: int) -> int:
        r = self.r
        i = r.choice({4: self.l4, 3: self.l3, 2: self.l2, 1: self.l1, 0: self.l1}[level])
        if self.working and level and r.random() < 0.5:
            i = r.choice(self.working) >> 12 + 9 * (level - 1) & 511
        return i if i != SYSCALL_INDEX else 1

    def new_value(self, level: int, gfn: int, index: int) -> int:
        if self.mem.protected(gfn, index):
            old, below = self.mem.get(gfn, index), [g for g, lv in self.mem.stub.items() if lv == level - 1]
            if level == 1 or self.r.random() < 0.6:
                return old ^ self.r.choice([0, PWT, PCD, 1 << 9, 1 << 11])
            return self.r.choice(below) << 12 | FULL
        return self.edited(level, self.mem.get(gfn, index))

    # ---- steps

    def step_access(self) -> None:
        r, x = self.r, self.r.random()
        va = self.page_va(x >= 0.62)
        if x < 0.5:
            return self.read(va | r.choice([0, 8, 16, 0x100, 0xEF8, 3, 0x7F]))
        if x < 0.62:
            cpl = self.user(va)
            hit = self.cpu.walk(self.mem, va)
            if hit and self.mem.get(hit[0] >> 12, SYSCALL_INDEX) & 0xFFFF != SYSCALL:
                return self.read(va)
            self.cpu.access(self.mem, va, False, cpl == 3, True)
            return self.emit("fetch", addr=va | SYSCALL_INDEX * 8, cpl=cpl)
        self.write_through(va)

    def write_through(self, va: int) -> None:
        """A store through this page, with a value that makes sense where it is believed to land."""
        r, cpl = self.r, self.user(va, True)
        hit = self.cpu.walk(self.mem, va)
        gfn = hit[0] >> 12 if hit else 0
        level = self.level_of(gfn) if hit else 0
        if level:
            index = self.pick_index(level, gfn)
            if index not in (0, 7, 8):
                return self.write_entry(va, gfn, index, self.new_value(level, gfn, index), cpl)
        offset, size = r.choice([8, 16, 0x100, 0x808, 0xEF8]), r.choice([1, 2, 4, 8, 8])
        if self.kinds and gfn in self.data and r.random() < 0.1:
            return self.emit("rep", addr=va | 0x200, value=r.choice([1, 3, 8, 40]), expected=r.getrandbits(30) << 1, cpl=cpl)
        if r.random() < 0.15 and gfn and not level:
            return self.locked(va | offset, gfn << 12 | offset, r.getrandbits(30) << 1, cpl)
        self.store(va | offset, (r.getrandbits(30) << 1).to_bytes(8, "little")[:size], cpl)

    def step_edit(self) -> None:
        r = self.r
        level = r.choices([1, 2, 3, 4], [10, 4, 2, 1])[0]
        gfn = r.choice(self.tables[level])
        index = self.pick_index(level, gfn)
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            self.write_entry(gfn << 12, gfn, index, self.new_value(level, gfn, index), 3 if r.random() < self.odds.identity_user * self.odds.user else 0)
            index = min(index + 1, 510) if index not in (6, 7, 29) else 10
        self.after_edit()

    def after_edit(self) -> None:
        r = self.r
        if self.working and r.random() < self.odds.invlpg:
            self.emit("invlpg", addr=r.choice(self.working))
        elif r.random() < 0.15:
            self.emit("cr3", addr=self.cpu.cr3)
        if self.working and r.random() < 0.5:
            va = r.choice(self.working)
            self.read(va | 16) if r.random() < 0.5 else self.write_through(va)

    def step_alias_edit(self) -> None:
        va = self.va_of(lambda g: g >= 0x10 and self.level_of(g) > 0)
        if va is not None:
            self.working = [*self.working[-11:], va]
            self.write_through(va)
            if self.r.random() < 0.3:
                self.after_edit()

    def step_flood(self) -> None:
        r = self.r
        level = r.choices([1, 2, 3, 4], [2, 5, 4, 3])[0]
        gfn = r.choice(self.tables[level])
        va = gfn << 12
        if r.random() < 0.4:
            va = self.va_of(lambda g: g == gfn) or va
        for _ in range(r.randint(2, 6)):
            index = self.pick_index(level, gfn)
            if va == gfn << 12 or index not in (0, 7, 8):
                self.write_entry(va, gfn, index, self.new_value(level, gfn, index), 0)
            if r.random() < 0.2:
                self.read(self.page_va())

    def step_invlpg(self) -> None:
        va = self.page_va() if self.r.random() < 0.97 else 1 << 47
        self.emit("invlpg", addr=va | self.r.choice([0, 0x10, 0xFFF]))

    def step_cr3(self) -> None:
        r = self.r
        if r.random() < 0.02:
            return self.emit("cr3", addr=self.cpu.cr3 | 1 << r.choice([40, 45, 51]))
        if r.random() < 0.75:
            self.cpu.cr3 = r.choice(self.roots) << 12 | r.choice([0, 0, 0, 0, 8, 0x18])
        self.emit("cr3", addr=self.cpu.cr3)

    def step_switch(self) -> None:
        """A context switch, and the new process at work."""
        self.step_cr3()
        for _ in range(self.r.randint(2, 5)):
            self.step_edit() if self.r.random() < 0.3 else self.step_access()

    def step_tour(self) -> None:
        """Many addresses in turn under several roots, to use up the page quota."""
        for root in self.r.sample(self.roots, self.r.randint(1, 3)):
            self.cpu.cr3 = root << 12
            self.emit("cr3", addr=self.cpu.cr3)
            for _ in range(self.r.randint(3, 8)):
                va = self.va_of(lambda g: g > USER)
                if va is not None:
                    self.read(va) if self.r.random() < 0.7 else self.write_through(va)

    def step_crs(self) -> None:
        r, c = self.r, self.cpu
        x = r.random()
        if self.efer_changes and x < 0.2:
            c.efer ^= 0x800
            return self.emit("efer", value=c.efer)
        if x < 0.5:
            if r.random() < 0.1:
                return self.emit("cr0", addr=r.choice([c.cr0 & ~(1 << 31), c.cr0 | 1 << 29, c.cr0 & ~1]))
            c.cr0 ^= r.choice([WP, WP, WP, 0, 1 << 3, 1 << 1])
            return self.emit("cr0", addr=c.cr0)
        if r.random() < 0.08:
            return self.emit("cr4", addr=r.choice([c.cr4 & ~0x20, c.cr4 | 1 << 12, c.cr4 | 1 << 17, c.cr4 | 1 << 40]))
        c.cr4 ^= r.choice([PGE, PGE, SMEP, SMAP, SMEP | SMAP, PSE, 0])
        self.emit("cr4", addr=c.cr4)

    def step_mmio(self) -> None:
        r = self.r
        va = self.va_of(lambda g: not self.mem.backed(g))
        if va is None:
            gfn = r.choice(self.tables[1])
            index = self.pick_index(1, gfn)
            return self.write_entry(gfn << 12, gfn, index, r.choice(MMIO_GFNS) << 12 | FULL & ~r.choice([0, 0, D, W]), 0)
        self.working = [*self.working[-11:], va]
        for _ in range(r.randint(1, 4)):
            x = r.random()
            cpl = self.user(va, x >= 0.5)
            if x < 0.5:
                self.read(va | r.choice([0, 8, 0x10, 0x7FC, 0xFFE]), cpl)
            elif x < 0.9:
                self.store(va | r.choice([8, 0x10, 0x7FC]), r.randbytes(r.choice([1, 2, 4, 8])), cpl)
            else:
                self.emit("or", addr=va | 0x20, value=r.getrandbits(20), cpl=cpl)
        if r.random() < 0.3:
            self.after_edit()

    def step_scan(self) -> None:
        va = self.page_va()
        write = self.r.random() < 0.3
        for i in range(self.r.randint(4, 20)):
            at = va & ~0x1FF000 | (va + (i << 12)) & 0x1FF000
            self.write_through(at) if write else self.read(at)

    def step_cow(self) -> None:
        """Write protect, flush, write (fault), make writable again, flush, write."""
        r, va = self.r, self.va_of(lambda g: g in self.data)
        if va is None:
            return
        cpl = self.user(va, True)
        gfn, index = self.cpu.walk(self.mem, va)[2][-1]
        old = self.mem.get(gfn, index)
        for value in (old & ~W, old | W | r.choice([0, D, A | D])):
            self.write_entry(gfn << 12, gfn, index, value, 0)
            if r.random() < 0.8:
                self.emit("invlpg", addr=va)
            self.store(va | 0x108, r.randbytes(7) + b"\0", cpl)

    def step_cross(self) -> None:
        """An access over a page's end; a store leaves the start of the second page as it is."""
        r, va = self.r, self.page_va()
        if va >> 12 & 511 == 511:
            return
        cpl = self.user(va)
        size = r.choice([2, 4, 8])
        at = va + 4096 - r.randint(1, size - 1)
        second = self.cpu.walk(self.mem, va + 4096)
        if r.random() < 0.4 or second is None:
            self.cpu.access(self.mem, va, False, cpl == 3)
            return self.emit("read", addr=at, size=size, cpl=cpl)
        cut = va + 4096 - at
        self.store(at, r.randbytes(cut) + self.mem.bytes(second[0], size - cut), cpl)

    def step_reuse(self) -> None:
        """A table is taken out of use, written as data, and comes back, perhaps at another level."""
        r = self.r
        level = r.choice([1, 1, 2, 3])
        free = [g for g in self.tables[level] if g not in self.mem.stub]
        if not free:
            return
        gfn = r.choice(free)
        if r.random() < 0.6:                                       # unlink it where it is linked
            for owner in self.tables[level + 1]:
                for i, e in list(self.mem.pages.get(owner, {}).items()):
                    if e & P and (e & (1 << 40) - 1) >> 12 == gfn and not self.mem.protected(owner, i) and r.random() < 0.8:
                        self.store(owner << 12 | i * 8, bytes(8), 0)
        for _ in range(r.randint(1, 6)):
            i = r.choice(self.l1)
            self.store(gfn << 12 | i * 8, (r.getrandbits(30) << 1).to_bytes(8, "little")[:r.choice([1, 4, 8, 8])], 0)
        back = r.choice([1, 1, 2, 3])
        self.tables[level].remove(gfn)
        self.tables[back].append(gfn)
        for _ in range(r.randint(1, 4)):
            i = self.pick_index(back, gfn)
            self.write_entry(gfn << 12, gfn, i, self.entry(back), 0)
        owner = r.choice(self.tables[back + 1])
        i = self.pick_index(back + 1, owner)
        if not self.mem.protected(owner, i):
            self.write_entry(owner << 12, owner, i, gfn << 12 | FULL, 0)

    def host_write(self, gfn: int, index: int, value: int) -> None:
        if self.mem.keeps_stub(gfn, index, value):
            self.mem.set(gfn, index, value)
            self.emit("hwrite", addr=gfn << 12 | index * 8, value=value, size=8)

    def step_host(self) -> None:
        r = self.r
        if r.random() < 0.6:
            return self.host_write(r.choice(self.data), r.choice([1, 2, 40, 64]), r.getrandbits(31) << 1)
        level = r.choice([1, 1, 1, 2, 3, 4])
        gfn = r.choice(self.tables[level])
        index = self.pick_index(level, gfn)
        self.host_write(gfn, index, self.new_value(level, gfn, index))

    def step_dirty(self) -> None:
        r = self.r
        slot = r.choice([0, 0, 0, *self.mem.slots])
        first, n, flags = self.mem.slots[slot]
        if flags & 1 and r.random() < 0.7:
            return self.emit("dirtylog", slot=slot)
        if flags & 1 or r.random() < 0.7:
            self.mem.slots[slot] = (first, n, flags ^ 1)
            self.emit("dirty", slot=slot, addr=first << 12, value=n << 12, flags=flags ^ 1)

    def step_unmap(self) -> None:
        r, mem = self.r, self.mem
        n = r.choice([1, 1, 1, 2, 4])
        first = r.choice(self.data + [g for g in self.any_table() if g not in mem.stub] * 2 + [g for g, level in mem.stub.items() if level > 1 or r.random() < 0.03])
        gone = [g for g in range(first, first + n) if g not in (7, 8)]
        if r.random() < 0.1 and 1 in mem.slots:
            gone = list(range(mem.slots[1][0], mem.slots[1][0] + mem.slots[1][1]))
        if self.huge and any(self.huge[0] << 8 <= g < self.huge[1] << 8 for g in gone):
            return                                                 # the host would split its page: another story
        self.emit("unmap", addr=gone[0] << 12, value=len(gone) << 12)
        for g in gone:
            old = mem.pages.pop(g, {})
            if len(old) > 40 and g not in mem.stub:
                old = {i: old[i] for i in r.sample(sorted(old), 12)}
            keep = g in mem.stub or r.random() < 0.5
            for i, v in old.items():
                if keep or r.random() < 0.3 or (i == SYSCALL_INDEX and r.random() < 0.7):
                    mem.set(g, i, v)
                    self.emit("hwrite", addr=g << 12 | i * 8, value=v, size=8)

    def step_slots(self) -> None:
        r, mem = self.r, self.mem
        if r.random() < 0.1:
            first, n, flags = mem.slots[0]
            self.emit("slot_del", slot=0, addr=0, value=0)
            mem.slots[0] = (first, n, r.choice([flags, 0, 1]))
            return self.emit("slot_add", slot=0, addr=0, value=n << 12, flags=mem.slots[0][2])
        slot, gpa = r.choice(EXTRA)
        if slot in mem.slots:
            del mem.slots[slot]
            return self.emit("slot_del", slot=slot, addr=gpa, value=0)
        mem.slots[slot] = (gpa >> 12, r.choice([1, 4, 16, 64, 512]), r.choice([0, 0, 1, 2]))
        self.emit("slot_add", slot=slot, addr=gpa, value=mem.slots[slot][1] << 12, flags=mem.slots[slot][2])
        if r.random() < 0.5:
            for g in range(gpa >> 12, (gpa >> 12) + min(12, mem.slots[slot][1])):
                self.host_write(g, SYSCALL_INDEX, SYSCALL)

    def step_quota(self) -> None:
        self.emit("quota", value=self.r.choice([64, 64, 70, 80, 100, 200]))

    def generate(self, ops: int) -> dict:
        names = list(self.weights)
        while len(self.ops) < ops:
            if len(self.cpus) > 1 and self.r.random() < 0.25:
                self.vcpu ^= 1
            getattr(self, f"step_{self.r.choices(names, list(self.weights.values()))[0]}")()
        return dict(seed=self.seed, theme=self.theme, **self.start, pages=self.image, ops=self.ops[:ops])


def generate(seed: int, ops: int = 500, theme: str | None = None) -> dict:
    return Generator(seed, theme).generate(ops)
