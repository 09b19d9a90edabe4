"""Seeded random cases for the conformance harness.

    case = generate(seed, ops=500)      # the same seed gives the same case

A guest in 64-bit mode with several roots that share tables, self-maps, aliases, 2M pages; its tables are mapped at
their own addresses, so that it can edit every level. Each case draws its own mix of operations, so that some are full
of unsync tables, some of flooding, MMIO and so on.
"""

from __future__ import annotations

from shadowkvm.kvm.case import Case
from shadowkvm.kvm.generate.image import EXTRA, MMIO_GFNS, PGE, PSE, SMAP, SMEP, WP
from shadowkvm.kvm.generate.memory import FULL, READONLY, SYSCALL, SYSCALL_INDEX, USER, A, D, P, W
from shadowkvm.kvm.generate.themes import THEMES
from shadowkvm.kvm.generate.world import World

__all__ = ["THEMES", "Generator", "generate"]


class Generator(World):
    """The steps that a case is made of."""

    def step_access(self) -> None:
        """A load, a store or an instruction fetch somewhere."""
        r, x = self.r, self.r.random()
        va = self.page_va(write=x >= 0.62)
        if x < 0.5:
            self.read(va | r.choice([0, 8, 16, 0x100, 0xEF8, 3, 0x7F]))
            return
        if x < 0.62:
            cpl = self.user(va)
            hit = self.cpu.walk(self.mem, va)
            if hit and self.mem.get(hit[0] >> 12, SYSCALL_INDEX) & 0xFFFF != SYSCALL:
                self.read(va)
                return
            self.cpu.access(self.mem, va, write=False, user=cpl == 3, fetch=True)
            self.emit("fetch", addr=va | SYSCALL_INDEX * 8, cpl=cpl)
            return
        self.write_through(va)

    def write_through(self, va: int) -> None:
        """A store through this page, with a value that makes sense where it is believed to land."""
        r, cpl = self.r, self.user(va, write=True)
        hit = self.cpu.walk(self.mem, va)
        gfn = hit[0] >> 12 if hit else 0
        level = self.level_of(gfn) if hit else 0
        if level:
            index = self.pick_index(level)
            if index not in (0, 7, 8):
                self.write_entry(va, gfn, index, self.new_value(level, gfn, index), cpl)
                return
        offset, size = r.choice([8, 16, 0x100, 0x808, 0xEF8]), r.choice([1, 2, 4, 8, 8])
        if self.kinds and gfn in self.data and r.random() < 0.1:
            count, filling = r.choice([1, 3, 8, 40]), r.getrandbits(30) << 1
            self.emit("rep", addr=va | 0x200, value=count, expected=filling, cpl=cpl)
            return
        if r.random() < 0.15 and gfn and not level:
            self.locked(va | offset, gfn << 12 | offset, r.getrandbits(30) << 1, cpl)
            return
        self.store(va | offset, (r.getrandbits(30) << 1).to_bytes(8, "little")[:size], cpl)

    def step_edit(self) -> None:
        """One table is changed in a few places, at its own address."""
        r = self.r
        level = r.choices([1, 2, 3, 4], [10, 4, 2, 1])[0]
        gfn = r.choice(self.tables[level])
        index = self.pick_index(level)
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            self.write_entry(
                gfn << 12,
                gfn,
                index,
                self.new_value(level, gfn, index),
                3 if r.random() < self.odds.identity_user * self.odds.user else 0,
            )
            index = min(index + 1, 510) if index not in (6, 7, 29) else 10
        self.after_edit()

    def after_edit(self) -> None:
        """What guests do after an edit, or forget: INVLPG, CR3, an access."""
        r = self.r
        if self.working and r.random() < self.odds.invlpg:
            self.emit("invlpg", addr=r.choice(self.working))
        elif r.random() < 0.15:
            self.emit("cr3", addr=self.cpu.cr3)
        if self.working and r.random() < 0.5:
            va = r.choice(self.working)
            self.read(va | 16) if r.random() < 0.5 else self.write_through(va)

    def step_alias_edit(self) -> None:
        """A table is changed through an alias."""
        va = self.va_of(lambda g: g >= 0x10 and self.level_of(g) > 0)
        if va is not None:
            self.working = [*self.working[-11:], va]
            self.write_through(va)
            if self.r.random() < 0.3:
                self.after_edit()

    def step_flood(self) -> None:
        """A table is written again and again."""
        r = self.r
        level = r.choices([1, 2, 3, 4], [2, 5, 4, 3])[0]
        gfn = r.choice(self.tables[level])
        va = gfn << 12
        if r.random() < 0.4:
            va = self.va_of(lambda g: g == gfn) or va
        for _ in range(r.randint(2, 6)):
            index = self.pick_index(level)
            if va == gfn << 12 or index not in (0, 7, 8):
                self.write_entry(va, gfn, index, self.new_value(level, gfn, index), 0)
            if r.random() < 0.2:
                self.read(self.page_va())

    def step_invlpg(self) -> None:
        """INVLPG of an address, seldom a non-canonical one."""
        va = self.page_va() if self.r.random() < 0.97 else 1 << 47
        self.emit("invlpg", addr=va | self.r.choice([0, 0x10, 0xFFF]))

    def step_cr3(self) -> None:
        """CR3 is loaded: another root or the same; seldom a reserved bit."""
        r = self.r
        if r.random() < 0.02:
            self.emit("cr3", addr=self.cpu.cr3 | 1 << r.choice([40, 45, 51]))
            return
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
        """CR0, CR4 or EFER is loaded."""
        r, c = self.r, self.cpu
        x = r.random()
        if self.efer_changes and x < 0.2:
            c.efer ^= 0x800
            self.emit("efer", value=c.efer)
            return
        if x < 0.5:
            if r.random() < 0.1:
                self.emit("cr0", addr=r.choice([c.cr0 & ~(1 << 31), c.cr0 | 1 << 29, c.cr0 & ~1]))
                return
            c.cr0 ^= r.choice([WP, WP, WP, 0, 1 << 3, 1 << 1])
            self.emit("cr0", addr=c.cr0)
            return
        if r.random() < 0.08:
            self.emit("cr4", addr=r.choice([c.cr4 & ~0x20, c.cr4 | 1 << 12, c.cr4 | 1 << 17, c.cr4 | 1 << 40]))
            return
        c.cr4 ^= r.choice([PGE, PGE, SMEP, SMAP, SMEP | SMAP, PSE, 0])
        self.emit("cr4", addr=c.cr4)

    def step_mmio(self) -> None:
        """Accesses to where no memslot is."""
        r = self.r
        va = self.va_of(lambda g: not self.mem.backed(g))
        if va is None:
            gfn = r.choice(self.tables[1])
            index = self.pick_index(1)
            value = r.choice(MMIO_GFNS) << 12 | FULL & ~r.choice([0, 0, D, W])
            self.write_entry(gfn << 12, gfn, index, value, 0)
            return
        self.working = [*self.working[-11:], va]
        for _ in range(r.randint(1, 4)):
            x = r.random()
            cpl = self.user(va, write=x >= 0.5)
            if self.kinds and r.random() < 0.3:
                self.odd_instruction(va, cpl)
            elif x < 0.5:
                self.read(va | r.choice([0, 8, 0x10, 0x7FC, 0xFFE]), cpl)
            elif x < 0.9:
                self.store(va | r.choice([8, 0x10, 0x7FC]), r.randbytes(r.choice([1, 2, 4, 8])), cpl)
            else:
                self.emit("or", addr=va | 0x20, value=r.getrandbits(20), cpl=cpl)
        if r.random() < 0.3:
            self.after_edit()

    def odd_instruction(self, va: int, cpl: int) -> None:
        """One that is no plain MOV, to where no memory is, or none that can be written."""
        r, value = self.r, self.r.getrandbits(30) << 1
        kinds = ["rep", "rep", "stos", "movnti", "cmpxchg", "xchg", "add", "cross", *(["push"] if cpl else [])]
        kind = r.choice(kinds)
        if kind == "rep":
            self.emit("rep", addr=va | r.choice([0x200, 0xFE8]), value=r.choice([1, 2, 3, 8]), expected=value, cpl=cpl)
        elif kind == "stos":
            self.emit("stos", addr=va | 0x40, expected=value, size=r.choice([4, 8]), cpl=cpl)
        elif kind == "cmpxchg":
            expected = r.choice([0, (1 << 64) - 1, value])
            self.emit("cmpxchg", addr=va | 0x48, value=value, expected=expected, cpl=cpl)
        elif kind == "cross":
            self.emit(r.choice(["read", "write", "or"]), addr=va | 0xFFE, value=0, size=r.choice([4, 8]), cpl=cpl)
        else:
            size = 8 if kind == "push" else r.choice([4, 8])
            self.emit(kind, addr=va | 0x50, value=value, size=size, cpl=cpl)

    def step_scan(self) -> None:
        """Page after page is touched."""
        va = self.page_va()
        write = self.r.random() < 0.3
        for i in range(self.r.randint(4, 20)):
            at = va & ~0x1FF000 | (va + (i << 12)) & 0x1FF000
            self.write_through(at) if write else self.read(at)

    def step_cow(self) -> None:
        """Write protect, flush, write (fault), make writable again, flush, write."""
        r, va = self.r, self.va_of(lambda g: g in self.data)
        hit = None if va is None else self.cpu.walk(self.mem, va)
        if va is None or hit is None:
            return
        cpl = self.user(va, write=True)
        gfn, index = hit[2][-1]
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
            self.cpu.access(self.mem, va, write=False, user=cpl == 3)
            self.emit("read", addr=at, size=size, cpl=cpl)
            return
        cut = va + 4096 - at
        self.store(at, r.randbytes(cut) + self.mem.load(second[0], size - cut), cpl)

    def step_reuse(self) -> None:
        """A table is taken out of use, written as data, and comes back, perhaps at another level."""
        r = self.r
        level = r.choice([1, 1, 2, 3])
        free = [g for g in self.tables[level] if g not in self.mem.stub]
        if not free:
            return
        gfn = r.choice(free)
        if r.random() < 0.6:  # unlink it where it is linked
            for owner in self.tables[level + 1]:
                for i, e in list(self.mem.pages.get(owner, {}).items()):
                    if (
                        e & P
                        and (e & (1 << 40) - 1) >> 12 == gfn
                        and not self.mem.protected(owner, i)
                        and r.random() < 0.8
                    ):
                        self.store(owner << 12 | i * 8, bytes(8), 0)
        for _ in range(r.randint(1, 6)):
            i = r.choice(self.l1)
            self.store(gfn << 12 | i * 8, (r.getrandbits(30) << 1).to_bytes(8, "little")[: r.choice([1, 4, 8, 8])], 0)
        back = r.choice([1, 1, 2, 3])
        self.tables[level].remove(gfn)
        self.tables[back].append(gfn)
        for _ in range(r.randint(1, 4)):
            i = self.pick_index(back)
            self.write_entry(gfn << 12, gfn, i, self.entry(back), 0)
        owner = r.choice(self.tables[back + 1])
        i = self.pick_index(back + 1)
        if not self.mem.protected(owner, i):
            self.write_entry(owner << 12, owner, i, gfn << 12 | FULL, 0)

    def host_write(self, gfn: int, index: int, value: int) -> None:
        """User space writes a qword, if there is a memslot and the stub pages stay reachable."""
        if self.mem.backed(gfn) and self.mem.keeps_stub(gfn, index, value):
            self.mem.set(gfn, index, value)
            self.emit("hwrite", addr=gfn << 12 | index * 8, value=value, size=8)

    def step_host(self) -> None:
        """User space writes into the guest's memory."""
        r = self.r
        if r.random() < 0.6:
            self.host_write(r.choice(self.data), r.choice([1, 2, 40, 64]), r.getrandbits(31) << 1)
            return
        level = r.choice([1, 1, 1, 2, 3, 4])
        gfn = r.choice(self.tables[level])
        index = self.pick_index(level)
        self.host_write(gfn, index, self.new_value(level, gfn, index))

    def step_dirty(self) -> None:
        """Dirty logging is switched, or the log is fetched."""
        r = self.r
        slot = r.choice([0, 0, 0, *self.mem.slots])
        first, n, flags = self.mem.slots[slot]
        if flags & 1 and r.random() < 0.7:
            self.emit("dirtylog", slot=slot)
            return
        if flags & 1 or r.random() < 0.7:
            self.mem.slots[slot] = (first, n, flags ^ 1)
            self.emit("dirty", slot=slot, addr=first << 12, value=n << 12, flags=flags ^ 1)

    def step_unmap(self) -> None:
        """The host takes pages away, and gives some of their content back."""
        r, mem = self.r, self.mem
        n = r.choice([1, 1, 1, 2, 4])
        first = r.choice(
            self.data
            + [g for g in self.any_table() if g not in mem.stub] * 2
            + [g for g, level in mem.stub.items() if level > 1 or r.random() < 0.03]
        )
        gone = [g for g in range(first, first + n) if g not in (7, 8) and mem.backed(g)]
        if r.random() < 0.1 and 1 in mem.slots:
            gone = list(range(mem.slots[1][0], mem.slots[1][0] + mem.slots[1][1]))
        if not gone or gone != list(range(gone[0], gone[0] + len(gone))):
            return
        if self.huge and any(self.huge[0] << 8 <= g < self.huge[1] << 8 for g in gone):
            return  # the host would split its page: another story
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
        """A memslot comes or goes."""
        r, mem = self.r, self.mem
        if r.random() < 0.1:
            first, n, flags = mem.slots[0]
            self.emit("slot_del", slot=0, addr=0, value=0)
            mem.slots[0] = (first, n, r.choice([flags, 0, 1]))
            self.emit("slot_add", slot=0, addr=0, value=n << 12, flags=mem.slots[0][2])
            return
        slot, gpa = r.choice(EXTRA)
        if slot in mem.slots:
            del mem.slots[slot]
            self.emit("slot_del", slot=slot, addr=gpa, value=0)
            return
        mem.slots[slot] = (gpa >> 12, r.choice([1, 4, 16, 64, 512]), r.choice([0, 0, 1, 2]))
        self.emit("slot_add", slot=slot, addr=gpa, value=mem.slots[slot][1] << 12, flags=mem.slots[slot][2])
        if r.random() < 0.5:
            for g in range(gpa >> 12, (gpa >> 12) + min(12, mem.slots[slot][1])):
                self.host_write(g, SYSCALL_INDEX, SYSCALL)

    def step_rom(self) -> None:
        """Reads, stores and edits of what lies in a read-only slot, and the host's own edits of it."""
        r = self.r
        slots = [(first, n) for first, n, flags in self.mem.slots.values() if flags & READONLY]
        if not slots:
            return
        first, n = r.choice(slots)
        va = self.va_of(lambda g: first <= g < first + n)
        if va is None:  # hang one of its pages somewhere
            gfn = r.choice(self.tables[1])
            index = self.pick_index(1)
            target = first + r.randrange(min(n, 12))
            self.write_entry(gfn << 12, gfn, index, target << 12 | FULL & ~r.choice([0, 0, D, A | D]), 0)
            return
        self.working = [*self.working[-11:], va]
        for _ in range(r.randint(1, 3)):
            x = r.random()
            if x < 0.45:
                self.read(va | r.choice([0, 8, 0x100]))
            elif x < 0.6 and self.kinds:
                self.odd_instruction(va, self.user(va, write=True))
            elif x < 0.8:
                self.write_through(va)
            else:
                level = r.choice([1, 1, 2])
                self.host_write(first + r.randrange(min(n, 6)), self.pick_index(level), self.entry(level))
        if r.random() < 0.4:
            self.after_edit()

    def step_quota(self) -> None:
        """The limit of shadow pages changes."""
        self.emit("quota", value=self.r.choice([64, 64, 70, 80, 100, 200]))

    def generate(self, ops: int) -> Case:
        """The case, with that many operations."""
        names = list(self.weights)
        while len(self.ops) < ops:
            if len(self.cpus) > 1 and self.r.random() < 0.25:
                self.vcpu ^= 1
            getattr(self, f"step_{self.r.choices(names, list(self.weights.values()))[0]}")()
        return Case(seed=self.seed, theme=self.theme, **self.start, pages=self.image, ops=self.ops[:ops])


def generate(seed: int, ops: int = 500, theme: str | None = None) -> Case:
    """A random case; the same seed gives the same case.

    Args:
        seed: any number; its remainder chooses the theme.
        ops: number of operations.
        theme: one of `THEMES`, instead of the seed's own.
    """
    return Generator(seed, theme).generate(ops)
