"""Steps of a random case that change control registers: CR3, flushes, rights, paging modes."""

from __future__ import annotations

from shadowkvm.kvm.generate.cpu import LMA
from shadowkvm.kvm.generate.devices import Devices
from shadowkvm.kvm.generate.formats import (
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_NX,
    NX,
    PAE,
    PS,
    A,
    G,
    P,
    U,
    W,
)
from shadowkvm.kvm.generate.image import START, Space


class Control(Devices):
    """What a kernel does with its control registers."""

    def step_invlpg(self) -> None:
        """INVLPG of an address, seldom a non-canonical one."""
        va = self.page_va() if self.r.random() < 0.97 or self.cpu.bits == 32 else 1 << 47
        self.emit("invlpg", addr=va | self.r.choice([0, 0x10, 0xFFF]))

    def step_cr3(self) -> None:
        """CR3 is loaded: another root or the same; seldom a reserved bit."""
        r = self.r
        if r.random() < 0.02 and self.cpu.bits == 64:
            self.emit("cr3", addr=self.cpu.cr3 | 1 << r.choice([40, 45, 51]))
            return
        value = self.cpu.cr3
        if r.random() < 0.75:
            value = r.choice(self.space.roots) | r.choice([0, 0, 0, 0, 8, 0x18])
        self.set_cr3(value)

    def step_switch(self) -> None:
        """A context switch, and the new process at work."""
        self.step_cr3()
        for _ in range(self.r.randint(2, 5)):
            self.step_edit() if self.r.random() < 0.3 else self.step_access()

    def step_crs(self) -> None:
        """CR0, CR4 or EFER is loaded."""
        r, c = self.r, self.cpu
        x = r.random()
        if self.efer_changes and x < 0.2:
            c.efer ^= EFER_NX
            self.emit("efer", value=c.efer)
        elif x < 0.5:
            self.change_cr0()
        elif r.random() < 0.08:
            bad = [c.cr4 | 1 << 12, c.cr4 | 1 << 17]
            self.emit("cr4", addr=r.choice([*bad, *([c.cr4 & ~CR4_PAE, c.cr4 | 1 << 40] if c.bits == 64 else [])]))
        else:
            self.set_cr4(c.cr4 ^ r.choice([CR4_PGE, CR4_PGE, CR4_SMEP, CR4_SMAP, CR4_SMEP | CR4_SMAP, CR4_PSE, 0]))

    def change_cr0(self) -> None:
        """CR0.WP or a bit that means nothing to paging; seldom a value that no CPU takes."""
        r, c = self.r, self.cpu
        if r.random() < 0.1:
            bad = [c.cr0 | 1 << 29, c.cr0 & ~1 | CR0_PG]
            self.emit("cr0", addr=r.choice([*bad, *([c.cr0 & ~CR0_PG] if c.bits == 64 else [])]))
            return
        harmless = [0, 1 << 1] if self.kinds else [0, 1 << 1, 1 << 3]  # with TS set there is no SSE
        self.set_cr0(c.cr0 ^ r.choice([CR0_WP, CR0_WP, *harmless]))

    def set_cr0(self, value: int) -> bool:
        """MOV to CR0; False: PAE's entries are refused."""
        c = self.cpu
        self.emit("cr0", addr=value)
        loads = value & CR0_PG and c.bits == 32 and c.cr4 & CR4_PAE and (value ^ c.cr0) & CR0_PG
        if loads and not c.load_pdptes(self.mem):
            return False
        c.cr0 = value
        return True

    def set_cr4(self, value: int) -> None:
        """MOV to CR4; with PAE the four PDPTEs may be refused."""
        c = self.cpu
        self.emit("cr4", addr=value)
        if c.form is PAE and (value ^ c.cr4) & (CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP) and not c.load_pdptes(self.mem):
            return
        c.cr4 = value

    def step_pdpt(self) -> None:
        """PAE: PDPTEs change, and are loaded, or not yet, or are refused."""
        r, space = self.r, self.space
        if space.form is not PAE:
            return
        root = self.cpu.cr3 & 0xFFFFFFE0 if r.random() < 0.7 and self.cpu.form is PAE else r.choice(space.roots)
        for i in r.sample(range(4), r.randint(1, 2)):
            at = root + 8 * i
            value = self.new_value(space, 3, at)
            if r.random() < 0.1 and i and not self.mem.protected(at):
                value = value | P | r.choice([W, U, A, PS, G, NX, 1 << 40])
            self.write_entry(at, at, 8, value, 0)
        x = r.random()
        if x < 0.6:
            self.set_cr3(root)
        elif x < 0.7:
            self.set_cr4(self.cpu.cr4 ^ r.choice([CR4_PGE, CR4_PSE]))
        if r.random() < 0.5:
            self.read(self.page_va())
        bad = [i for i in range(4) if PAE.refuses_pdpte(self.mem.entry(root + 8 * i, 8))]
        if r.random() < 0.7:  # most are made good again
            for i in bad:
                self.store(root + 8 * i, PAE.link(3, r.choice(space.tables[2])).to_bytes(8, "little"), 0)

    # ---- paging off and on

    def step_paging(self) -> None:
        """Paging is switched off, and after a while, if at all, on again, perhaps of another kind."""
        r, c = self.r, self.cpu
        if c.bits == 64:
            return
        if c.cr0 & CR0_PG:
            self.set_cr0(c.cr0 & ~CR0_PG ^ CR0_WP * (r.random() < 0.1))
            for _ in range(r.choice([0, 0, 2, 5, 12])):
                r.choice([self.step_access, self.step_access, self.step_edit, self.step_crs, self.step_mmio])()
        if r.random() < (0.6 if self.about == "switching" else 0.35):
            self.paging_on(r.choice(self.spaces))

    def step_sregs(self) -> None:
        """The host sets control registers: another root or right, or another mode."""
        r, c = self.r, self.cpu
        space = r.choice(self.spaces) if r.random() < 0.5 else self.space
        if r.random() < 0.15 and self.guest in ("off", "switched"):
            return self.host_sets(c.cr0 & ~CR0_PG, c.cr3 & 0xFFFFFFFF, c.cr4 & ~CR4_PAE, c.efer & EFER_NX)
        cr4, efer = START[space.form]
        keep = CR4_PGE | CR4_PSE | CR4_OSFXSR | CR4_SMEP | CR4_SMAP
        cr4 = c.cr4 & keep | cr4 & CR4_PAE
        efer = efer & ~EFER_NX | c.efer & EFER_NX
        cr0 = c.cr0 | CR0_PG
        cr3 = c.cr3 if c.cr3 & ~0x18 in space.roots and r.random() < 0.5 else r.choice(space.roots)
        x = r.random()
        cr0 ^= CR0_WP * (x < 0.2)
        cr4 ^= r.choice([CR4_PGE, CR4_PSE, CR4_SMEP, CR4_SMAP]) * (0.2 <= x < 0.4)
        efer ^= EFER_NX * (0.4 <= x < 0.5)
        return self.host_sets(cr0, cr3, cr4, efer)

    def host_sets(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """KVM_SET_SREGS, with PAE's entries mended first."""
        c = self.cpu
        if cr0 & CR0_PG and cr4 & CR4_PAE and not efer & LMA:
            for at in self.mend_pdpt(cr3):  # KVM would take them, and the guest would be lost
                self.emit("hwrite", addr=at, value=0, size=8)
        self.emit("set_sregs", addr=cr3, value=cr0, expected=cr4, flags=efer)
        c.cr0, c.cr3, c.cr4, c.efer = cr0, cr3, cr4, efer
        if c.form is PAE:
            c.load_pdptes(self.mem)

    def paging_on(self, space: Space) -> None:
        """Paging of this kind; CR3 and CR4 are changed as far as need be, in any order."""
        r, c = self.r, self.cpu

        def cr4() -> None:
            value = c.cr4 & ~CR4_PAE | CR4_PAE * (space.form is PAE)
            if value != c.cr4 or r.random() < 0.1:
                self.set_cr4(value)

        def cr3() -> None:
            if c.cr3 & ~0x18 not in space.roots or r.random() < 0.3:
                self.set_cr3(r.choice(space.roots))

        for step in r.sample([cr4, cr3], 2):
            step()
            if r.random() < 0.15:
                self.step_access()
        if not self.set_cr0(c.cr0 | CR0_PG):
            # Refused; the next root may do better.
            self.set_cr3(r.choice(space.roots))
