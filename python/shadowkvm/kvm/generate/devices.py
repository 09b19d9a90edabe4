"""Steps of a random case that reach where no memory is."""

from __future__ import annotations

from shadowkvm.kvm.generate.access import Access
from shadowkvm.kvm.generate.formats import FULL, D, W


class Devices(Access):
    """Devices, by all kinds of instructions."""

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
