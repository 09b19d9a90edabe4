"""The first image of a random case: registers, memslots, tables, data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from shadowkvm.kvm.case import Op, Slot
from shadowkvm.kvm.generate.memory import (
    FULL,
    NX,
    PCD,
    PS,
    PWT,
    READONLY,
    SYSCALL,
    SYSCALL_INDEX,
    A,
    Cpu,
    D,
    G,
    Memory,
    U,
    W,
)
from shadowkvm.kvm.generate.themes import STEPS, THEMES

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


class Image:
    """A guest before its first operation."""

    def __init__(self, seed: int, theme: str | None = None) -> None:
        self.r = r = random.Random(seed)  # noqa: S311 - repeatable is what is wanted
        self.seed, self.theme = seed, theme or list(THEMES)[seed % len(THEMES)]
        weights = {**STEPS, **THEMES[self.theme]}
        self.weights = {
            k: v * 10 ** r.uniform(-0.7, 0.7) * (r.random() > 0.1 or k in THEMES[self.theme])
            for k, v in weights.items()
        }

        def low(top: float) -> float:
            return r.choice([0, top * r.random() ** 2, top * r.random()])

        self.odds = Odds(
            user=r.choice([0, 0.1, 0.5, 0.9]) if self.theme != "user" else r.uniform(0.6, 0.95),
            clear={W: low(0.5), U: low(0.4), A: low(0.4), D: low(0.6)},
            nx=low(0.2),
            reserved=low(0.05),
            absent=r.uniform(0.01, 0.15),
            table=r.uniform(0.05, 0.5),
            device=0.3 if self.theme in ("mmio", "devices") else low(0.15),
            large=r.uniform(0.2, 0.7) if self.theme == "huge" else low(0.3),
            cross_level=low(0.2),
            invlpg=r.choice([0, 0.3, 0.7, 1]),
            partial=low(0.25) if self.theme != "partial" else r.uniform(0.3, 0.7),
            locked=low(0.3),
            identity_user=r.choice([0, 0, 0.3, 1]),
        )
        self.kinds = (
            self.theme in ("instructions", "devices") or r.random() < 0.15
        )  # other instructions than MOV and locked OR
        self.efer_changes = r.random() < (0.7 if self.theme == "control" else 0.2)
        self.memory_bytes = r.choice([8, 8, 16, 32] if self.theme != "quota" else [8]) * MB
        self.huge = (
            r.choice([(0, 2), (2, 4), (2, 6), (0, 8), (4, 6)]) if self.theme == "huge" else None
        )  # MiB in host pages of 2 MiB
        self.mem = Memory()
        self.ops: list[Op] = []
        self.working: list[int] = []
        self.absent: set[int] = set()
        self.vcpu = 0
        self._lay_out()

    # ---- the initial image

    def _lay_out(self) -> None:
        r, mem = self.r, self.mem
        mem.slots[0] = (0, self.memory_bytes >> 12, 0)
        rom = self.theme in ("readonly", "devices")
        if r.random() < 0.5 or rom:
            mem.slots[1] = (64 * MB >> 12, r.choice([16, 64, 512]), READONLY * rom)
        stub = self._choose_frames(full=self.theme == "quota")
        self._choose_indices(full=self.theme == "quota")
        self.cpus = [
            Cpu(r.choice(self.roots) << 12, CR0, 0x20 | (r.random() < 0.15) * SMEP | (r.random() < 0.1) * SMAP, EFER)
            for _ in range(2 if self.theme == "vcpus" or r.random() < 0.25 else 1)
        ]
        for c in self.cpus:
            c.cr3, c.cr4 = (c.cr3 if r.random() < 0.5 else self.cpus[0].cr3), self.cpus[0].cr4
        self._fill(stub)
        self.start: dict[str, Any] = {
            "memory": self.memory_bytes,
            "slots": [Slot(i, f << 12, n << 12, fl) for i, (f, n, fl) in sorted(mem.slots.items())],
            "cr0": CR0,
            "cr3": self.cpus[0].cr3,
            "cr4": self.cpus[0].cr4,
            "efer": EFER,
            "vcpus": len(self.cpus),
        }
        if self.huge:
            self.start["huge"] = (self.huge[0] * MB, self.huge[1] * MB)
        for v, c in enumerate(self.cpus[1:], 1):
            if c.cr3 != self.cpus[0].cr3:
                self.emit("cr3", vcpu=v, addr=c.cr3)
        self.image = {g << 12: dict(e) for g, e in mem.pages.items()}

    def _choose_frames(self, *, full: bool) -> dict[int, list[int]]:
        """Which frames are tables and which are data; those of the way to the stub pages are returned by level."""
        r = self.r
        big = full or self.theme == "roots" or r.random() < 0.2
        roots, ways = r.randint(3, 9), {level: r.randint(1, 2) for level in (3, 2, 1)}
        others = {3: r.randint(1, 5), 2: r.randint(2, 7), 1: r.randint(3, 24 if big or self.theme == "unsync" else 10)}
        if full:  # more tables than the quota of 64 shadow pages
            roots, others = 9, {3: r.randint(5, 8), 2: r.randint(8, 11), 1: r.randint(25, 34)}
        gfns = list(range(0x10, 0x60))
        if r.random() < 0.7:
            r.shuffle(gfns)

        def take(n: int) -> list[int]:
            return [gfns.pop(0) for _ in range(n)]

        self.roots = take(roots)
        stub = {level: take(n) for level, n in ways.items()}
        self.tables = {4: list(self.roots), **{level: stub[level] + take(n) for level, n in others.items()}}
        rom: list[int] = []
        if self.theme in ("readonly", "devices"):
            rom = [(64 * MB >> 12) + i for i in range(6)]
            for g in rom[:4]:
                self.tables[r.choice([1, 1, 2])].append(g)
        for level, pages in [(4, self.roots), *stub.items()]:
            self.mem.stub.update(dict.fromkeys(pages, level))
        self.data = (
            [g for g in gfns if g < 0x60][:6]
            + rom[4:]
            + list(range(0x68, 0x68 + r.choice([4, 12, 24])))
            + [0x200, 0x201, 0x209, 0x3FF, 0x400, 0x410]
        )
        return stub

    def _choose_indices(self, *, full: bool) -> None:
        """Which entries of the tables are used."""
        r = self.r
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
        """An entry as a table of that level may hold it: mostly good."""
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

    def any_table(self) -> list[int]:
        """Every frame that is believed to be a table."""
        return [g for level in self.tables.values() for g in level]

    def emit(self, op: str, **args: int) -> None:
        """One operation, of the vCPU that runs now unless another is named."""
        self.ops.append(Op(op, **{"vcpu": self.vcpu, **args}))
