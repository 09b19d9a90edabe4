"""What the generator believes of the guest's memory, and which writes cut off the stubs.

It knows nothing of shadow paging: stale translations make it wrong now and then, which costs a page fault or a
shortened case, never correctness.
"""

from __future__ import annotations

from shadowkvm.kvm.generate.formats import ADDR, CR4_PSE, FULL, PS, A, D, Format, G, P, U, W

RT, USER = 7, 8  # gfns of the stub pages
READONLY = 2  # flag of a memslot


class Memory:
    """Guest memory by qwords, with the slots and the entries that must keep leading to the stub pages."""

    def __init__(self) -> None:
        self.pages: dict[int, dict[int, int]] = {}
        self.slots: dict[int, tuple[int, int, int]] = {}  # id -> (first gfn, gfns, flags)
        self.moved: dict[int, int] = {}  # id -> gfn at which a slot's memory was when it came
        self.stub: dict[tuple[str | int, int], set[int]] = {}  # (what kind, level) -> tables on the way to the stubs
        self.guarded: dict[int, tuple[Format, int, int]] = {}  # address of an entry -> format, level, index

    def host(self, gfn: int) -> int:
        """The host's name for a page: its gfn, but that of before if its slot has moved."""
        for slot, home in self.moved.items():
            first, n, _ = self.slots.get(slot, (0, 0, 0))
            if first <= gfn < first + n:
                return home + gfn - first
        return gfn

    def get(self, gfn: int, index: int) -> int:
        """The qword there."""
        return self.pages.get(self.host(gfn), {}).get(index, 0)

    def set(self, gfn: int, index: int, value: int) -> None:
        """Make it that."""
        self.pages.setdefault(self.host(gfn), {})[index] = value

    def entry(self, gpa: int, size: int) -> int:
        """The entry of `size` bytes at an address."""
        qword = self.get(gpa >> 12, gpa >> 3 & 511)
        return qword if size == 8 else qword >> 8 * (gpa & 4) & 0xFFFFFFFF

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        """Make it that."""
        self.put(gpa, value.to_bytes(size, "little"))

    def backed(self, gfn: int) -> bool:
        """Is there a memslot?"""
        return any(first <= gfn < first + n for first, n, _ in self.slots.values())

    def writable(self, gfn: int) -> bool:
        """Does a store of the guest reach memory there?"""
        return any(first <= gfn < first + n and not flags & READONLY for first, n, flags in self.slots.values())

    def load(self, gpa: int, size: int) -> bytes:
        """What lies there."""
        out = b""
        while len(out) < size:
            at = gpa + len(out)
            out += self.get(at >> 12, at >> 3 & 511).to_bytes(8, "little")[at & 7 :]
        return out[:size]

    def put(self, gpa: int, data: bytes) -> None:
        """Lay it there."""
        for i, b in enumerate(data):
            gfn, index, shift = (gpa + i) >> 12, (gpa + i) >> 3 & 511, (gpa + i & 7) * 8
            self.set(gfn, index, self.get(gfn, index) & ~(0xFF << shift) | b << shift)

    # ---- the way to the stub pages

    @staticmethod
    def _kind(form: Format, level: int) -> tuple[str | int, int]:
        """Tables of the two lowest levels serve PAE and 64-bit alike."""
        return (form.entry if level <= 2 else form.name, level)

    def guard(self, form: Format, level: int, table: int) -> None:
        """This table is on the way to the stub pages."""
        self.stub.setdefault(self._kind(form, level), set()).add(table)
        for i in (RT, USER) if level == 1 else (0,):
            self.guarded[table + i * form.entry] = (form, level, i)

    def on_the_way(self, form: Format, level: int) -> list[int]:
        """The tables of this level on the way to the stub pages."""
        return sorted(self.stub.get(self._kind(form, level), ()))

    def is_stub_table(self, gfn: int) -> bool:
        """Does the way to the stub pages lead through this page?"""
        return any(t >> 12 == gfn for tables in self.stub.values() for t in tables)

    def protected(self, gpa: int) -> bool:
        """Does the way to the stub pages lead through the entry at this address?"""
        return gpa >> 12 in (RT, USER) or gpa in self.guarded

    def keeps_stub(self, gpa: int, value: int) -> bool:
        """May the entry at this address get this value without cutting off the stub pages?"""
        if gpa >> 12 in (RT, USER) or gpa not in self.guarded:
            return gpa >> 12 not in (RT, USER)
        form, level, index = self.guarded[gpa]
        if form.reserved(level, value, large=False, nx=False) or form.is_large(level, value, CR4_PSE):
            return False
        target = form.page(1, value, 0) & ADDR
        if level == 1:
            rights = FULL if index == USER else FULL & ~U
            return target == index << 12 and value & FULL == rights and not value & PS
        wanted = P if form.is_pdpt(level) else P | W | U | A | D
        return target in self.stub[self._kind(form, level - 1)] and value & FULL == wanted and not value & (PS | G)

    def safe(self, gpa: int, data: bytes) -> bool:
        """May these bytes be stored there?"""
        first, last = gpa & ~7, gpa + len(data) - 1
        if first >> 12 in (RT, USER) or last >> 12 in (RT, USER):
            return False
        hit = [at for at in range(first, last + 1, 4) if at in self.guarded]
        if not hit:
            return True
        end = last | 7
        image = bytearray(self.load(first, end + 1 - first))
        image[gpa - first : gpa - first + len(data)] = data
        return all(
            self.keeps_stub(at, int.from_bytes(image[at - first : at - first + self.guarded[at][0].entry], "little"))
            for at in hit
        )
