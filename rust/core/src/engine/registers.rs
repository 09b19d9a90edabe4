//! Writes to the registers that decide paging: what is illegal, and what each does to the roots.

use crate::bits::{
    CR0_CD, CR0_ET, CR0_KNOWN, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR3_NOFLUSH, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE,
    CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_ALLOWED, EFER_LMA, EFER_LME, EFER_NX,
};
use crate::cpu::{Registers, Requests, cr4_allowed, pdpte_reserved};
use crate::fault::Ctx;
use crate::guest::gpte::Gpte;
use crate::shadow::roots::NewPgd;
use crate::types::Gpa;

/// CR4 bits that split roles (`KVM_MMU_CR4_ROLE_BITS`, 6.1).
const CR4_ROLE: u64 = CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE;
/// CR0 and CR4 bits whose change makes PAE paging read the PDPTEs again (`X86_CR0_PDPTR_BITS`, `X86_CR4_PDPTR_BITS`, 6.1).
const CR0_PDPTR: u64 = CR0_CD | CR0_NW | CR0_PG;
const CR4_PDPTR: u64 = CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP;

/// The guest gets #GP(0).
pub(super) struct Refused;

impl Ctx<'_> {
    /// `kvm_set_cr0` and `kvm_post_set_cr0`, 6.1. Long mode begins and ends with paging, but not in 64-bit code.
    #[inline(never)]
    pub(super) fn set_cr0(&mut self, value: u64) -> Result<(), Refused> {
        if value >> 32 != 0 {
            return Err(Refused);
        }
        let value = (value | CR0_ET) & CR0_KNOWN;
        let old = self.vcpu.regs;
        let (pg, was_pg) = (value & CR0_PG != 0, old.cr0 & CR0_PG != 0);
        if value & CR0_NW != 0 && value & CR0_CD == 0 || pg && value & CR0_PE == 0 {
            return Err(Refused);
        }
        let (lme, pae) = (old.efer & EFER_LME != 0, old.cr4 & CR4_PAE != 0);
        if lme && pg && !was_pg && !pae {
            return Err(Refused);
        }
        if !lme && pg && pae && (old.cr0 ^ value) & CR0_PDPTR != 0 {
            self.load_pdptrs(old.cr3)?;
        }
        if !pg && (old.cs_l || old.cr4 & CR4_PCIDE != 0) {
            return Err(Refused);
        }
        let efer = if lme && pg { old.efer | EFER_LMA } else { old.efer & !EFER_LMA };
        self.vcpu.regs = Registers { cr0: value, efer, ..old };
        if was_pg && !pg {
            self.vcpu.requests.raise(Requests::TLB_FLUSH_GUEST);
        }
        let changed = old.cr0 ^ value;
        let in_vain = changed == CR0_WP && !pg && !self.shadow.config.kernel.unpaged_wp_resets;
        if changed & (CR0_PG | CR0_WP) != 0 && !in_vain {
            self.reset_context();
        }
        Ok(())
    }

    /// `kvm_set_cr4` and `kvm_post_set_cr4`, 6.1. Long mode keeps PAE and LA57 as they are.
    #[inline(never)]
    pub(super) fn set_cr4(&mut self, value: u64) -> Result<(), Refused> {
        let old = self.vcpu.regs;
        let changed = old.cr4 ^ value;
        if value & !cr4_allowed(&self.shadow.config.cpu) != 0 {
            return Err(Refused);
        }
        if old.lma() {
            if value & CR4_PAE == 0 || changed & CR4_LA57 != 0 {
                return Err(Refused);
            }
        } else if old.cr0 & CR0_PG != 0 && value & CR4_PAE != 0 && changed & CR4_PDPTR != 0 {
            self.load_pdptrs(old.cr3)?;
        }
        let pcid_on = value & changed & CR4_PCIDE != 0;
        if pcid_on && (old.cr3 & 0xfff != 0 || !old.lma()) {
            return Err(Refused);
        }
        self.vcpu.regs.cr4 = value;
        if changed & CR4_ROLE != 0 {
            self.reset_context();
        }
        if pcid_on {
            let flush = self.shadow.free_all_roots(self.vcpu);
            self.pay(flush);
        }
        if changed & CR4_PGE != 0 || old.cr4 & changed & CR4_PCIDE != 0 {
            self.vcpu.requests.raise(Requests::TLB_FLUSH_GUEST);
        } else if changed & CR4_PAE != 0 || value & changed & CR4_SMEP != 0 {
            self.vcpu.requests.raise(Requests::TLB_FLUSH_CURRENT);
        }
        Ok(())
    }

    /// `set_efer`, 6.1. LMA follows LME and CR0.PG, and LME cannot change while paging is on.
    #[inline(never)]
    pub(super) fn set_efer(&mut self, value: u64) -> Result<(), Refused> {
        let old = self.vcpu.regs.efer;
        let paging = self.vcpu.regs.cr0 & CR0_PG != 0;
        if value & !EFER_ALLOWED != 0 || paging && (old ^ value) & EFER_LME != 0 {
            return Err(Refused);
        }
        self.vcpu.regs.efer = value & !EFER_LMA | old & EFER_LMA;
        if (old ^ value) & (EFER_NX | EFER_LME) != 0 {
            self.reset_context();
        }
        Ok(())
    }

    /// `kvm_set_cr3`, 6.1.
    #[inline(always)]
    pub(super) fn set_cr3(&mut self, value: u64) -> Result<(), Refused> {
        let pcide = self.vcpu.regs.cr4 & CR4_PCIDE != 0;
        let keep = pcide && value & CR3_NOFLUSH != 0;
        let value = if pcide { value & !CR3_NOFLUSH } else { value };
        let pae = self.vcpu.regs.pae_paging();
        if value != self.vcpu.regs.cr3 || pae {
            if value >> self.shadow.config.cpu.maxphyaddr != 0 {
                return Err(Refused);
            }
            if pae {
                self.load_pdptrs(value)?;
            }
            if value != self.vcpu.regs.cr3 {
                self.new_pgd(value);
            }
            self.vcpu.regs.cr3 = value;
        }
        if !keep {
            let pcid = self.vcpu.pcid();
            self.invalidate_pcid(pcid);
        }
        Ok(())
    }

    /// What a flush of one PCID means: the current root is synced if it has it, previous ones of it are let go
    /// (`kvm_invalidate_pcid`, 6.1).
    #[inline(always)]
    pub(super) fn invalidate_pcid(&mut self, pcid: u64) {
        if self.vcpu.pcid() == pcid {
            self.vcpu.requests.raise(Requests::MMU_SYNC);
            self.vcpu.requests.raise(Requests::TLB_FLUSH_CURRENT);
        }
        if self.vcpu.regs.cr4 & CR4_PCIDE != 0 {
            self.free_prev_roots_of_pcid(pcid);
        }
    }

    #[inline(never)]
    fn free_prev_roots_of_pcid(&mut self, pcid: u64) {
        let flush = self.shadow.free_prev_roots_of_pcid(self.vcpu, pcid);
        self.pay(flush);
    }

    /// `kvm_mmu_new_pgd`, 6.1.
    #[inline(never)]
    fn new_pgd(&mut self, pgd: u64) {
        let (found, flush) = self.shadow.new_pgd(self.vcpu, pgd);
        self.pay(flush);
        if found == NewPgd::Miss {
            return;
        }
        // Without `flush_on_reuse` a cached root is neither synced nor flushed here; CR3 without bit 63 asks for it.
        self.vcpu.requests.raise(Requests::LOAD_MMU_PGD);
        self.vcpu.clear_mmio();
        self.shadow.clear_root_flood(self.vcpu);
    }

    /// Reads the four PDPTEs at CR3 (`load_pdptrs`, 6.1). One that is present with reserved bits, or that cannot be read,
    /// is a #GP; a change lets the current root go, since its four pages hang on them.
    #[inline(never)]
    pub(super) fn load_pdptrs(&mut self, cr3: u64) -> Result<(), Refused> {
        let at = Gpa(cr3 & 0xffff_ffe0);
        if self.shadow.memory.slot(at.gfn()).is_none() {
            return Err(Refused);
        }
        let read: [u64; 4] = std::array::from_fn(|i| self.read_ram(Gpa(at.0 + 8 * i as u64), 8));
        let reserved = pdpte_reserved(&self.shadow.config.cpu);
        if read.iter().any(|pdpte| Gpte(*pdpte).present() && pdpte & reserved != 0) {
            return Err(Refused);
        }
        if read != self.vcpu.pdptes {
            let flush = self.shadow.free_current_root(self.vcpu);
            self.pay(flush);
        }
        self.vcpu.pdptes = read;
        self.vcpu.requests.raise(Requests::LOAD_MMU_PGD);
        Ok(())
    }

    /// Control registers that user space sets (`__set_sregs_common`, 6.1). PDPTEs that cannot be loaded stay as they
    /// were, which user space is not told.
    pub(crate) fn set_sregs(&mut self, regs: Registers) {
        let old = std::mem::replace(&mut self.vcpu.regs, regs);
        let same = (old.cr0, old.cr3, old.cr4, old.efer) == (regs.cr0, regs.cr3, regs.cr4, regs.efer);
        if regs.pae_paging() {
            let _ = self.load_pdptrs(regs.cr3);
        }
        if !same || regs.pae_paging() {
            self.reset_context();
            if self.shadow.config.kernel.sregs_flush {
                self.vcpu.requests.raise(Requests::TLB_FLUSH_GUEST);
            }
        }
    }
}
