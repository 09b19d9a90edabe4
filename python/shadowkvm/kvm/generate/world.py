"""The guest of a random case at work: the addresses that it chooses, and how its accesses are written down."""

from __future__ import annotations

from collections.abc import Callable

from shadowkvm.kvm.case import AC, UNLOCKED
from shadowkvm.kvm.generate.cpu import Hit
from shadowkvm.kvm.generate.entries import MMIO_GFNS, Entries
from shadowkvm.kvm.generate.formats import CR4_SMAP, LONG, PAE
from shadowkvm.kvm.generate.image import EXTRA, Space

RMW = ["cmpxchg8b", "or", "or", "and", "xor", "add", "xchg", "cmpxchg", "xadd", "bts", "inc"]
STRINGS = ["stos", "movnti", "movups"]


class World(Entries):
    """A guest and what it believes of itself."""

    @property
    def space(self) -> Space:
        """The tables of the paging that the vCPU runs with; without paging the first ones."""
        form = self.cpu.form
        return next((s for s in self.spaces if s.form is form), self.spaces[0])

    @property
    def word(self) -> int:
        """Bytes of the widest plain store."""
        return self.cpu.bits // 8

    # ---- addresses

    def fresh_va(self) -> int:
        """An address that the tables may lead somewhere."""
        r, space = self.r, self.space
        if self.cpu.form is None:
            return self.flat_va()
        form = space.form
        chosen = {level: r.choice(space.indices[level]) for level in form.levels}
        if r.random() < 0.3:  # through the tables' own addresses, or the same page of a large one
            chosen[1] = r.choice([*(t >> 12 for t in self.any_table()), *self.data[:-6]]) % form.entries(1)
        if r.random() < 0.1 and not form.is_pdpt(form.top):
            for level in form.levels[:2]:  # through self-maps
                chosen[level] = max(space.indices[form.top]) if level > 1 else chosen[level]
        va = form.compose(chosen)
        return va if form is not LONG or va >> 47 in (0, 0x1FFFF) else va & (1 << 47) - 1

    def flat_va(self) -> int:
        """An address without paging."""
        r, x = self.r, self.r.random()
        if x < 0.4:
            return r.choice(self.any_table()) & ~0xFFF
        if x < 0.75:
            return r.choice(self.data) << 12
        if x < 0.85:
            return r.choice(MMIO_GFNS) << 12
        return EXTRA[self.space.form][0][1] + (r.randrange(12) << 12) if x < 0.93 else r.randrange(0x9, 0x1000) << 12

    def page_va(self, *, write: bool = False) -> int:
        """A page's address, mostly one that may be used this way."""
        r = self.r
        va = r.choice(self.working) if self.working and r.random() < 0.5 else self.fresh_va()
        for _ in range(r.choice([0, 10, 40, 40])):
            hit = self.cpu.walk(self.mem, va)
            if hit and any(self.cpu.allows(hit.rights, write=write, user=user) for user in (False, True)):
                break
            va = self.fresh_va()
        self.remember(va)
        return va

    def remember(self, va: int) -> None:
        """Addresses that are used again."""
        if va not in self.working:
            self.working.append(va)
            del self.working[:-12]

    def va_of(self, wanted: Callable[[int], bool], tries: int = 40) -> int | None:
        """The address of a page that leads to a gfn that is wanted."""
        for _ in range(tries):
            va = self.r.choice(self.working) if self.working and self.r.random() < 0.2 else self.fresh_va()
            hit = self.cpu.walk(self.mem, va)
            if hit and wanted(hit.gfn):
                return va
        return None

    def walk(self, va: int) -> Hit | None:
        """Where an address leads now."""
        return self.cpu.walk(self.mem, va)

    def user(self, va: int, *, write: bool = False) -> int:
        """The CPL of an access to that page: mostly one that may."""
        user, hit = self.r.random() < self.odds.user, self.walk(va)
        if hit and self.r.random() < 0.85 and not self.cpu.allows(hit.rights, write=write, user=user):
            user = not user
        return 3 * user

    # ---- accesses

    def fits(self, va: int, size: int) -> bool:
        """Does the operand stay below the top of a 32-bit guest's addresses?"""
        return self.cpu.bits == 64 or va + size <= 1 << 32

    def read(self, va: int, cpl: int | None = None) -> None:
        """A load."""
        size = self.r.choice([1, 2, 4, self.word, self.word, self.word])
        if not self.fits(va, size):
            size, va = 4, va & ~3
        cpl = self.user(va) if cpl is None else cpl
        self.cpu.access(self.mem, va, write=False, user=cpl == 3)
        self.emit("read", addr=va, size=size, cpl=cpl, flags=self.alignment_check())

    def alignment_check(self) -> int:
        """EFLAGS.AC, which lets the supervisor use user pages in spite of SMAP."""
        return AC if self.cpu.cr4 & CR4_SMAP and self.r.random() < 0.3 else 0

    def lands(self, va: int, size: int, cpl: int) -> list[tuple[int | None, int]] | None:
        """Where a store of that many bytes goes, page by page: guest physical address (None: nowhere), bytes."""
        if not self.fits(va, size):
            return None
        cut = min(size, 4096 - va % 4096)
        parts = [(self.cpu.access(self.mem, va, write=True, user=cpl == 3), cut)]
        if cut < size:
            parts.append((self.cpu.access(self.mem, va + cut, write=True, user=cpl == 3), size - cut))
        return parts

    def keep(self, va: int, data: bytes, cpl: int) -> bool:
        """Believe in a store of these bytes; False: it could hurt the stub pages, and is not to be done."""
        parts = self.lands(va, len(data), cpl)
        # Where it goes is not known for sure (stale translations): no store to a page's first entries then.
        if parts is None or any(gpa is None and not va & 0xFF8 for gpa, _ in parts):
            return False
        at, pieces = 0, []
        for gpa, n in parts:
            pieces.append((gpa, data[at : at + n]))
            at += n
        if any(gpa is not None and not self.mem.safe(gpa, piece) for gpa, piece in pieces):
            return False
        if all(gpa is not None for gpa, _ in pieces):
            for gpa, piece in pieces:
                if gpa is not None and self.mem.writable(gpa >> 12):
                    self.mem.put(gpa, piece)
        return True

    def store(self, va: int, data: bytes, cpl: int, kind: str = "write") -> None:
        """A store of these bytes by one instruction, or by several as wide as the guest has."""
        if kind == "write" and len(data) > self.word:
            for i in sorted(range(0, len(data), self.word), reverse=self.r.random() < 0.4):
                self.store(va + i, data[i : i + self.word], cpl)
            return
        if not self.keep(va, data, cpl):
            self.read(va, cpl)
            return
        value = int.from_bytes(data, "little")
        if kind == "stos":
            self.emit(kind, addr=va, size=len(data), cpl=cpl, expected=value)
        else:  # of an SSE store `expected` is the high half
            low, high = value & (1 << 64) - 1, value >> 64
            flags = self.alignment_check() if kind == "write" else 0
            self.emit(kind, addr=va, size=len(data), cpl=cpl, value=low, expected=high, flags=flags)

    def locked(self, va: int, gpa: int, new: int, cpl: int, size: int) -> None:
        """Brings the word of that size at gpa to `new`, as far as the instruction can."""
        r = self.r
        kind = r.choice(RMW[size != 8 :]) if self.kinds else "or"
        if size > self.word:
            kind = "cmpxchg8b"
        old, mask = int.from_bytes(self.mem.load(gpa, size), "little"), (1 << 8 * size) - 1
        bit = r.choice([i for i in range(8 * size) if (old ^ new) >> i & 1] or [0])
        operand, result = {
            "or": (new & ~old, new | old),
            "and": (new | ~old & mask, new & old),
            "xor": (old ^ new, new),
            "add": (new - old & mask, new),
            "xadd": (new - old & mask, new),
            "xchg": (new, new),
            "cmpxchg": (new, new),
            "cmpxchg8b": (new, new),
            "bts": (bit, old | 1 << bit),
            "inc": (0, old + 1 & mask),
        }[kind]
        if not self.mem.safe(gpa, result.to_bytes(size, "little")):
            return
        expected = 0
        if kind in ("cmpxchg", "cmpxchg8b"):
            expected = old ^ 2 * (r.random() < 0.1)
            result = new if expected == old else old
        if self.cpu.access(self.mem, va, write=True, user=cpl == 3) is not None and self.mem.writable(gpa >> 12):
            self.mem.put(gpa, result.to_bytes(size, "little"))
        flags = UNLOCKED if self.kinds and kind != "xchg" and r.random() < 0.3 else 0
        self.emit(kind, addr=va, value=operand, size=size, cpl=cpl, expected=expected, flags=flags)

    # ---- entries

    def write_entry(self, va: int, at: int, form_entry: int, new: int, cpl: int) -> None:
        """The guest brings the entry at gpa `at`, which it sees at `va`, to `new`: whole, in part, locked."""
        r, n = self.r, form_entry
        image = new.to_bytes(n, "little")
        if r.random() < self.odds.locked:
            if n > self.word and r.random() < 0.5:  # one half
                half = 4 * (r.random() < 0.3)
                self.locked(va + half, at + half, int.from_bytes(image[half : half + 4], "little"), cpl, 4)
            else:
                self.locked(va, at, new, cpl, n)
            return
        if r.random() < self.odds.partial:
            self.write_part(va, at, image, cpl)
            return
        if self.kinds and r.random() < 0.4:
            self.write_oddly(va, at, image, cpl)
            return
        old = self.mem.load(at, n)
        if n > self.word and old[4:] == image[4:] and r.random() < 0.7:
            self.store(va, image[:4], cpl)  # its high half stays
            return
        self.store(va, image, cpl)

    def write_part(self, va: int, at: int, image: bytes, cpl: int) -> None:
        """Some bytes of an entry, or the end of one and the start of the next."""
        r, n = self.r, len(image)
        whole = [(4, 0), (4, 0), (4, 4), (1, 0), (1, 1), (2, 0), (1, 7), (2, 6), (4, 2)]
        size, shift = r.choice([p for p in whole if sum(p) <= n])
        if r.random() < 0.3 and 16 < at & 0xFFF < 0xFF0:
            image += self.mem.load(at + n, n)
            both = [(8, 4), (8, 1), (8, 7), (4, 6), (2, 7), (4, 2), (2, 3), (4, 1), (4, 5)]
            size, shift = r.choice([p for p in both if sum(p) <= 2 * n and p[0] <= self.word])
        self.store(va + shift, image[shift : shift + size], cpl)

    def write_oddly(self, va: int, at: int, image: bytes, cpl: int) -> None:
        """By an instruction that KVM does not take for a writer of page tables; REP and SSE write more."""
        r, n = self.r, len(image)
        # A #PF at CPL 0 would go to the stack of the PUSH itself.
        kind = r.choice(
            [*STRINGS, "rep", "movs", *(["push"] if cpl else []), *(["cmpxchg16b"] if self.word == 8 else [])]
        )
        near = at & 0xFFF
        if kind == "cmpxchg16b":
            self.exchange16(va & ~15, at & ~15, image, cpl)
            return
        if kind == "movups" and near < 0xFF0:
            self.store(va, image + self.mem.load(at + n, 16 - n), cpl, kind)
            return
        if kind == "rep" and near < 0xF00 and n <= self.word:
            count = r.choice([1, 2, 3, 6])
            if self.keep(va, image * count, cpl):
                self.emit("rep", addr=va, value=count, expected=int.from_bytes(image, "little"), size=n, cpl=cpl)
            return
        if kind == "movs" and near < 0xF00:
            source, count = r.choice(self.any_table()) & ~0xFFF | near & ~7, r.choice([1, 2, 6])
            data = self.mem.load(source, count * self.word)
            if self.walk(source) and self.keep(va & ~7, data, cpl):
                self.emit("movs", addr=va & ~7, value=count, expected=source, size=self.word, cpl=cpl)
            return
        kind = kind if kind in ("stos", "movnti", "push") else "stos"
        for i in range(0, n, self.word):
            size = min(n, self.word)
            self.store(va + i, image[i : i + size], cpl, kind if kind != "push" or size == self.word else "stos")

    def exchange16(self, va: int, at: int, image: bytes, cpl: int) -> None:
        """CMPXCHG16B; what it compares with and stores is 64 bits wide, with zeros above."""
        old, image = self.mem.load(at, 16), image.ljust(8, b"\0")
        hit = self.cpu.access(self.mem, va, write=True, user=cpl == 3)
        found = self.where_is(at >> 12)
        tracked = found is not None and found[1] > 1
        if hit is None or tracked or not self.mem.writable(at >> 12) or not self.mem.safe(at, image + bytes(8)):
            # KVM does not emulate it: it must not reach a device, and at a table above the last it may repeat for ever.
            self.read(va, cpl)
            return
        if old[8:] == bytes(8):
            self.mem.put(at, image + bytes(8))
        flags = UNLOCKED if self.r.random() < 0.3 else 0
        low, new = int.from_bytes(old[:8], "little"), int.from_bytes(image, "little")
        self.emit("cmpxchg16b", addr=va, value=new, size=16, expected=low, cpl=cpl, flags=flags)

    def set_cr3(self, value: int) -> None:
        """MOV to CR3; with PAE the four PDPTEs may be refused."""
        self.emit("cr3", addr=value)
        if self.cpu.form is not PAE or self.cpu.load_pdptes(self.mem, value):
            self.cpu.cr3 = value
