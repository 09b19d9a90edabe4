//! What the registers allow: MOV to CR0, CR3, CR4, WRMSR to EFER, INVPCID (SDM vol. 2 and vol. 3, 2.5, 4.1 and 4.4).

use super::memory::{At, Memory};
use super::rules::{P, bits};
use super::walk::Base;
use crate::world::Paging;
use shadowkvm_core::bits::{
    CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_PSE, CR4_SMEP,
    EFER_LMA, EFER_LME,
};
use shadowkvm_core::config::CpuFeatures;
use shadowkvm_core::cpu::Registers;

/// Bits of CR0 that exist: PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG. The others are dropped.
const CR0_BITS: u64 = bits(0, 5) | 1 << 16 | 1 << 18 | bits(29, 31);
/// Bits of CR4 that every guest has: VME to PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, OSXSAVE, SMEP, SMAP.
const CR4_BITS: u64 = bits(0, 11) | 1 << 16 | 1 << 18 | bits(20, 21);
/// Bits of EFER: SCE, LME, LMA, NX, FFXSR.
const EFER_BITS: u64 = 1 | EFER_LME | EFER_LMA | 1 << 11 | 1 << 14;

/// The registers that paging depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) regs: Registers,
    pub(crate) pdptes: [u64; 4],
    pub(crate) pkru: u32,
}

/// What an instruction comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine(State),
    /// #GP, and the state after it: the same but for one case.
    GeneralProtection(State),
    InvalidOpcode,
}

impl State {
    pub(crate) fn paging(&self) -> Paging {
        Paging::of(&self.regs)
    }

    pub(crate) fn base(&self) -> Base {
        match self.paging() {
            Paging::Off => Base::Flat,
            Paging::Pae => Base::Pdptes(self.pdptes),
            // In 32-bit paging, too: KVM takes what is left of a CR3 that was loaded in long mode.
            Paging::Two | Paging::Four | Paging::Five => Base::Table(self.regs.cr3 >> 12 & bits(0, 39)),
        }
    }

    fn lma(&self) -> bool {
        self.regs.efer & EFER_LMA != 0
    }

    fn with(self, regs: Registers) -> Self {
        Self { regs, ..self }
    }

    /// The state with the four PDPTEs that CR3 names, if they are legal (SDM vol. 3, 4.4.1).
    pub(crate) fn load_pdptes(self, memory: &Memory, cpu: &CpuFeatures) -> Option<Self> {
        let (gfn, first) = (self.regs.cr3 >> 12 & bits(0, 19), (self.regs.cr3 >> 5 & 0x7f) as usize * 4);
        let reserved = bits(cpu.maxphyaddr, 63) | bits(1, 2) | bits(5, 8);
        let mut pdptes = [0; 4];
        for (i, entry) in pdptes.iter_mut().enumerate() {
            *entry = memory.readable(At::entry(gfn, first + i, false))?;
            if *entry & P != 0 && *entry & reserved != 0 {
                return None;
            }
        }
        Some(Self { pdptes, ..self })
    }

    /// `self` after `old`, with PDPTEs if PAE paging is on and one of the bits that load them has changed.
    fn loaded(self, old: Self, changed: u64, memory: &Memory, cpu: &CpuFeatures) -> Verdict {
        if self.paging() != Paging::Pae || changed == 0 {
            return Verdict::Fine(self);
        }
        self.load_pdptes(memory, cpu).map_or(Verdict::GeneralProtection(old), Verdict::Fine)
    }

    pub(crate) fn mov_cr0(self, value: u64, memory: &Memory, cpu: &CpuFeatures) -> Verdict {
        let old = self.regs;
        // KVM's emulator takes the lower half (docs/fidelity.md).
        let value = if cpu.decode_assists { value } else { value & 0xffff_ffff };
        let (on, off) = (value & !old.cr0 & CR0_PG != 0, old.cr0 & !value & CR0_PG != 0);
        let illegal = value >> 32 != 0
            || value & CR0_PG != 0 && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
            || on && old.efer & EFER_LME != 0 && (old.cr4 & CR4_PAE == 0 || old.cs_l)
            || off && (self.lma() && old.cs_l || old.cr4 & CR4_PCIDE != 0);
        if illegal {
            return Verdict::GeneralProtection(self);
        }
        let cr0 = value & CR0_BITS | CR0_ET;
        let lma = if cr0 & CR0_PG != 0 && old.efer & EFER_LME != 0 { EFER_LMA } else { 0 };
        let new = self.with(Registers { cr0, efer: old.efer & !EFER_LMA | lma, ..old });
        new.loaded(self, (cr0 ^ old.cr0) & (CR0_PG | CR0_CD | CR0_NW), memory, cpu)
    }

    pub(crate) fn mov_cr4(self, value: u64, memory: &Memory, cpu: &CpuFeatures) -> Verdict {
        let old = self.regs;
        let value = if cpu.decode_assists { value } else { value & 0xffff_ffff };
        if !cr4_exists(value, cpu) || self.lma() && (value & CR4_PAE == 0 || (value ^ old.cr4) & CR4_LA57 != 0) {
            return Verdict::GeneralProtection(self);
        }
        let new = self.with(Registers { cr4: value, ..old });
        let done = new.loaded(self, (value ^ old.cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP), memory, cpu);
        match done {
            // KVM looks at PCIDE when it has already loaded the PDPTEs (`kvm_set_cr4`, 6.1).
            Verdict::Fine(loaded) if value & !old.cr4 & CR4_PCIDE != 0 && (!self.lma() || old.cr3 & 0xfff != 0) => {
                Verdict::GeneralProtection(Self { pdptes: loaded.pdptes, ..self })
            }
            done => done,
        }
    }

    pub(crate) fn wrmsr_efer(self, value: u64) -> Verdict {
        let old = self.regs;
        if value & !EFER_BITS != 0 || old.cr0 & CR0_PG != 0 && (value ^ old.efer) & EFER_LME != 0 {
            return Verdict::GeneralProtection(self);
        }
        // LMA is the CPU's own; KVM ignores what is written there (`set_efer`, 6.1).
        Verdict::Fine(self.with(Registers { efer: value & !EFER_LMA | old.efer & EFER_LMA, ..old }))
    }

    pub(crate) fn mov_cr3(self, value: u64, memory: &Memory, cpu: &CpuFeatures) -> Verdict {
        let value = if self.regs.cr4 & CR4_PCIDE != 0 { value & !(1 << 63) } else { value };
        if value & bits(cpu.maxphyaddr, 63) != 0 {
            return Verdict::GeneralProtection(self);
        }
        self.with(Registers { cr3: value, ..self.regs }).loaded(self, 1, memory, cpu)
    }

    /// INVPCID with that descriptor: what is wrong with it, if anything.
    pub(crate) fn invpcid(self, kind: u64, descriptor: [u64; 2], cpu: &CpuFeatures) -> Verdict {
        if !cpu.invpcid {
            return Verdict::InvalidOpcode;
        }
        let pcid = if self.regs.cr4 & CR4_PCIDE != 0 { 0xfff } else { 0 };
        let canonical = |gva: u64| {
            let top = if self.regs.cr4 & CR4_LA57 != 0 { 56 } else { 47 };
            gva.cast_signed() >> top == 0 || gva.cast_signed() >> top == -1
        };
        let illegal = kind > 3
            || descriptor[0] >> 12 != 0
            || kind < 2 && descriptor[0] & !pcid != 0
            || kind == 0 && !canonical(descriptor[1]);
        if illegal { Verdict::GeneralProtection(self) } else { Verdict::Fine(self) }
    }

    /// What user space sets (KVM_SET_SREGS): `None` if no CPU can be in that state. Illegal PDPTEs stay what they were.
    pub(crate) fn set_sregs(self, regs: Registers, memory: &Memory, cpu: &CpuFeatures) -> Option<Self> {
        let (pg, lma) = (regs.cr0 & CR0_PG != 0, regs.efer & EFER_LMA != 0);
        let legal = (!pg || regs.cr0 & CR0_PE != 0)
            && (regs.cr0 & CR0_NW == 0 || regs.cr0 & CR0_CD != 0)
            && regs.cr0 >> 32 == 0
            && regs.efer & !EFER_BITS == 0
            && lma == (pg && regs.efer & EFER_LME != 0)
            && (!lma || regs.cr4 & CR4_PAE != 0)
            && (lma || !regs.cs_l && regs.cr4 & CR4_PCIDE == 0)
            && cr4_exists(regs.cr4, cpu)
            && regs.cr3 & bits(cpu.maxphyaddr, 63) == 0;
        let new = self.with(regs);
        let pae = legal && new.paging() == Paging::Pae;
        legal.then(|| if pae { new.load_pdptes(memory, cpu).unwrap_or(new) } else { new })
    }
}

fn cr4_exists(value: u64, cpu: &CpuFeatures) -> bool {
    let optional = [(CR4_PCIDE, cpu.pcid), (CR4_LA57, cpu.la57), (CR4_PKE, cpu.pku)];
    let there = optional.iter().filter(|(_, there)| *there).fold(CR4_BITS, |all, (bit, _)| all | bit);
    value & !there == 0
}
