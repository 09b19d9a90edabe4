"""Steps of a random case in which the guest reads, writes, jumps and edits its tables."""

from __future__ import annotations

from shadowkvm.kvm.generate.formats import FULL, WAYS_BACK, A, D, P, W
from shadowkvm.kvm.generate.image import Space
from shadowkvm.kvm.generate.memory import USER
from shadowkvm.kvm.generate.world import World


class Access(World):
    """What a guest does all day."""

    def step_access(self) -> None:
        """A load, a store or an instruction fetch somewhere."""
        r, x = self.r, self.r.random()
        va = self.page_va(write=x >= 0.62)
        if x < 0.5:
            self.read(va | r.choice([0, 8, 16, 0x100, 0xEF8, 3, 0x7F]))
        elif x < 0.62:
            self.fetch(va)
        else:
            self.write_through(va)

    def fetch(self, va: int) -> None:
        """A jump to this page, if there is something to run."""
        cpl, hit = self.user(va), self.walk(va)
        index, way = WAYS_BACK[self.cpu.bits]
        if hit and self.mem.get(hit.gfn, index) & 0xFFFF != way:
            self.read(va)
            return
        self.cpu.access(self.mem, va, write=False, user=cpl == 3, fetch=True)
        self.emit("fetch", addr=va | index * 8, cpl=cpl)

    def write_through(self, va: int) -> None:
        """A store through this page, with a value that makes sense where it is believed to land."""
        r, cpl, hit = self.r, self.user(va, write=True), self.walk(va)
        found = self.where_is(hit.gfn) if hit else None
        if found:
            space, level, table = found
            index = self.pick_index(space, level)
            at = table + index * space.form.entry
            if index not in (0, 7, 8):
                self.write_entry(va & ~0xFFF | at & 0xFFF, at, space.form.entry, self.new_value(space, level, at), cpl)
                return
        size = r.choice([1, 2, 4, self.word, self.word])
        offset = r.choice([8, 16, 0x100, 0x808, 0xEF8])
        filling = r.getrandbits(30) << 1
        if self.kinds and hit and hit.gfn in self.data and r.random() < 0.1:
            self.emit("rep", addr=va | 0x200, value=r.choice([1, 3, 8, 40]), expected=filling, size=self.word, cpl=cpl)
        elif r.random() < 0.15 and hit and not found:
            self.locked(va | offset, hit.gpa & ~0xFFF | offset, filling, cpl, self.word)
        elif self.kinds and hit and not found and r.random() < 0.1:
            self.write_oddly(va | offset, hit.gpa & ~0xFFF | offset, filling.to_bytes(self.word, "little"), cpl)
        else:
            self.store(va | offset, filling.to_bytes(8, "little")[:size], cpl)

    def step_edit(self) -> None:
        """One table is changed in a few places, at its own address."""
        r = self.r
        space = r.choice(self.spaces) if self.cpu.form is None or r.random() < 0.1 else self.space
        weights = {4: 1, 3: 2, 2: 4, 1: 10}
        level = r.choices(list(space.tables), [weights[lv] for lv in space.tables])[0]
        table, index = r.choice(space.tables[level]), self.pick_index(space, level)
        cpl = 3 if r.random() < self.odds.identity_user * self.odds.user else 0
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            at = table + index * space.form.entry
            self.write_entry(at, at, space.form.entry, self.new_value(space, level, at), cpl)
            index = self.next_index(space.form.entries(level), space.form.entry, index)
        self.after_edit()

    @staticmethod
    def next_index(entries: int, size: int, index: int) -> int:
        """The next entry, but none of the stub pages', of the jump targets or of the end."""
        index = min(index + 1, entries - 2) if entries > 4 else (index + 1) % 4
        return 10 if index in (7, 8) or index * size // 8 in (30, 31) else index

    def after_edit(self) -> None:
        """What guests do after an edit, or forget: INVLPG, CR3, an access."""
        r = self.r
        if self.working and r.random() < self.odds.invlpg:
            self.emit("invlpg", addr=r.choice(self.working))
        elif r.random() < 0.15:
            self.set_cr3(self.cpu.cr3)
        if self.working and r.random() < 0.5:
            va = r.choice(self.working)
            self.read(va | 16) if r.random() < 0.5 else self.write_through(va)

    def step_alias_edit(self) -> None:
        """A table is changed through an alias."""
        va = self.va_of(lambda g: g >= 0x10 and self.where_is(g) is not None)
        if va is not None:
            self.remember(va)
            self.write_through(va)
            if self.r.random() < 0.3:
                self.after_edit()

    def step_flood(self) -> None:
        """A table is written again and again."""
        r, space = self.r, self.space
        weights = {4: 3, 3: 4, 2: 5, 1: 2}
        level = r.choices(list(space.tables), [weights[lv] for lv in space.tables])[0]
        table = r.choice(space.tables[level])
        page = table & ~0xFFF
        if r.random() < 0.4:
            page = self.va_of(lambda g: g == table >> 12) or page
        for _ in range(r.randint(2, 6)):
            index = self.pick_index(space, level)
            at = table + index * space.form.entry
            if page == table & ~0xFFF or index not in (0, 7, 8):
                self.write_entry(page | at & 0xFFF, at, space.form.entry, self.new_value(space, level, at), 0)
            if r.random() < 0.2:
                self.read(self.page_va())

    def step_scan(self) -> None:
        """Page after page is touched."""
        va, write = self.page_va(), self.r.random() < 0.3
        span = (1 << (21 if self.word == 8 else 22)) - 0x1000
        for i in range(self.r.randint(4, 20)):
            at = va & ~span | (va + (i << 12)) & span
            self.write_through(at) if write else self.read(at)

    def step_cow(self) -> None:
        """Write protect, flush, write (fault), make writable again, flush, write."""
        r, va = self.r, self.va_of(lambda g: g in self.data)
        hit, form = None if va is None else self.walk(va), self.cpu.form
        if va is None or hit is None or form is None:
            return
        cpl, at = self.user(va, write=True), hit.path[-1]
        old = self.mem.entry(at, form.entry)
        for value in (old & ~W, old | W | r.choice([0, D, A | D])):
            self.write_entry(at, at, form.entry, value, 0)
            if r.random() < 0.8:
                self.emit("invlpg", addr=va)
            self.store(va | 0x108, r.randbytes(self.word - 1) + b"\0", cpl)

    def step_cross(self) -> None:
        """An access over a page's end; a store leaves the start of the second page as it is."""
        r, va = self.r, self.page_va()
        if va >> 12 & 1023 == 1023 or (va >> 12 & 511 == 511 and self.word == 8):
            return
        cpl, size = self.user(va), r.choice([2, 4, self.word])
        at = va + 4096 - r.randint(1, size - 1)
        second = self.walk(va + 4096)
        if r.random() < 0.4 or second is None:
            self.cpu.access(self.mem, va, write=False, user=cpl == 3)
            self.emit("read", addr=at, size=size, cpl=cpl)
            return
        if self.kinds and r.random() < 0.3:
            size, at = 16, va + 4096 - 8 * r.choice([1, 1, 2]) + r.choice([0, 4])
        cut = max(0, va + 4096 - at)
        data = (
            r.randbytes(cut) + self.mem.load(second.gpa, size - cut)
            if cut
            else self.mem.load(second.gpa + at - va - 4096, size)
        )
        self.store(at, data, cpl, "movups" if size == 16 else "write")

    def step_reuse(self) -> None:
        """A table is taken out of use, written as data, and comes back, perhaps at another level."""
        r, space = self.r, self.space
        form, n = space.form, space.form.entry
        lower = [lv for lv in form.levels if lv < form.top]
        level = r.choice([1, 1, *lower])
        free = [t for t in space.tables[level] if not self.mem.is_stub_table(t >> 12)]
        if not free:
            return
        table = r.choice(free)
        if r.random() < 0.6:  # unlink it where it is linked
            for owner in space.tables[level + 1]:
                self.unlink(space, level + 1, owner, table)
        for _ in range(r.randint(1, 6)):
            i = r.choice(space.indices[1]) * n
            size = r.choice([1, 4, self.word, self.word])
            self.store(table + i, (r.getrandbits(30) << 1).to_bytes(8, "little")[:size], 0)
        back = r.choice([1, 1, *lower])
        space.tables[level].remove(table)
        space.tables[back].append(table)
        for _ in range(r.randint(1, 4)):
            at = table + self.pick_index(space, back) * n
            self.write_entry(at, at, n, self.entry(space, back), 0)
        owner = r.choice(space.tables[back + 1])
        at = owner + self.pick_index(space, back + 1) * n
        if not self.mem.protected(at):
            self.write_entry(at, at, n, table | (P if form.is_pdpt(back + 1) else FULL), 0)

    def unlink(self, space: Space, level: int, owner: int, table: int) -> None:
        """Most of the entries of a table that lead to another are cleared."""
        n = space.form.entry
        for i in range(space.form.entries(level)):
            at = owner + i * n
            entry = self.mem.entry(at, n)
            leads = entry & P and space.form.page(1, entry, 0) == table
            if leads and not self.mem.protected(at) and self.r.random() < 0.8:
                self.store(at, bytes(n), 0)

    def step_tour(self) -> None:
        """Many addresses in turn under several roots, to use up the page quota."""
        roots = self.space.roots
        for root in self.r.sample(roots, min(len(roots), self.r.randint(1, 3))):
            self.set_cr3(root)
            for _ in range(self.r.randint(3, 8)):
                va = self.va_of(lambda g: g > USER)
                if va is not None:
                    self.read(va) if self.r.random() < 0.7 else self.write_through(va)
