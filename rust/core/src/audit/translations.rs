//! The shadow against the guest's tables as they are now.

use super::{Audit, may_grant};
use crate::cpu::{CpuRole, Vcpu};
use crate::guest::gpte::Gpte;
use crate::role::Role;
use crate::shadow::spte::Spte;
use crate::types::{Access, ENTRIES, Gfn, Level, PageId, SptePos};

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
        let bytes = page.role.entry_bytes();
        let gpte = Gpte(self.shadow.memory.host.entry(page.gfn, guest_index(page.role, index), bytes));
        let reads = |vcpu: &&Vcpu| vcpu.role.mode.has_tables() && vcpu.role.mode.entry_bytes == bytes;
        // A page of a mode that no vCPU is in now stays, but nobody says which bits its guest's entries have.
        let Some(role) = self.vcpus.iter().find(reads).map(|vcpu| vcpu.role.with_nx()) else { return };
        if !gpte.present() || gpte.has_reserved(&role, level) {
            self.report(format!("{} stands for {:#x}, which maps nothing", self.entry_name(pos), gpte.0));
            return;
        }
        let granted = page.role.access().and(gpte.access());
        let rights = if self.keeps_clean(page.gfn) { gpte.protect_clean(granted) } else { granted };
        if spte.is_table(level.0) {
            self.check_table(&role, pos, spte.child(), gpte, (granted, rights));
        } else {
            self.check_leaf(&role, pos, spte, gpte, rights);
        }
    }

    /// A clean page is not writable, so that the first write sets D. In a read-only slot D cannot be set, and a write
    /// counts as if it had been (2.3.4).
    fn keeps_clean(&self, table: Gfn) -> bool {
        self.shadow.memory.slot(table).is_some_and(|slot| !slot.readonly)
    }

    fn check_table(
        &mut self,
        role: &CpuRole,
        pos: SptePos,
        child: PageId,
        gpte: Gpte,
        (granted, rights): (Access, Access),
    ) {
        let arena = &self.shadow.arena;
        let (level, below) = (arena[pos.page()].level(), &arena[child]);
        let have = below.role.access();
        let (gfn, fits) = if gpte.is_leaf(role, level) {
            (part_of_leaf(role, gpte, pos, level), below.role.direct() && may_grant(rights, have, below.role))
        } else {
            (gpte.gfn(), below.has_gptes() && have == granted)
        };
        self.expect(below.gfn == gfn && fits, |a| {
            format!("{} stands for {:#x} but points to {}", a.entry_name(pos), gpte.0, a.name(child))
        });
    }

    fn check_leaf(&mut self, cpu: &CpuRole, pos: SptePos, spte: Spte, gpte: Gpte, rights: Access) {
        let arena = &self.shadow.arena;
        let (level, role) = (arena[pos.page()].level(), arena[pos.page()].role);
        let (gfn, have) =
            if spte.is_mmio() { (spte.mmio_gfn(), spte.mmio_access()) } else { (arena.mapped_gfn(pos), spte.access()) };
        let wanted = part_of_leaf(cpu, gpte, pos, level);
        let fits = gpte.is_leaf(cpu, level) && gfn == wanted && may_grant(rights, have, role);
        self.expect(fits, |a| {
            format!(
                "{} stands for {:#x}, which grants {} to gfn {wanted:#x}; it has {} for gfn {gfn:#x}",
                a.entry_name(pos),
                gpte.0,
                rights.text(),
                have.text(),
            )
        });
    }
}

/// The guest entry that entry `index` of a shadow page stands for.
const fn guest_index(role: Role, index: usize) -> usize {
    match (role.has_4_byte(), role.level()) {
        (true, Level(2)) => role.quadrant() * ENTRIES / 2 + index / 2,
        (true, _) => role.quadrant() * ENTRIES + index,
        (false, _) => index,
    }
}

/// The first frame of a guest's leaf, or of the half of 4 MiB that a shadow entry has.
const fn part_of_leaf(role: &CpuRole, gpte: Gpte, pos: SptePos, level: Level) -> Gfn {
    let first = gpte.leaf_gfn(role.mode, level);
    if role.mode.pages(level) > level.pages() { Gfn(first.0 + (pos.index() as u64 & 1) * level.pages()) } else { first }
}
