//! Which translations a vCPU may still hold: what flushed them, and when.

use crate::walk::{Access, Kind, Memory, Mode, Page, Version, Window, any_walk};
use shadowkvm_core::bits::{CR0_WP, CR4_PCIDE, CR4_PGE, CR4_SMAP, CR4_SMEP, EFER_NX};
use shadowkvm_core::cpu::Registers;
use std::collections::BTreeMap;

/// What a vCPU knows under one PCID.
#[derive(Default)]
struct Context {
    /// The last flush of everything.
    all: u64,
    /// Later flushes of one page.
    pages: BTreeMap<u64, u64>,
    /// Later flushes of upper entries: each INVLPG is one.
    upper: Vec<u64>,
    /// The roots that were used.
    roots: Vec<Version>,
}

/// The TLB of one vCPU.
pub(crate) struct Tlb {
    regs: Registers,
    contexts: BTreeMap<u64, Context>,
    maxphyaddr: u32,
}

fn pcid(regs: &Registers) -> u64 {
    if regs.cr4 & CR4_PCIDE != 0 { regs.cr3 & 0xfff } else { 0 }
}

impl Tlb {
    pub(crate) fn new(regs: Registers, maxphyaddr: u32) -> Self {
        let mut tlb = Self { regs, contexts: BTreeMap::new(), maxphyaddr };
        tlb.use_root(0);
        tlb
    }

    pub(crate) fn mode(&self) -> Mode {
        Mode {
            nx: self.regs.efer & EFER_NX != 0,
            wp: self.regs.cr0 & CR0_WP != 0,
            smep: self.regs.cr4 & CR4_SMEP != 0,
            smap: self.regs.cr4 & CR4_SMAP != 0,
            maxphyaddr: self.maxphyaddr,
        }
    }

    pub(crate) fn has_other_regs(&self, regs: &Registers) -> bool {
        self.regs != *regs
    }

    pub(crate) fn root(&self) -> u64 {
        (self.regs.cr3 & 0x000f_ffff_ffff_f000) >> 12
    }

    fn use_root(&mut self, now: u64) {
        let root = self.root();
        for context in self.contexts.values_mut() {
            context.roots.iter_mut().filter(|v| v.to == u64::MAX).for_each(|v| v.to = now);
        }
        let context = self.contexts.entry(pcid(&self.regs)).or_default();
        context.roots.push(Version { value: root, from: now, to: u64::MAX });
    }

    fn flush_pcid(&mut self, pcid: u64, now: u64) {
        let context = self.contexts.entry(pcid).or_default();
        let roots = std::mem::take(&mut context.roots);
        let roots = roots.into_iter().filter(|v| v.to >= now).collect();
        *context = Context { all: now, roots, ..Context::default() };
    }

    pub(crate) fn flush_all(&mut self, now: u64) {
        for pcid in self.contexts.keys().copied().collect::<Vec<_>>() {
            self.flush_pcid(pcid, now);
        }
    }

    /// INVLPG; a guest's #PF on a page that is there does the same (SDM vol. 3, 4.10.4.1).
    pub(crate) fn flush_page(&mut self, gva: u64, now: u64, upper: bool) {
        let context = self.contexts.entry(pcid(&self.regs)).or_default();
        context.pages.insert(gva >> 12, now);
        if upper {
            context.upper.push(now);
        }
    }

    /// CR3 was written, without a fault; bit 63 keeps the TLB.
    pub(crate) fn load_cr3(&mut self, value: u64, regs: Registers, now: u64) {
        let keep = regs.cr4 & CR4_PCIDE != 0 && value >> 63 != 0;
        self.regs = regs;
        self.use_root(now);
        if !keep {
            self.flush_pcid(pcid(&regs), now);
        }
    }

    /// Other registers were written: what x86 flushes for it.
    pub(crate) fn set_regs(&mut self, regs: Registers, now: u64) {
        let (old, new) = (self.regs.cr4, regs.cr4);
        let moved = pcid(&self.regs) != pcid(&regs) || self.regs.cr3 != regs.cr3;
        self.regs = regs;
        if moved {
            self.use_root(now);
        }
        if (old ^ new) & CR4_PGE != 0 || old & !new & CR4_PCIDE != 0 || new & !old & CR4_SMEP != 0 {
            self.flush_all(now);
        }
    }

    /// User space set the registers: nothing of before is left, unless they are what they were.
    pub(crate) fn reset(&mut self, regs: Registers, now: u64) {
        if self.regs == regs {
            return;
        }
        self.regs = regs;
        self.contexts.clear();
        self.use_root(now);
        self.flush_all(now);
    }

    /// Whether the vCPU may hold a translation of the page for which `good` holds.
    pub(crate) fn may_hold(&self, memory: &Memory, gva: u64, mut good: impl FnMut(Page) -> bool) -> bool {
        let Some(context) = self.contexts.get(&pcid(&self.regs)) else { return false };
        let first = context.pages.get(&(gva >> 12)).copied().unwrap_or(0).max(context.all);
        let mut from = first;
        let later = context.upper.iter().copied().filter(|time| *time > first);
        for to in later.chain([u64::MAX]) {
            let window = Window { from, to, roots: &context.roots };
            if any_walk(memory, &window, gva, self.mode(), &mut good) {
                return true;
            }
            from = to;
        }
        false
    }

    /// With CR0.WP off, a supervisor's store makes a read-only user page a writable supervisor page for KVM, which SMAP
    /// then does not guard (`FNAME(page_fault)`, 6.1; with SMAP on it takes EFLAGS.AC to get there).
    fn as_kvm_sees(&self, access: &Access) -> Access {
        Access { ac: access.ac || !self.mode().wp, ..*access }
    }

    /// Whether this translation lets the access to that frame through: the rights suffice, A (and D) are set.
    pub(crate) fn serves(&self, page: Page, access: &Access, gfn: u64) -> bool {
        let marked = page.a && (page.d || access.kind != Kind::Write);
        page.gfn == gfn && marked && page.permits(&self.as_kvm_sees(access), self.mode())
    }

    /// The frames that the access may go to, whatever A and D say: the access itself may set them.
    pub(crate) fn targets(&self, memory: &Memory, access: &Access) -> Vec<u64> {
        let (mut found, mode, access) = (Vec::new(), self.mode(), &self.as_kvm_sees(access));
        self.may_hold(memory, access.gva, |page| {
            if page.permits(access, mode) && !found.contains(&page.gfn) {
                found.push(page.gfn);
            }
            false
        });
        found
    }
}
