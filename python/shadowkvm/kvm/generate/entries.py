"""Drawing the values of entries."""

from __future__ import annotations

from typing import Final

from shadowkvm.kvm.generate.cpu import Cpu
from shadowkvm.kvm.generate.formats import FULL, LONG, NX, PAE, PCD, PS, PWT, TWO, A, D, G, P, U, W
from shadowkvm.kvm.generate.image import EXTRA, MB, Image, Space

MMIO_GFNS: Final = [0xFE000 + i for i in range(8)] + [0x3F00, 0x3F01, 0x3F08, 0xFEE00]
FAR_MMIO: Final = (1 << 27) + 5
RESERVED: Final = {LONG: [1 << 45, 1 << 51, 1 << 40], PAE: [1 << 45, 1 << 62, 1 << 40], TWO: [0]}


class Entries(Image):
    """A guest that can draw entries."""

    @property
    def cpu(self) -> Cpu:
        """The vCPU that runs now."""
        return self.cpus[self.vcpu]

    @property
    def working(self) -> list[int]:
        """Addresses that are used again and again, by the code that the vCPU runs."""
        return self._working.setdefault(self.cpu.bits, [])

    def mmio_gfn(self, space: Space) -> int:
        """A frame without memory."""
        return self.r.choice(MMIO_GFNS if space.form is TWO else [*MMIO_GFNS, FAR_MMIO])

    def entry(self, space: Space, level: int) -> int:
        """An entry as a table of that level may hold it: mostly good."""
        r, o, form = self.r, self.odds, space.form
        if r.random() < o.absent:
            return r.choice([0, 0, 0, r.getrandbits(32 if form is TWO else 40) & ~1 & ~0xF000])
        if form.is_pdpt(level):
            return self.pdpte(space)
        flags, target = FULL | r.choice([0, 0, 0, 0, PWT, PCD, 1 << 9, 1 << 11]), 0
        large = level in (2, 3) and r.random() < (o.large if level == 2 else o.large / 8)
        if level == 1:
            target = self.page_target(space) << 12
            flags |= r.choice([0, 0, 0, G])
        elif large:
            flags |= PS | r.choice([0, 0, G, 1 << 12])
            target = self.large_target(space, level)
        elif r.random() < o.cross_level:
            target = r.choice([*space.all(), *(g << 12 for g in self.data[:3]), MMIO_GFNS[0] << 12])
        else:
            target = r.choice(space.tables[level - 1])
        for bit, odds in o.clear.items():
            if r.random() < (odds if level == 1 else odds / 5):
                flags &= ~bit
        if form is not TWO and r.random() < o.nx:
            flags |= NX
        if r.random() < o.reserved:
            more = {LONG: [1 << 13, 1 << 20], PAE: [1 << 13, 1 << 20], TWO: [1 << 17, 1 << 21]}[form]
            flags |= r.choice([*RESERVED[form], *(more if large else []), *([PS, G] if level == 4 else [])])
        return target & ~0xFFF | flags

    def pdpte(self, space: Space) -> int:
        """A PDPTE: presence and address; seldom a reserved bit, which makes CR3 loads fail."""
        r, o = self.r, self.odds
        # Never a frame without memory: the vCPU would shut down.
        target = r.choice(space.tables[2] if r.random() > o.cross_level else space.all()) & ~0xFFF
        flags = P | r.choice([0, 0, 0, PWT, PCD, 1 << 9, 1 << 11])
        if r.random() < o.reserved / 2:
            flags |= r.choice([W, U, A, D, PS, G, NX, 1 << 45])
        return target | flags

    def page_target(self, space: Space) -> int:
        """The frame that a last-level entry maps."""
        r, o, x = self.r, self.odds, self.r.random()
        if x < o.table:
            return r.choice(space.all() if r.random() < 0.8 else self.any_table()) >> 12
        if x < o.table + o.device:
            return self.mmio_gfn(space)
        if x < o.table + o.device + 0.08:
            gpa = r.choice(EXTRA[space.form])[1]
            return (gpa >> 12) + r.randrange(12) if gpa >> 32 == 0 or space.form is not TWO else 64 * MB >> 12
        return r.choice(self.data)

    def large_target(self, space: Space, level: int) -> int:
        """The address that a large entry maps, PSE-36 bits included."""
        r = self.r
        if level == 3:
            return 0
        if space.form is TWO:
            target = r.choice([0, 0, 0x400, 0x400, 0xFE000, 64 * MB >> 12]) << 12
            return target | r.choice([0, 0, 0, 1 << 13, 1 << 13, 3 << 14]) * (target == 0)
        far = [EXTRA[space.form][1][1] >> 12] if space.form is PAE else []
        return r.choice([0, 0x200, 0x400, 0x600, 0xFE000, 64 * MB >> 12, *far]) << 12

    def any_table(self) -> list[int]:
        """Every page that is believed to hold a table, of whatever format."""
        return [t for space in self.spaces for t in space.all()]

    def edited(self, space: Space, level: int, old: int) -> int:
        """A new value for an entry that holds `old`."""
        x = self.r.random()
        if x < 0.35 and old and not space.form.is_pdpt(level):
            bits = [W, W, U, A, D, D, P, W | D, A | D, PCD]
            return old ^ self.r.choice(
                [*bits, PS if level == 2 and self.about == "pse" else U, NX if space.form is not TWO else W]
            )
        if x < 0.45:
            return old
        return 0 if x < 0.55 else self.entry(space, level)

    def where_is(self, gfn: int) -> tuple[Space, int, int] | None:
        """The space, level and address of a table on this page; None: there is none."""
        found = [(s, lv, t) for s in self.spaces for lv, tables in s.tables.items() for t in tables if t >> 12 == gfn]
        return self.r.choice(found) if found else None

    def pick_index(self, space: Space, level: int) -> int:
        """An index of an entry that is in use at this level, if there is one."""
        r, form = self.r, space.form
        i = r.choice(space.indices[level])
        if self.working and r.random() < 0.5:
            i = form.index(r.choice(self.working), level)
        if form.is_pdpt(level):
            return i
        return i if i * form.entry // 8 not in (30, 31) else 1

    def new_value(self, space: Space, level: int, at: int) -> int:
        """What the entry at this address may become; those of the stub pages keep leading there."""
        form = space.form
        old = self.mem.entry(at, form.entry)
        if not self.mem.protected(at):
            return self.edited(space, level, old)
        below = self.mem.on_the_way(form, level - 1)
        if level == 1 or self.r.random() < 0.6:
            return old ^ self.r.choice([0, PWT, PCD, 1 << 9, 1 << 11])
        return form.link(level, self.r.choice(below))
