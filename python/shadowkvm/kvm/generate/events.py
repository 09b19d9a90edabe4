"""Steps of a random case about the delivery of events, and code of the case's own."""

from __future__ import annotations

from typing import Final

from shadowkvm.kvm.generate.formats import FULL, P, W
from shadowkvm.kvm.generate.host import Host
from shadowkvm.kvm.layout import IMAGE, LABELS, RT, STACK

MOV: Final = {64: b"\x48\x89\x13\x0f\x05", 32: b"\x89\x13\xcd\x80"}
"""mov %rdx, (%rbx), and the way out."""


class Events(Host):
    """INT3, IDT and stack elsewhere, faults in the delivery of faults, instructions across a page's end."""

    def step_int3(self) -> None:
        """INT3 at either CPL."""
        self.emit("int3", cpl=self.r.choice([0, 3]))

    def provoke(self, times: int) -> None:
        """Instructions that deliver events."""
        r = self.r
        for _ in range(times):
            if r.random() < 0.5:
                self.step_int3()
            else:
                lost = [va for va in (self.fresh_va() for _ in range(8)) if self.walk(va) is None]
                self.emit("read", addr=lost[0] if lost else 0x3FE00000, size=4, cpl=r.choice([0, 3]))

    def revive(self) -> None:
        """The host sets the registers as they are, which also revives a vCPU that has shut down."""
        c = self.cpu
        self.host_sets(c.cr0, c.cr3, c.cr4, c.efer)

    def own_page(self) -> int | None:
        """A data page that is mapped at its own address for the supervisor, and is no table."""
        pages = [g for g in range(0x60, 0x100) if self.where_is(g) is None]
        for gfn in self.r.sample(pages, 8):
            hit = self.walk(gfn << 12)
            if hit and hit.gfn == gfn and self.cpu.allows(hit.rights, write=True, user=False):
                return gfn
        return None

    def step_idt(self) -> None:
        """The IDT moves to a page of its own, whose mapping may go while events are delivered."""
        r, gfn = self.r, self.own_page()
        if gfn is None:
            return
        labels = LABELS[self.cpu.bits]
        at, end = labels["idt"] - RT, labels["idt_end"] - RT
        for i in range(0, end - at, 8):
            gate = int.from_bytes(IMAGE[at + i : at + i + 8], "little")
            if i < 0x100 or i >= 0x400:
                self.host_write(gfn << 12 | i, 8, gate)
        self.emit("idt", addr=gfn << 12)
        self.provoke(r.randint(1, 3))
        if r.random() < 0.3:
            self.emit("invlpg", addr=gfn << 12)
        if r.random() < 0.4:
            self.step_access()
        self.forbid(gfn, P)
        self.revive()

    def step_stack(self) -> None:
        """The supervisor's stack moves to another page, perhaps a table, which may be forbidden then."""
        r = self.r
        gfn = self.own_page() if r.random() < 0.5 else r.choice(self.any_table()) >> 12
        if gfn is None or self.mem.is_stub_table(gfn):
            return
        hit = self.walk(gfn << 12)
        if hit is None or hit.gfn != gfn:
            return
        self.emit("stack", addr=gfn << 12 | 0xE00)
        if self.cpu.allows(hit.rights, write=True, user=False):
            self.provoke(r.randint(1, 3))
        else:  # a shutdown is near
            self.provoke(1)
            self.revive()
        if r.random() < 0.5:
            self.forbid(gfn, r.choice([P, W]))
        self.emit("stack", addr=STACK)
        self.revive()

    def forbid(self, gfn: int, bit: int) -> None:
        """A page's own entry loses a right, events come, and it gets it back."""
        form, hit = self.cpu.form, self.walk(gfn << 12)
        if form is None or hit is None or self.r.random() < 0.2:
            return
        at = hit.path[-1]
        old = self.mem.entry(at, form.entry)
        if self.mem.protected(at) or old & FULL & P == 0:
            return
        self.host_write(at, form.entry, old & ~bit)
        self.emit("invlpg", addr=gfn << 12)
        self.provoke(1)
        self.revive()
        self.host_write(at, form.entry, old)

    def step_run(self) -> None:
        """A store whose instruction lies across a page's end."""
        r, code = self.r, MOV[self.cpu.bits]
        va = self.va_of(lambda g: g in self.data)
        first = None if va is None else self.walk(va)
        second = None if va is None else self.walk(va + 4096)
        if va is None or first is None or second is None or second.gfn not in self.data or first.gfn == second.gfn:
            return
        length = len(code) - 2
        start = 4096 - r.randint(1, length + 1)
        for i, byte in enumerate(code):
            hit = first if start + i < 4096 else second
            self.host_write(hit.gpa & ~0xFFF | start + i & 0xFFF, 1, byte)
        target = self.page_va(write=True)
        value = r.getrandbits(30) << 1
        cpl = self.user(va)
        if not self.keep(target | 0x118, value.to_bytes(self.word, "little"), cpl):
            return
        self.emit(
            "run",
            addr=va & ~0xFFF | start,
            expected=target | 0x118,
            value=value,
            size=self.word,
            length=length,
            cpl=cpl,
        )
