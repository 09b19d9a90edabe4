"""The guest of a random case at work: the values it writes, and how its accesses are written down."""

from __future__ import annotations

from collections.abc import Callable

from shadowkvm.kvm.generate.image import Image
from shadowkvm.kvm.generate.memory import FULL, NX, PCD, PWT, SYSCALL_INDEX, A, Cpu, D, P, U, W, compose


class World(Image):
    """A guest and what it believes of itself."""

    def edited(self, level: int, old: int) -> int:
        """A new value for an entry that holds `old`."""
        x = self.r.random()
        if x < 0.35 and old:
            return old ^ self.r.choice([W, W, U, A, D, D, NX, P, W | D, A | D, PCD])
        if x < 0.45:
            return old
        return 0 if x < 0.55 else self.entry(level)

    def level_of(self, gfn: int) -> int:
        """The level of a table, 0 for none."""
        levels = [lv for lv, pages in self.tables.items() if gfn in pages]
        return self.r.choice(levels) if levels else 0

    @property
    def cpu(self) -> Cpu:
        """The vCPU that runs now."""
        return self.cpus[self.vcpu]

    def fresh_va(self) -> int:
        """An address that the tables may lead somewhere."""
        r = self.r
        i4, i3, i2, i1 = (r.choice(x) for x in (self.l4, self.l3, self.l2, self.l1))
        if r.random() < 0.3:
            i1 = r.choice(
                self.any_table() + self.data[:-6]
            )  # through the tables' own addresses, or the same page of a large one
        if r.random() < 0.1:
            i4 = i3 = self.l4[-1]  # through self-maps
        return compose(i4, i3, i2, i1)

    def page_va(self, *, write: bool = False) -> int:
        """A page's address, mostly one that may be used this way."""
        r = self.r
        va = r.choice(self.working) if self.working and r.random() < 0.5 else self.fresh_va()
        for _ in range(r.choice([0, 10, 40, 40])):
            hit = self.cpu.walk(self.mem, va)
            if hit and any(self.cpu.allows(hit[1], write=write, user=user) for user in (False, True)):
                break
            va = self.fresh_va()
        if va not in self.working:
            self.working = [*self.working[-11:], va]
        return va

    def va_of(self, wanted: Callable[[int], bool], tries: int = 40) -> int | None:
        """The address of a page that leads to a gfn that is wanted."""
        for _ in range(tries):
            va = self.r.choice(self.working) if self.working and self.r.random() < 0.2 else self.fresh_va()
            hit = self.cpu.walk(self.mem, va)
            if hit and wanted(hit[0] >> 12):
                return va
        return None

    # ---- emitting operations

    def user(self, va: int, *, write: bool = False) -> int:
        """The CPL of an access to that page: mostly one that may."""
        user, hit = self.r.random() < self.odds.user, self.cpu.walk(self.mem, va)
        if hit and self.r.random() < 0.85 and not self.cpu.allows(hit[1], write=write, user=user):
            user = not user
        return 3 * user

    def read(self, va: int, cpl: int | None = None) -> None:
        """A load."""
        size = self.r.choice([1, 2, 4, 8, 8, 8])
        cpl = self.user(va) if cpl is None else cpl
        self.cpu.access(self.mem, va, write=False, user=cpl == 3)
        self.emit("read", addr=va, size=size, cpl=cpl)

    def store(self, va: int, data: bytes, cpl: int, kind: str = "write") -> None:
        """A store of these bytes, if it cannot hurt the stub pages (by what is believed of memory)."""
        gpa = self.cpu.access(self.mem, va, write=True, user=cpl == 3)
        parts = [(gpa, data)]
        if va % 4096 + len(data) > 4096:
            cut = 4096 - va % 4096
            parts = [(gpa, data[:cut]), (self.cpu.access(self.mem, va + cut, write=True, user=cpl == 3), data[cut:])]
        if any(g is not None and not self.mem.safe(g, d) for g, d in parts) or any(
            g is None and not va & 0xFF8 for g, _ in parts
        ):
            self.read(va, cpl)
            return
        if all(g is not None for g, _ in parts):
            for g, d in parts:
                if g is not None and self.mem.writable(g >> 12):
                    self.mem.put(g, d)
        value = int.from_bytes(data, "little")
        where = "expected" if kind == "stos" else "value"
        self.emit(kind, addr=va, size=len(data), cpl=cpl, **{where: value})

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
        if self.cpu.access(self.mem, va, write=True, user=cpl == 3) is not None and self.mem.writable(gpa >> 12):
            self.mem.set(gpa >> 12, gpa >> 3 & 511, result)
        self.emit(kind, addr=va, value=operand, size=size, cpl=cpl, expected=old if kind == "cmpxchg" else 0)

    def write_entry(self, va: int, gfn: int, index: int, new: int, cpl: int) -> None:
        """The guest brings the entry at va to `new`: whole, in part, misaligned, or by a locked instruction."""
        r, at = self.r, index * 8
        if r.random() < self.odds.locked:
            self.locked(va | at, gfn << 12 | at, new, cpl)
            return
        image = new.to_bytes(8, "little")
        if r.random() >= self.odds.partial:
            kind = "write"
            if self.kinds and r.random() < 0.4:
                kind = r.choice(["stos", "movnti", *(["push"] if cpl else [])])
            self.store(va | at, image, cpl, kind)
            return
        size, shift = r.choice([(4, 0), (4, 0), (4, 4), (1, 0), (1, 1), (2, 0), (1, 7), (2, 6), (4, 2)])
        if r.random() < 0.3 and 1 < index < 510:  # misaligned: the end of this entry, the start of the next
            both = image + self.mem.get(gfn, index + 1).to_bytes(8, "little")
            size, shift = r.choice([(8, 4), (8, 1), (8, 7), (4, 6), (2, 7)])
            self.store((va | at) + shift, both[shift : shift + size], cpl)
        else:
            self.store((va | at) + shift, image[shift : shift + size], cpl)

    def pick_index(self, level: int) -> int:
        """An index of an entry that is in use at this level, if there is one."""
        r = self.r
        i = r.choice({4: self.l4, 3: self.l3, 2: self.l2, 1: self.l1, 0: self.l1}[level])
        if self.working and level and r.random() < 0.5:
            i = r.choice(self.working) >> 12 + 9 * (level - 1) & 511
        return i if i != SYSCALL_INDEX else 1

    def new_value(self, level: int, gfn: int, index: int) -> int:
        """What an entry may become; those of the stub pages keep leading there."""
        if self.mem.protected(gfn, index):
            old, below = self.mem.get(gfn, index), [g for g, lv in self.mem.stub.items() if lv == level - 1]
            if level == 1 or self.r.random() < 0.6:
                return old ^ self.r.choice([0, PWT, PCD, 1 << 9, 1 << 11])
            return self.r.choice(below) << 12 | FULL
        return self.edited(level, self.mem.get(gfn, index))
