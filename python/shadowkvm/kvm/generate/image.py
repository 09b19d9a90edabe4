"""The first image of a random case: registers, memslots, tables, data."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

from shadowkvm.kvm.case import Op, Slot
from shadowkvm.kvm.generate.cpu import Cpu
from shadowkvm.kvm.generate.formats import (
    CR0_PG,
    CR4_OSFXSR,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_NX,
    FULL,
    LONG,
    PAE,
    TWO,
    WAYS_BACK,
    A,
    D,
    Format,
    U,
    W,
)
from shadowkvm.kvm.generate.memory import READONLY, Memory
from shadowkvm.kvm.generate.themes import STEPS, THEMES

MB: Final = 1 << 20
GB4: Final = 4 << 30
EXTRA: Final = {LONG: [(1, 64 * MB), (2, 96 * MB)], PAE: [(1, 64 * MB), (2, GB4)], TWO: [(1, 64 * MB), (2, GB4)]}
"""Slots beside slot 0, and where: above 4 GiB only PAE and PSE-36 reach them."""
L1_GROUPS: Final = [0, 9, 16, 64, 128, 248, 256, 504]
INDICES: Final = {
    LONG: {4: [0, 1, 2, 255, 256, 511], 3: [0, 1, 2, 3, 511], 2: [0, 1, 2, 3, 4, 8, 511]},
    PAE: {3: [0, 1, 2, 3], 2: [0, 1, 2, 3, 4, 8, 510, 511]},
    TWO: {2: [0, 1, 2, 3, 4, 5, 255, 256, 511, 512, 1022]},
}
FORMS: Final[dict[str, list[list[Format]]]] = {
    "64-bit": [[LONG]],
    "PAE": [[PAE]],
    "two-level": [[TWO]],
    "off": [[PAE, TWO], [PAE], [TWO], [TWO, PAE]],
    "switched": [[LONG, PAE], [PAE, LONG], [PAE, TWO], [TWO, LONG], [LONG, PAE, TWO], [TWO, PAE, LONG]],
}
"""The tables that a guest has; it starts with the first."""
CR0: Final = 0x80010033
START: Final = {LONG: (0x20, 0xD01), PAE: (0x20, 0x800), TWO: (0x10, 0)}
"""CR4 and EFER at the start."""


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


@dataclass
class Space:
    """The tables of one format."""

    form: Format
    roots: list[int] = field(default_factory=list)
    """Values of CR3."""
    tables: dict[int, list[int]] = field(default_factory=dict)
    """By level their addresses; a PDPT is 32 bytes, several may share a page."""
    indices: dict[int, list[int]] = field(default_factory=dict)
    """By level the indices in use."""

    def all(self) -> list[int]:
        """Every table."""
        return [t for level in self.tables.values() for t in level]


class Image:
    """A guest before its first operation."""

    def __init__(self, seed: int, theme: str) -> None:
        self.r = r = random.Random(seed)  # noqa: S311 - repeatable is what is wanted
        self.seed, self.name = seed, theme
        self.theme = THEMES[theme]
        self.about, chosen = self.theme.about, self.theme.weights
        self.guest = r.choice(self.theme.guests)
        self.weights = {
            k: v * 10 ** r.uniform(-0.7, 0.7) * (r.random() > 0.1 or k in chosen)
            for k, v in {**STEPS, **chosen}.items()
        }
        self.odds = self._odds()
        # Other instructions than MOV and locked OR.
        self.kinds = self.about in ("instructions", "devices", "code") or r.random() < 0.15
        self.efer_changes = r.random() < (0.7 if self.about in ("control", "nx") else 0.2)
        self.memory_bytes = r.choice([8, 8, 16, 32] if self.about != "quota" else [8]) * MB
        # MiB in host pages of 2 MiB
        self.huge = r.choice([(0, 2), (2, 4), (2, 6), (0, 8), (4, 6)]) if self.about == "huge" else None
        self.mem = Memory()
        self.ops: list[Op] = []
        self._working: dict[int, list[int]] = {}
        self.vcpu = 0
        self.cpus: list[Cpu] = []
        self.data: list[int] = []
        self._lay_out()

    def _odds(self) -> Odds:
        r, about = self.r, self.about

        def low(top: float) -> float:
            return r.choice([0, top * r.random() ** 2, top * r.random()])

        return Odds(
            user=r.choice([0, 0.1, 0.5, 0.9]) if about != "user" else r.uniform(0.6, 0.95),
            clear={W: low(0.5), U: low(0.4), A: low(0.4), D: low(0.6)},
            nx=low(0.2) if about != "nx" else r.uniform(0.1, 0.4),
            reserved=low(0.05),
            absent=r.uniform(0.01, 0.15),
            table=r.uniform(0.05, 0.5),
            device=0.3 if about in ("mmio", "devices") else low(0.15),
            large=r.uniform(0.2, 0.7) if about in ("huge", "pse") else low(0.3),
            cross_level=low(0.2),
            invlpg=r.choice([0, 0.3, 0.7, 1]),
            partial=low(0.25) if about != "partial" else r.uniform(0.3, 0.7),
            locked=low(0.3),
            identity_user=r.choice([0, 0, 0.3, 1]),
        )

    # ---- the initial image

    def _lay_out(self) -> None:
        r, mem = self.r, self.mem
        mem.slots[0] = (0, self.memory_bytes >> 12, 0)
        self.spaces = [Space(form) for form in r.choice(FORMS[self.guest])]
        if r.random() < 0.5 or self.has_rom:
            mem.slots[1] = (64 * MB >> 12, r.choice([16, 64, 512]), READONLY * self.has_rom)
        if self.spaces[0].form is not LONG and r.random() < 0.4:
            mem.slots[2] = (GB4 >> 12, r.choice([64, 512, 1024]), 0)
        self.ways = sorted({s.form.bits for s in self.spaces})
        gfns = list(range(0x10, 0x60))
        if r.random() < 0.7:
            r.shuffle(gfns)
        self._choose_frames(gfns)
        for space in self.spaces:
            self._choose_indices(space)
        self._start_registers()
        for space in self.spaces:
            self._fill(space)
        self._fill_data()
        for c in self.cpus:
            if c.form is PAE:
                self.mend_pdpt(c.cr3)
                c.load_pdptes(mem)
        self.image = {g << 12: dict(e) for g, e in mem.pages.items()}

    def mend_pdpt(self, cr3: int) -> list[int]:
        """Clears the PDPTEs there that no CPU loads; the addresses of those that were."""
        entries = [(cr3 & 0xFFFFFFE0) + 8 * i for i in range(4)]
        bad = [at for at in entries if PAE.refuses_pdpte(self.mem.entry(at, 8))]
        for at in bad:
            self.mem.set_entry(at, 8, 0)
        return bad

    @property
    def has_rom(self) -> bool:
        """Is slot 1 read-only?"""
        return self.about in ("readonly", "devices")

    def _start_registers(self) -> None:
        r, form = self.r, self.spaces[0].form
        cr4, efer = START[form]
        cr4 |= (r.random() < 0.15) * CR4_SMEP | (r.random() < 0.1) * CR4_SMAP | CR4_OSFXSR * self.kinds
        cr4 ^= CR4_PSE * (form is TWO and r.random() < 0.25)
        efer ^= EFER_NX * (form is not LONG and r.random() < 0.3)
        cr0 = CR0 & ~(CR0_PG if self.guest == "off" and r.random() < 0.6 else 0)
        roots = self.spaces[0].roots
        n = 2 if self.about == "vcpus" or r.random() < 0.25 else 1
        if self.theme.vcpus:
            n = r.choice([self.theme.vcpus, self.theme.vcpus, self.theme.vcpus + 1])
        self.cpus = [Cpu(r.choice(roots), cr0, cr4, efer) for _ in range(n)]
        first = self.cpus[0]
        self.start: dict[str, Any] = {
            "memory": self.memory_bytes,
            "slots": [Slot(i, f << 12, n << 12, fl) for i, (f, n, fl) in sorted(self.mem.slots.items())],
            "cr0": first.cr0,
            "cr3": first.cr3,
            "cr4": first.cr4,
            "efer": first.efer,
            "vcpus": n,
        }
        if self.about in ("clear", "memory"):
            self.start["manual_dirty"] = r.choice([1, 1, 3])
        if self.huge:
            self.start["huge"] = (self.huge[0] * MB, self.huge[1] * MB)
        for v, c in enumerate(self.cpus[1:], 1):
            c.cr3 = c.cr3 if r.random() < 0.5 else first.cr3
            if c.cr3 != first.cr3:
                self.emit("cr3", vcpu=v, addr=c.cr3)

    def _choose_frames(self, gfns: list[int]) -> None:
        """Which frames are tables and which are data."""
        r, full = self.r, self.about == "quota"
        many = full or self.about in ("roots", "unsync") or r.random() < 0.2

        def take(n: int) -> list[int]:
            return [gfns.pop(0) << 12 for _ in range(min(n, len(gfns)))]

        shared: dict[tuple[int, int], list[int]] = {}
        for space in self.spaces:
            form = space.form
            for level in form.levels:
                if level < form.top and (form.entry, level) in shared and level <= 2:
                    space.tables[level] = shared[form.entry, level]  # PAE and 64-bit guests can use each other's
                elif form.is_pdpt(level):
                    pages = take(r.randint(1, 3))
                    both = sorted(
                        {r.choice(pages) + 32 * r.choice([0, 0, 0, 1, 2, 5, 127]) for _ in range(r.randint(3, 9))}
                    )
                    space.tables[level] = both
                elif level == form.top:
                    space.tables[level] = take(9 if full else r.randint(3, 9))
                else:
                    few, most = {3: (2, 5), 2: (3, 8), 1: (4, 22 if many else 11)}[level]
                    few, most = {3: (6, 9), 2: (9, 12), 1: (25, 30)}[level] if full else (few, most)
                    space.tables[level] = take(max(2, r.randint(few, most) // len(self.spaces)))
                shared.setdefault((form.entry, level), space.tables[level])
                for table in space.tables[level] if level == form.top else space.tables[level][: r.randint(1, 2)]:
                    self.mem.guard(form, level, table)
            space.roots = list(space.tables[form.top])
        rom: list[int] = []
        if self.has_rom:
            rom = [(64 * MB >> 12) + i for i in range(6)]
            for g in rom[:4]:
                self.spaces[0].tables[r.choice([1, 1, 2])].append(g << 12)
        self.data = gfns[:6] + rom[4:] + list(range(0x68, 0x68 + r.choice([4, 12, 24])))
        self.data += [0x200, 0x201, 0x209, 0x3FF, 0x400, 0x410]

    def _choose_indices(self, space: Space) -> None:
        """Which entries of the tables are used."""
        r, form, full = self.r, space.form, self.about == "quota"
        for level, some in INDICES[form].items():
            space.indices[level] = sorted({0, *r.sample(some, len(some) if full else r.randint(2, len(some)))})
        wide, taken = form.entries(1) // 512, (24 * 8 // form.entry, 32 * 8 // form.entry)
        groups = [g * r.choice([1, wide]) for g in r.sample(L1_GROUPS, r.randint(2, 5))]
        low = {g + i for g in groups for i in range(r.choice([3, 7, 9]))}
        space.indices[1] = sorted({i for i in low if i < 512 * wide and not taken[0] <= i < taken[1]} | {1, 2})

    def _fill(self, space: Space) -> None:
        r, mem, form = self.r, self.mem, space.form
        dense = r.uniform(0.5, 1)
        for level in form.levels:
            for table in space.tables[level]:
                for i in space.indices[level]:
                    at = table + i * form.entry
                    if r.random() < dense and not mem.protected(at):
                        mem.set_entry(at, form.entry, self.entry(space, level))
                if not form.is_pdpt(level):
                    self.put_ways_back(table >> 12)
        for level in form.levels[:-1]:
            for table in mem.on_the_way(form, level):
                mem.set_entry(table, form.entry, form.link(level, r.choice(mem.on_the_way(form, level - 1))))
                last = max(space.indices[level])
                if (
                    level == form.top
                    and level < 4 + (form is LONG)
                    and r.random() < 0.3
                    and last
                    and not form.is_pdpt(level)
                ):
                    # a self-map, or another's
                    mem.set_entry(table + last * form.entry, form.entry, r.choice(space.roots) | FULL)
        for table in mem.on_the_way(form, 1):
            self._fill_identity(form, table)

    def _fill_identity(self, form: Format, table: int) -> None:
        """A last-level table on the way to the stubs: the tables at their own addresses, too."""
        r, mem, n = self.r, self.mem, form.entry
        mem.set_entry(table + 7 * n, n, 7 << 12 | FULL & ~U)
        mem.set_entry(table + 8 * n, n, 8 << 12 | FULL)
        for t in range(0x10, 0x100):
            if r.random() < 0.97:
                mem.set_entry(table + t * n, n, t << 12 | FULL & ~(U if r.random() >= self.odds.identity_user else 0))
        self.put_ways_back(table >> 12)

    def _fill_data(self) -> None:
        for g in self.data:
            self.mem.pages[g] = {0: 0xDA7A0000 + (g << 1)}
            self.put_ways_back(g)

    def put_ways_back(self, gfn: int) -> None:
        """A target for instruction fetches on this page, one for each mode that the guest runs in."""
        for bits in self.ways:
            self.mem.set(gfn, *WAYS_BACK[bits])

    def emit(self, op: str, **args: int) -> None:
        """One operation, of the vCPU that runs now unless another is named."""
        self.ops.append(Op(op, **{"vcpu": self.vcpu, **args}))

    def entry(self, space: Space, level: int) -> int:
        """An entry as a table of that level may hold it."""
        raise NotImplementedError
