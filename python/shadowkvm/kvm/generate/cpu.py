"""A vCPU of a random case: its registers, and where an address leads under them."""

from __future__ import annotations

from typing import NamedTuple

from shadowkvm.kvm.generate.formats import (
    ADDR,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    EFER_NX,
    LONG,
    NX,
    PAE,
    TWO,
    A,
    D,
    Format,
    P,
    U,
    W,
)
from shadowkvm.kvm.generate.memory import Memory

LMA = 1 << 10


class Hit(NamedTuple):
    """Where an address leads."""

    gpa: int
    rights: int
    """P, W, U and NX, as all levels together have them."""
    path: list[int]
    """Addresses of the entries, the root's first; PAE without that of the PDPTE; empty without paging."""

    @property
    def gfn(self) -> int:
        """The page."""
        return self.gpa >> 12


class Cpu:
    """A vCPU's registers, and where an address leads under them."""

    def __init__(self, cr3: int, cr0: int, cr4: int, efer: int) -> None:
        self.cr3, self.cr0, self.cr4, self.efer = cr3, cr0, cr4, efer
        self.pdptes = [0] * 4

    @property
    def bits(self) -> int:
        """The code that it runs."""
        return 64 if self.efer & LMA else 32

    @property
    def form(self) -> Format | None:
        """Its paging; None: paging is off."""
        if not self.cr0 & CR0_PG:
            return None
        return LONG if self.efer & LMA else PAE if self.cr4 & CR4_PAE else TWO

    def load_pdptes(self, mem: Memory, cr3: int | None = None) -> bool:
        """PAE: the four entries go into registers; False: the CPU refuses them (#GP)."""
        base = (self.cr3 if cr3 is None else cr3) & 0xFFFFFFE0
        new = [mem.entry(base + 8 * i, 8) for i in range(4)]
        if any(map(PAE.refuses_pdpte, new)):
            return False
        self.pdptes = new
        return True

    def walk(self, mem: Memory, va: int) -> Hit | None:
        """Where the guest's tables lead; None: nowhere."""
        form, rights, path = self.form, P | W | U, list[int]()
        if form is None:
            return Hit(va & 0xFFFFFFFF, rights, path)
        table, nx = self.cr3 & (ADDR if form is LONG else 0xFFFFF000), bool(self.efer & EFER_NX)
        for level in form.levels:
            if form.is_pdpt(level):
                entry = self.pdptes[form.index(va, level)]
                if not entry & P:
                    return None
            else:
                at = table + form.index(va, level) * form.entry
                entry = mem.entry(at, form.entry)
                large = form.is_large(level, entry, self.cr4)
                if not mem.backed(at >> 12) or not entry & P or form.reserved(level, entry, large=large, nx=nx):
                    return None
                path.append(at)
                rights = rights & (entry | ~(W | U)) | (entry & NX if form.entry == 8 else 0)
                if level == 1 or large:
                    return Hit(form.page(level, entry, va), rights, path)
            table = form.page(1, entry, 0)
        raise AssertionError("level 1 maps or does not")

    def allows(self, rights: int, *, write: bool, user: bool, fetch: bool = False) -> bool:
        """Do these rights permit the access?"""
        if self.form is None:
            return True
        if (
            (user and not rights & U)
            or (fetch and rights & NX)
            or (write and not rights & W and (user or self.cr0 & CR0_WP))
        ):
            return False
        return user or not rights & U or not self.cr4 >> (20 if fetch else 21) & 1

    def access(self, mem: Memory, va: int, *, write: bool, user: bool, fetch: bool = False) -> int | None:
        """The gpa if the access is allowed, with A and D set on the way; else None."""
        hit, form = self.walk(mem, va), self.form
        if hit is None or not self.allows(hit.rights, write=write, user=user, fetch=fetch):
            return None
        if form is not None:
            for at in hit.path:
                more = A | (D if write and at == hit.path[-1] else 0)
                if mem.writable(at >> 12) and mem.entry(at, form.entry) & more != more:
                    mem.set_entry(at, form.entry, mem.entry(at, form.entry) | more)
        return hit.gpa
