"""The guest of a random case: its first image, the values it writes, and the operations it emits."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .memory import FULL, NX, PCD, PS, PWT, SYSCALL, SYSCALL_INDEX, A, Cpu, D, G, Memory, P, U, W, compose
from .themes import STEPS, THEMES

MB = 1 << 20
EXTRA = [(1, 64 * MB), (2, 96 * MB)]  # slots beside slot 0, and where
MMIO_GFNS = [0xFE000 + i for i in range(8)] + [0x3F00, 0x3F01, 0x3F08, 0xFEE00, (1 << 27) + 5]
L4, L3, L2 = [0, 1, 2, 255, 256, 511], [0, 1, 2, 3, 511], [0, 1, 2, 3, 4, 8, 511]
L1_GROUPS = [0, 9, 16, 64, 128, 248, 256, 504]
CR0, EFER = 0x80010033, 0xD01
WP, PSE, PGE, SMEP, SMAP = 1 << 16, 1 << 4, 1 << 7, 1 << 20, 1 << 21


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


class World:
    """A guest's image, what it believes of itself, and how its accesses are written down."""

    def __init__(self, seed: int, theme: str | None = None) -> None:
        self.r = r = random.Random(seed)
        self.seed, self.theme = seed, theme or list(THEMES)[seed % len(THEMES)]
        weights = {**STEPS, **THEMES[self.theme]}
        self.weights = {
            k: v * 10 ** r.uniform(-0.7, 0.7) * (r.random() > 0.1 or k in THEMES[self.theme])
            for k, v in weights.items()
        }
        low = lambda top: r.choice([0, top * r.random() ** 2, top * r.random()])  # noqa: E731
        self.odds = Odds(
            user=r.choice([0, 0.1, 0.5, 0.9]) if self.theme != "user" else r.uniform(0.6, 0.95),
            clear={W: low(0.5), U: low(0.4), A: low(0.4), D: low(0.6)},
            nx=low(0.2),
            reserved=low(0.05),
            absent=r.uniform(0.01, 0.15),
            table=r.uniform(0.05, 0.5),
            device=0.3 if self.theme == "mmio" else low(0.15),
            large=r.uniform(0.2, 0.7) if self.theme == "huge" else low(0.3),
            cross_level=low(0.2),
            invlpg=r.choice([0, 0.3, 0.7, 1]),
            partial=low(0.25),
            locked=low(0.3),
            identity_user=r.choice([0, 0, 0.3, 1]),
        )
        self.kinds = self.theme == "instructions" or r.random() < 0.15  # other instructions than MOV and locked OR
        self.efer_changes = r.random() < 0.2
        self.memory_bytes = r.choice([8, 8, 16, 32] if self.theme != "quota" else [8]) * MB
        self.huge = (
            r.choice([(0, 2), (2, 4), (2, 6), (0, 8), (4, 6)]) if self.theme == "huge" else None
        )  # MiB in host pages of 2 MiB
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
        counts = dict(
            root=r.randint(3, 9),
            sp3=r.randint(1, 2),
            sp2=r.randint(1, 2),
            sp1=r.randint(1, 2),
            p3=r.randint(1, 5),
            p2=r.randint(2, 7),
            p1=r.randint(3, 24 if big or self.theme == "unsync" else 10),
        )
        if full:  # more tables than the quota of 64 shadow pages
            counts.update(root=9, p3=r.randint(5, 8), p2=r.randint(8, 11), p1=r.randint(25, 34))
        gfns = list(range(0x10, 0x60))
        if r.random() < 0.7:
            r.shuffle(gfns)
        take = lambda n: [gfns.pop(0) for _ in range(n)]  # noqa: E731
        self.roots = take(counts["root"])
        stub = {3: take(counts["sp3"]), 2: take(counts["sp2"]), 1: take(counts["sp1"])}
        self.tables = {
            4: list(self.roots),
            3: stub[3] + take(counts["p3"]),
            2: stub[2] + take(counts["p2"]),
            1: stub[1] + take(counts["p1"]),
        }
        for level, pages in [(4, self.roots), *stub.items()]:
            mem.stub.update(dict.fromkeys(pages, level))
        self.data = (
            [g for g in gfns if g < 0x60][:6]
            + list(range(0x68, 0x68 + r.choice([4, 12, 24])))
            + [0x200, 0x201, 0x209, 0x3FF, 0x400, 0x410]
        )
        self.l1 = sorted(
            {
                g + i
                for g in r.sample(L1_GROUPS, r.randint(2, 5))
                for i in range(r.choice([3, 7, 9]))
                if g + i < 512 and not 24 <= g + i < 32
            }
            | {1, 2}
        )
        self.l2, self.l3, self.l4 = (
            sorted({0, *r.sample(x, len(x) if full else r.randint(2, len(x)))}) for x in (L2, L3, L4)
        )
        self.cpus = [
            Cpu(r.choice(self.roots) << 12, CR0, 0x20 | (r.random() < 0.15) * SMEP | (r.random() < 0.1) * SMAP, EFER)
            for _ in range(2 if r.random() < 0.25 else 1)
        ]
        for c in self.cpus:
            c.cr3, c.cr4 = (c.cr3 if r.random() < 0.5 else self.cpus[0].cr3), self.cpus[0].cr4
        self._fill(stub)
        self.start = dict(
            memory=self.memory_bytes,
            slots=[[i, f << 12, n << 12, fl] for i, (f, n, fl) in sorted(mem.slots.items())],
            cr0=CR0,
            cr3=self.cpus[0].cr3,
            cr4=self.cpus[0].cr4,
            efer=EFER,
            vcpus=len(self.cpus),
        )
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
        self._fill_stub(stub)

    def _fill_stub(self, stub: dict[int, list[int]]) -> None:
        """Data pages, and in every root the way to the stub pages, beside the tables' own addresses."""
        r, mem = self.r, self.mem
        for g in self.data:
            mem.pages[g] = {0: 0xDA7A0000 + (g << 1), SYSCALL_INDEX: SYSCALL}
        for g in self.roots:
            mem.set(g, 0, r.choice(stub[3]) << 12 | FULL)
            if r.random() < 0.3:
                mem.set(g, self.l4[-1], r.choice(self.roots) << 12 | FULL)  # a self-map, or another's
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
            flags |= r.choice(
                [
                    1 << 45,
                    1 << 51,
                    1 << 40,
                    *([1 << 13, 1 << 20] if flags & PS else []),
                    *([PS, G] if level == 4 else []),
                ]
            )
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
            i1 = r.choice(
                self.any_table() + self.data[:-6]
            )  # through the tables' own addresses, or the same page of a large one
        if r.random() < 0.1:
            i4 = i3 = self.l4[-1]  # through self-maps
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
        if any(g is not None and not self.mem.safe(g, d) for g, d in parts) or any(
            g is None and not va & 0xFF8 for g, _ in parts
        ):
            return self.read(va, cpl)
        if all(g is not None for g, _ in parts):
            for g, d in parts:
                if self.mem.backed(g >> 12):
                    self.mem.put(g, d)
        value = int.from_bytes(data, "little")
        args = dict(expected=value) if kind == "stos" else dict(value=value)
        self.emit(kind, addr=va, size=len(data), cpl=cpl, **args)

    def locked(self, va: int, gpa: int, new: int, cpl: int, size: int = 8) -> None:
        """Brings the qword at gpa to `new`, as far as the instruction can."""
        kind = self.r.choice(["or", "or", "and", "xor", "add", "xchg", "cmpxchg"]) if self.kinds else "or"
        old, mask = self.mem.get(gpa >> 12, gpa >> 3 & 511), (1 << 64) - 1
        operand, result = {
            "or": (new & ~old, new | old),
            "and": (new | ~old & mask, new & old),
            "xor": (old ^ new, new),
            "add": (new - old & mask, new),
            "xchg": (new, new),
            "cmpxchg": (new, new),
        }[kind]
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
        if r.random() < 0.3 and 1 < index < 510:  # misaligned: the end of this entry, the start of the next
            both = image + self.mem.get(gfn, index + 1).to_bytes(8, "little")
            size, shift = r.choice([(8, 4), (8, 1), (8, 7), (4, 6), (2, 7)])
            return self.store((va | at) + shift, both[shift : shift + size], cpl)
        return self.store((va | at) + shift, image[shift : shift + size], cpl)

    def pick_index(self, level: int) -> int:
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
