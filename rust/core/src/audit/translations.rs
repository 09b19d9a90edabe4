//! The shadow against the guest's tables as they are now.

use super::{Audit, may_grant};
use crate::bits::PT_NX;
use crate::cpu::CpuRole;
use crate::guest::gpte::Gpte;
use crate::shadow::spte::Spte;
use crate::types::{Access, Gfn, Level, PageId, SptePos};

impl Audit<'_> {
    /// See [`crate::engine::Vm::audit_translations`].
    pub(super) fn check_translations(&mut self) {
        for id in self.live.clone() {
            let page = &self.shadow.arena[id];
            // What lags behind by right, and what has no guest table: a direct page is judged by the entry above it.
            if !self.is_valid(id) || page.unsync || page.role.direct() {
                continue;
            }
            for index in crate::shadow::page::bits(&page.used) {
                self.check_entry(id, index);
            }
        }
    }

    fn check_entry(&mut self, id: PageId, index: usize) {
        let page = &self.shadow.arena[id];
        let level = page.level();
        let pos = id.entry(index);
        let spte = self.shadow.spte(pos);
        let gpte = Gpte(self.shadow.memory.host.entry(page.gfn, index));
        let Some(role) = self.vcpus.first().map(|vcpu| with_nx(vcpu.role)) else { return };
        if !gpte.present() || gpte.has_reserved(&role, level) {
            self.report(format!("{} stands for {:#x}, which maps nothing", self.entry_name(pos), gpte.0));
            return;
        }
        let granted = page.role.access().and(gpte.access());
        let rights = if self.keeps_clean(page.gfn) { gpte.protect_clean(granted) } else { granted };
        if spte.is_table(level.0) {
            self.check_table(pos, spte.child(), gpte, granted, rights);
        } else {
            self.check_leaf(pos, spte, gpte, rights);
        }
    }

    /// A clean page is not writable, so that the first write sets D. In a read-only slot D cannot be set, and a write
    /// counts as if it had been (2.3.4).
    fn keeps_clean(&self, table: Gfn) -> bool {
        self.shadow.memory.slot(table).is_some_and(|slot| !slot.readonly)
    }

    fn check_table(&mut self, pos: SptePos, child: PageId, gpte: Gpte, granted: Access, rights: Access) {
        let arena = &self.shadow.arena;
        let (level, below) = (arena[pos.page()].level(), &arena[child]);
        let have = below.role.access();
        let (gfn, fits) = if gpte.is_leaf(level) {
            (gpte.gfn(level), below.role.direct() && may_grant(rights, have, below.role))
        } else {
            (gpte.gfn(Level::PT), below.has_gptes() && have == granted)
        };
        self.expect(below.gfn == gfn && fits, |a| {
            format!("{} stands for {:#x} but points to {}", a.entry_name(pos), gpte.0, a.name(child))
        });
    }

    fn check_leaf(&mut self, pos: SptePos, spte: Spte, gpte: Gpte, rights: Access) {
        let arena = &self.shadow.arena;
        let (level, role) = (arena[pos.page()].level(), arena[pos.page()].role);
        let (gfn, have) =
            if spte.is_mmio() { (spte.mmio_gfn(), spte.mmio_access()) } else { (arena.mapped_gfn(pos), spte.access()) };
        let fits = gpte.is_leaf(level) && gfn == gpte.gfn(level) && may_grant(rights, have, role);
        self.expect(fits, |a| {
            format!(
                "{} stands for {:#x}, which grants {} to gfn {:#x}; it has {} for gfn {gfn:#x}",
                a.entry_name(pos),
                gpte.0,
                rights.text(),
                gpte.gfn(level),
                have.text(),
            )
        });
    }
}

/// The rules of a walk with EFER.NX on.
const fn with_nx(role: CpuRole) -> CpuRole {
    CpuRole { nx: true, reserved: role.reserved & !PT_NX, ..role }
}
