"""Steps of a random case that concern what the host does to its guest."""

from __future__ import annotations

from shadowkvm.kvm.generate.control import Control
from shadowkvm.kvm.generate.formats import WAYS_BACK, A, D
from shadowkvm.kvm.generate.image import EXTRA, MB, Space
from shadowkvm.kvm.generate.memory import READONLY


class Host(Control):
    """Memslots, dirty logs, host pages."""

    def host_write(self, gpa: int, size: int, value: int) -> None:
        """User space writes a word, if there is a memslot and the stub pages stay reachable."""
        data = value.to_bytes(size, "little")
        if self.mem.backed(gpa >> 12) and self.mem.safe(gpa, data):
            self.mem.put(gpa, data)
            self.emit("hwrite", addr=self.mem.host(gpa >> 12) << 12 | gpa & 0xFFF, value=value, size=size)

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
        gone = [mem.host(g) for g in gone]
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
                mem.pages.setdefault(gfn, {})[i] = v
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
        if slot in mem.moved:
            return
        if slot in mem.slots:
            gpa = mem.slots[slot][0] << 12
            del mem.slots[slot]
            self.emit("slot_del", slot=slot, addr=gpa, value=0)
            return
        if mem.backed(gpa >> 12):
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

    def step_move(self) -> None:
        """A memslot moves, or its flags change."""
        r, mem = self.r, self.mem
        slots = [i for i in mem.slots if i]
        if not slots:
            self.step_slots()
            return
        slot = r.choice(slots)
        first, n, flags = mem.slots[slot]
        used = [(f, m) for i, (f, m, _) in mem.slots.items() if i != slot]
        free = [
            g
            for g in (first + 1, first + 4, first - 1, mem.moved.get(slot, first), 80 * MB >> 12, 112 * MB >> 12)
            if all(g + n <= f or f + m <= g for f, m in used) and g != first
        ]
        mem.moved.setdefault(slot, first)
        if not free:
            return
        mem.slots[slot] = (r.choice(free), n, flags)
        self.emit("slot_move", slot=slot, addr=mem.slots[slot][0] << 12, value=n << 12, flags=flags)

    def step_clear(self) -> None:
        """KVM_CLEAR_DIRTY_LOG of a part of a slot, after or without a look at the log."""
        r, mem = self.r, self.mem
        logged = [i for i, (_, _, flags) in mem.slots.items() if flags & 1]
        if not logged:
            self.step_dirty()
            return
        slot = r.choice(logged)
        n = mem.slots[slot][1]
        if r.random() < 0.5:
            self.emit("dirtylog", slot=slot)
        if not self.start.get("manual_dirty"):
            return
        first = r.randrange(0, max(1, min(n, 1024) // 64)) * 64
        pages = min(n - first, r.choice([64, 64, 128, 1024, n]))
        if (first + pages) % 64 and first + pages != n:
            return
        pattern = r.choice([(1 << 64) - 1, (1 << 64) - 1, 0x5555 << 16 | 0xFF0F, r.getrandbits(64), 0])
        self.emit("cleardirty", slot=slot, addr=first, value=pages, expected=pattern)

    def step_look(self) -> None:
        """The host reads pages: where none are, the zero page is from then on."""
        r, mem = self.r, self.mem
        first, n, _ = mem.slots[r.choice(list(mem.slots))]
        pages = [g for g in [*self.data, *(t >> 12 for t in self.any_table())] if first <= g < first + n]
        gfn = r.choice(pages) if pages and r.random() < 0.7 else first + r.randrange(min(n, 16))
        self.emit("hread", addr=mem.host(gfn) << 12, value=min(r.choice([1, 1, 4, 16]), first + n - gfn) << 12)

    def step_quota(self) -> None:
        """The limit of shadow pages changes."""
        self.emit("quota", value=self.r.choice([64, 64, 70, 80, 100, 200]))
