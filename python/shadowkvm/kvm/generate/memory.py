"""What the generator believes about the guest: its memory, where an address leads, which writes cut off the stubs.

It knows nothing of shadow paging: stale translations make it wrong now and then, which costs a page fault or a
shortened case, never correctness.
"""

from __future__ import annotations

P, W, U, PWT, PCD, A, D, PS, G, NX = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 63)
FULL = P | W | U | A | D
ADDR = (1 << 40) - 1 & ~0xFFF  # the guest's MAXPHYADDR is 40
RT, USER = 7, 8  # gfns of the stub pages
READONLY = 2  # flag of a memslot
SYSCALL_INDEX, SYSCALL = 30, 0x050F  # every page holds a syscall there: a target for instruction fetches


def canonical(va: int) -> int:
    """The address with bits 48 to 63 like bit 47."""
    return va | 0xFFFF << 48 if va >> 47 & 1 else va


def compose(i4: int, i3: int, i2: int, i1: int, offset: int = 0) -> int:
    """The address that these indices lead to."""
    return canonical(i4 << 39 | i3 << 30 | i2 << 21 | i1 << 12 | offset)


class Memory:
    """Guest memory by qwords, with the slots and the entries that must keep leading to the stub pages."""

    def __init__(self) -> None:
        self.pages: dict[int, dict[int, int]] = {}
        self.slots: dict[int, tuple[int, int, int]] = {}  # id -> (first gfn, gfns, flags)
        self.stub: dict[int, int] = {}  # gfn -> level of the tables on the way to the stub pages

    def get(self, gfn: int, index: int) -> int:
        """The qword there."""
        return self.pages.get(gfn, {}).get(index, 0)

    def set(self, gfn: int, index: int, value: int) -> None:
        """Make it that."""
        self.pages.setdefault(gfn, {})[index] = value

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

    def protected(self, gfn: int, index: int) -> bool:
        """Does the way to the stub pages lead through this entry?"""
        level = self.stub.get(gfn)
        return gfn in (RT, USER) or (level is not None and (index in (7, 8) if level == 1 else index == 0))

    def keeps_stub(self, gfn: int, index: int, value: int) -> bool:
        """May this entry get this value without cutting off the stub pages?"""
        level = self.stub.get(gfn)
        if gfn in (RT, USER) or level is None:
            return gfn not in (RT, USER)
        if not self.protected(gfn, index):
            return True
        target = (value & ADDR) >> 12
        if level == 1:
            return (
                target == index
                and value & FULL == (FULL if index == USER else FULL & ~U)
                and not value >> 40
                and not value & PS
            )
        return self.stub.get(target) == level - 1 and value & FULL == FULL and not value >> 40 and not value & (PS | G)

    def safe(self, gpa: int, data: bytes) -> bool:
        """May these bytes be stored there?"""
        old = {}
        for q in range(gpa >> 3, (gpa + len(data) - 1 >> 3) + 1):
            old[q >> 9, q & 511] = self.get(q >> 9, q & 511)
        self.put(gpa, data)
        new = {k: self.get(*k) for k in old}
        for k, v in old.items():
            self.set(*k, v)
        return all(self.keeps_stub(*k, v) for k, v in new.items())


class Cpu:
    """A vCPU's registers, and where an address leads under them."""

    def __init__(self, cr3: int, cr0: int, cr4: int, efer: int) -> None:
        self.cr3, self.cr0, self.cr4, self.efer = cr3, cr0, cr4, efer

    def walk(self, mem: Memory, va: int) -> tuple[int, int, list[tuple[int, int]]] | None:
        """(gpa, rights P|W|U|NX, path) or None when the guest's tables do not lead anywhere."""
        gfn, rights, path = (self.cr3 & ADDR) >> 12, P | W | U, []
        for level in (4, 3, 2, 1):
            index = va >> 12 + 9 * (level - 1) & 511
            entry = mem.get(gfn, index)
            if (
                not mem.backed(gfn)
                or not entry & P
                or entry >> 40 & 0xFFF
                or (entry & NX and not self.efer & 0x800)
                or (level == 4 and entry & (PS | G))
            ):
                return None
            path.append((gfn, index))
            rights = rights & (entry | ~(W | U)) | entry & NX
            if level == 1 or (entry & PS and level < 4):
                low = (1 << 12 + 9 * (level - 1)) - 1
                return None if entry & ADDR & low & ~0x1FFF else ((entry & ADDR & ~low) | va & low, rights, path)
            gfn = (entry & ADDR) >> 12
        return None

    def allows(self, rights: int, *, write: bool, user: bool, fetch: bool = False) -> bool:
        """Do these rights permit the access?"""
        if (
            (user and not rights & U)
            or (fetch and rights & NX)
            or (write and not rights & W and (user or self.cr0 & 1 << 16))
        ):
            return False
        return user or not rights & U or not self.cr4 >> (20 if fetch else 21) & 1

    def access(self, mem: Memory, va: int, *, write: bool, user: bool, fetch: bool = False) -> int | None:
        """The gpa if the access is allowed, with A and D set on the way; else None."""
        hit = self.walk(mem, va)
        if hit is None or not self.allows(hit[1], write=write, user=user, fetch=fetch):
            return None
        gpa, _, path = hit
        for gfn, index in path:
            if mem.writable(gfn):
                mem.set(gfn, index, mem.get(gfn, index) | A)
        if write and mem.writable(path[-1][0]):
            mem.set(*path[-1], mem.get(*path[-1]) | D)
        return gpa
