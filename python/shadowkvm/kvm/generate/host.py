"""Steps of a random case that concern devices and what the host does to its guest."""

from __future__ import annotations

from shadowkvm.kvm.generate.control import Control
from shadowkvm.kvm.generate.formats import FULL, WAYS_BACK, A, D, W
from shadowkvm.kvm.generate.image import EXTRA, Space
from shadowkvm.kvm.generate.memory import READONLY


class Host(Control):
    """Devices, memslots, dirty logs, host pages."""

    def hang(self, target: int, *without: int) -> None:
        """Some last-level entry gets this frame."""
        r, space = self.r, self.space
        table = r.choice(space.tables[1])
        at = table + self.pick_index(space, 1) * space.form.entry
        if self.mem.protected(at):
            return
        value = target << 12 | FULL & ~r.choice([0, 0, *without])
        if space.form.entry == 8 or target < 1 << 20:
            self.write_entry(at, at, space.form.entry, value, 0)

    def step_mmio(self) -> None:
        """Accesses to where no memslot is."""
        r = self.r
        va = self.va_of(lambda g: not self.mem.backed(g))
        if va is None:
            self.hang(self.mmio_gfn(self.space), D, W)
            return
        self.remember(va)
        for _ in range(r.randint(1, 4)):
            x = r.random()
            cpl = self.user(va, write=x >= 0.5)
            if self.kinds and r.random() < 0.3:
                self.odd_instruction(va, cpl)
            elif x < 0.5:
                self.read(va | r.choice([0, 8, 0x10, 0x7FC, 0xFFE]), cpl)
            elif x < 0.9:
                size = r.choice([1, 2, 4, self.word])
                self.store(va | r.choice([8, 0x10, 0x7FC]), r.randbytes(size), cpl)
            else:
                self.emit("or", addr=va | 0x20, value=r.getrandbits(20), cpl=cpl, size=self.word)
        if r.random() < 0.3:
            self.after_edit()

    def odd_instruction(self, va: int, cpl: int) -> None:
        """One that is no plain MOV, to where no memory is, or none that can be written."""
        r, value, word = self.r, self.r.getrandbits(30) << 1, self.word
        size = r.choice([4, word])
        kinds = ["rep", "rep", "stos", "movnti", "cmpxchg", "xchg", "add", "cross", "xadd", "inc", "movups", "movs"]
        kind = r.choice([*kinds, *(["push"] if cpl else [])])
        if kind == "rep":
            at = va | r.choice([0x200, 0xFE8])
            self.emit("rep", addr=at, value=r.choice([1, 2, 3, 8]), expected=value, size=word, cpl=cpl)
        elif kind == "movs":
            source = r.choice(self.any_table()) & ~0xFFF | 0x100
            self.emit("movs", addr=va | 0x200, value=r.choice([1, 2]), expected=source, size=word, cpl=cpl)
        elif kind == "stos":
            self.emit("stos", addr=va | 0x40, expected=value, size=size, cpl=cpl)
        elif kind == "cmpxchg":
            expected = r.choice([0, (1 << 8 * size) - 1, value])
            self.emit("cmpxchg", addr=va | 0x48, value=value, expected=expected, cpl=cpl, size=size)
        elif kind == "cross":
            if self.fits(va | 0xFFE, size):
                self.emit(r.choice(["read", "write", "or"]), addr=va | 0xFFE, value=0, size=size, cpl=cpl)
        elif kind == "movups":
            self.emit(kind, addr=va | 0x60, value=value, expected=1, size=16, cpl=cpl)
        else:
            self.emit(kind, addr=va | 0x50, value=value, size=word if kind == "push" else size, cpl=cpl)

    # ---- the host

    def host_write(self, gpa: int, size: int, value: int) -> None:
        """User space writes a word, if there is a memslot and the stub pages stay reachable."""
        data = value.to_bytes(size, "little")
        if self.mem.backed(gpa >> 12) and self.mem.safe(gpa, data):
            self.mem.put(gpa, data)
            self.emit("hwrite", addr=gpa, value=value, size=size)

    def host_edit(self, space: Space, level: int, table: int) -> None:
        """User space edits an entry."""
        at = table + self.pick_index(space, level) * space.form.entry
        self.host_write(at, space.form.entry, self.new_value(space, level, at))

    def step_host(self) -> None:
        """User space writes into the guest's memory."""
        r, space = self.r, self.space
        if r.random() < 0.6:
            self.host_write(r.choice(self.data) << 12 | 8 * r.choice([1, 2, 40, 64]), 8, r.getrandbits(31) << 1)
            return
        level = r.choice([1, 1, 1, *space.tables])
        self.host_edit(space, level, r.choice(space.tables[level]))

    def step_dirty(self) -> None:
        """Dirty logging is switched, or the log is fetched."""
        r = self.r
        slot = r.choice([0, 0, 0, *self.mem.slots])
        first, n, flags = self.mem.slots[slot]
        if flags & 1 and r.random() < 0.7:
            self.emit("dirtylog", slot=slot)
        elif flags & 1 or r.random() < 0.7:
            self.mem.slots[slot] = (first, n, flags ^ 1)
            self.emit("dirty", slot=slot, addr=first << 12, value=n << 12, flags=flags ^ 1)

    def step_unmap(self) -> None:
        """The host takes pages away, and gives some of their content back."""
        r, mem = self.r, self.mem
        n = r.choice([1, 1, 1, 2, 4])
        tables = [t >> 12 for t in self.any_table()]
        free = [g for g in tables if not mem.is_stub_table(g)]
        stub = [g for g in tables if mem.is_stub_table(g) and r.random() < 0.2]
        first = r.choice(self.data + free * 2 + stub)
        gone = [g for g in range(first, first + n) if g not in (7, 8) and mem.backed(g)]
        if r.random() < 0.1 and 1 in mem.slots:
            gone = list(range(mem.slots[1][0], mem.slots[1][0] + mem.slots[1][1]))
        if not gone or gone != list(range(gone[0], gone[0] + len(gone))):
            return
        if self.huge and any(self.huge[0] << 8 <= g < self.huge[1] << 8 for g in gone):
            return  # the host would split its page: another story
        self.emit("unmap", addr=gone[0] << 12, value=len(gone) << 12)
        for g in gone:
            self.give_back(g)

    def give_back(self, gfn: int) -> None:
        """After its page went, the host writes some of its content anew; tables of the stub pages get all."""
        r, mem = self.r, self.mem
        old = mem.pages.pop(gfn, {})
        keep = mem.is_stub_table(gfn)
        if len(old) > 40 and not keep:
            old = {i: old[i] for i in r.sample(sorted(old), 12)}
        keep = keep or r.random() < 0.5
        ways = [WAYS_BACK[bits][0] for bits in self.ways]
        for i, v in old.items():
            if keep or r.random() < 0.3 or (i in ways and r.random() < 0.7):
                mem.set(gfn, i, v)
                self.emit("hwrite", addr=gfn << 12 | i * 8, value=v, size=8)

    def step_slots(self) -> None:
        """A memslot comes or goes."""
        r, mem = self.r, self.mem
        if r.random() < 0.1:
            first, n, flags = mem.slots[0]
            self.emit("slot_del", slot=0, addr=0, value=0)
            mem.slots[0] = (first, n, r.choice([flags, 0, 1]))
            self.emit("slot_add", slot=0, addr=0, value=n << 12, flags=mem.slots[0][2])
            return
        slot, gpa = r.choice(EXTRA[self.spaces[0].form])
        if slot in mem.slots:
            del mem.slots[slot]
            self.emit("slot_del", slot=slot, addr=gpa, value=0)
            return
        mem.slots[slot] = (gpa >> 12, r.choice([1, 4, 16, 64, 512]), r.choice([0, 0, 1, 2]))
        self.emit("slot_add", slot=slot, addr=gpa, value=mem.slots[slot][1] << 12, flags=mem.slots[slot][2])
        if r.random() < 0.5:
            for g in range(gpa >> 12, (gpa >> 12) + min(12, mem.slots[slot][1])):
                for bits in self.ways:
                    index, way = WAYS_BACK[bits]
                    self.host_write(g << 12 | index * 8, 8, way)

    def step_rom(self) -> None:
        """Reads, stores and edits of what lies in a read-only slot, and the host's own edits of it."""
        r = self.r
        slots = [(first, n) for first, n, flags in self.mem.slots.values() if flags & READONLY]
        if not slots:
            return
        first, n = r.choice(slots)
        va = self.va_of(lambda g: first <= g < first + n)
        if va is None:  # hang one of its pages somewhere
            self.hang(first + r.randrange(min(n, 12)), D, A | D)
            return
        self.remember(va)
        for _ in range(r.randint(1, 3)):
            x = r.random()
            if x < 0.45:
                self.read(va | r.choice([0, 8, 0x100]))
            elif x < 0.6 and self.kinds:
                self.odd_instruction(va, self.user(va, write=True))
            elif x < 0.8:
                self.write_through(va)
            else:
                self.host_edit(self.space, r.choice([1, 1, 2]), (first + r.randrange(min(n, 6))) << 12)
        if r.random() < 0.4:
            self.after_edit()

    def step_quota(self) -> None:
        """The limit of shadow pages changes."""
        self.emit("quota", value=self.r.choice([64, 64, 70, 80, 100, 200]))
