//! Which translations a vCPU may still hold: what flushed them, and when (SDM vol. 3, 4.10.4).

use super::control::State;
use super::memory::Memory;
use super::rules::{Access, Kind, Mode, Page, Seen};
use super::walk::{Base, Root, Window, any_walk};
use crate::world::Paging;
use shadowkvm_core::bits::{CR0_PG, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_SMEP};
use shadowkvm_core::config::CpuFeatures;
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
    roots: Vec<Root>,
}

/// The TLB of one vCPU.
pub(crate) struct Tlb {
    pub(crate) state: State,
    contexts: BTreeMap<u64, Context>,
    /// Flushes of one page under any PCID, for global translations.
    globals: BTreeMap<u64, u64>,
    cpu: CpuFeatures,
}

const fn pcid(regs: &Registers) -> u64 {
    if regs.cr4 & CR4_PCIDE != 0 { regs.cr3 & 0xfff } else { 0 }
}

impl Tlb {
    pub(crate) fn new(state: State, cpu: CpuFeatures) -> Self {
        let mut tlb = Self { state, contexts: BTreeMap::new(), globals: BTreeMap::new(), cpu };
        tlb.use_root(0);
        tlb
    }

    pub(crate) fn mode(&self) -> Mode {
        Mode::new(&self.state.regs, self.state.pkru, self.cpu)
    }

    pub(crate) fn base(&self) -> Base {
        self.state.base()
    }

    fn use_root(&mut self, now: u64) {
        let root = Root { base: self.base(), from: now, to: u64::MAX };
        for context in self.contexts.values_mut() {
            context.roots.iter_mut().filter(|v| v.to == u64::MAX).for_each(|v| v.to = now);
        }
        self.contexts.entry(pcid(&self.state.regs)).or_default().roots.push(root);
    }

    fn flush_pcid(&mut self, pcid: u64, now: u64) {
        let context = self.contexts.entry(pcid).or_default();
        let roots = std::mem::take(&mut context.roots);
        let roots = roots.into_iter().filter(|v| v.to >= now).collect();
        *context = Context { all: now, roots, ..Context::default() };
    }

    fn flush_all(&mut self, now: u64) {
        self.globals.clear();
        for pcid in self.contexts.keys().copied().collect::<Vec<_>>() {
            self.flush_pcid(pcid, now);
        }
    }

    /// A guest's #PF on a page that is there drops its translations.
    pub(crate) fn page_fault(&mut self, gva: u64, now: u64) {
        self.flush_page(pcid(&self.state.regs), gva, now);
    }

    fn flush_page(&mut self, pcid: u64, gva: u64, now: u64) {
        self.contexts.entry(pcid).or_default().pages.insert(gva >> 12, now);
    }

    /// The page under this PCID, all upper entries under it, and the page's global translations under all.
    pub(crate) fn invlpg(&mut self, gva: u64, now: u64) {
        let pcid = pcid(&self.state.regs);
        self.flush_page(pcid, gva, now);
        self.contexts.entry(pcid).or_default().upper.push(now);
        self.globals.insert(gva >> 12, now);
    }

    pub(crate) fn invpcid(&mut self, kind: u64, [pcid, gva]: [u64; 2], now: u64) {
        match kind {
            0 => self.flush_page(pcid, gva, now),
            1 => self.flush_pcid(pcid, now),
            // Type 3 spares global translations; KVM makes no difference (`kvm_handle_invpcid`, 6.1).
            _ => self.flush_all(now),
        }
    }

    /// CR3 was written, without a fault; bit 63 keeps the TLB.
    pub(crate) fn load_cr3(&mut self, value: u64, new: State, now: u64) {
        let keep = new.regs.cr4 & CR4_PCIDE != 0 && value >> 63 != 0;
        self.state = new;
        self.use_root(now);
        if !keep {
            self.flush_pcid(pcid(&new.regs), now);
        }
    }

    /// Other registers were written: what x86 flushes for it. While paging is off nothing is cached.
    pub(crate) fn set_state(&mut self, new: State, now: u64) {
        let (old, regs) = (self.state.regs, new.regs);
        let moved = pcid(&old) != pcid(&regs) || self.base() != new.base();
        self.state = new;
        if moved {
            self.use_root(now);
        }
        let changed = (old.cr0 ^ regs.cr0) & CR0_PG | (old.cr4 ^ regs.cr4) & (CR4_PGE | CR4_PAE);
        if changed != 0 || old.cr4 & !regs.cr4 & CR4_PCIDE != 0 || regs.cr4 & !old.cr4 & CR4_SMEP != 0 {
            self.flush_all(now);
        }
    }

    /// User space set the registers: nothing of before is left, unless they are what they were; KVM reads the PDPTEs
    /// again in any case (`__set_sregs`, 6.1).
    pub(crate) fn reset(&mut self, new: State, now: u64) {
        let old = Registers { cs_l: new.regs.cs_l, ..self.state.regs };
        self.state = new;
        if old == new.regs && new.paging() != Paging::Pae {
            return;
        }
        self.contexts.clear();
        self.use_root(now);
        self.flush_all(now);
    }

    /// Whether the vCPU may hold a translation of the page for which `good` holds.
    pub(crate) fn may_hold(&self, memory: &Memory, seen: Seen, gva: u64, mut good: impl FnMut(Page) -> bool) -> bool {
        let Some(context) = self.contexts.get(&pcid(&self.state.regs)) else { return false };
        let page = gva >> 12;
        let first = context.pages.get(&page).copied().unwrap_or(0).max(context.all);
        let global = if self.state.regs.cr4 & CR4_PGE != 0 { self.globals.get(&page).copied() } else { None };
        let global = global.unwrap_or(0);
        let mut from = first;
        let later = context.upper.iter().copied().filter(|time| *time > first);
        for to in later.chain([u64::MAX]) {
            let window = Window { from, to, roots: &context.roots, global, seen };
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

    /// Whether this translation lets the access to that frame through: the rights suffice, A (and D) are set. The key
    /// is not asked: all shadow entries have key 0.
    pub(crate) fn serves(&self, page: Page, access: &Access, gfn: u64) -> bool {
        let marked = page.a && (page.d || access.kind != Kind::Write);
        page.gfn == gfn && marked && page.permits(&self.as_kvm_sees(access), self.mode())
    }

    /// The frames that the access may go to, whatever A and D say: the access itself may set them. `keys`: those to
    /// which the protection keys let it.
    pub(crate) fn targets(&self, memory: &Memory, seen: Seen, access: &Access, keys: bool) -> Vec<u64> {
        let (mut found, mode) = (Vec::new(), self.mode());
        if !mode.takes(access.gva) {
            return found;
        }
        let access = &self.as_kvm_sees(access);
        self.may_hold(memory, seen, access.gva, |page| {
            if page.permits(access, mode) && !(keys && page.locked(access, mode)) && !found.contains(&page.gfn) {
                found.push(page.gfn);
            }
            false
        });
        found
    }
}
