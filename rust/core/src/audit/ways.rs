//! Remembered ways of faults: what they say of the tables is what the tables say.

use super::Audit;
use crate::cpu::Vcpu;
use crate::fault::ways::{Way, Ways};
use crate::types::Level;

impl Audit<'_> {
    /// Each way that still holds for a root of the vCPU: the shadow's links and the guest's entries are as remembered.
    pub(super) fn check_ways(&mut self, vcpu: &Vcpu, ways: &Ways) {
        let roots: Vec<_> = std::iter::once(vcpu.root).chain(vcpu.prev_roots).filter_map(|root| root.page()).collect();
        for way in ways.all(self.shadow).filter(|way| roots.contains(&way.root())) {
            let (shadow, guest) = (self.shadow_agrees(way), self.guest_agrees(vcpu, way));
            self.expect(shadow && guest, |_| {
                format!("vCPU {} remembers a way to {:#x} that is no more", vcpu.id, way.first_address())
            });
        }
    }

    fn shadow_agrees(&self, way: &Way) -> bool {
        let (mut id, mut level) = (way.root(), self.shadow.arena[way.root()].level());
        while level > way.level {
            if way.path[usize::from(level.0) - 1] != id {
                return false;
            }
            let spte = self.shadow.spte(id.entry(way.first_address().index(level)));
            if !spte.is_table(level.0) || !self.is_valid(spte.child()) {
                return false;
            }
            (id, level) = (spte.child(), level.down());
        }
        id == way.table() && self.shadow.arena[id].gfn == way.walk.steps[usize::from(way.level.0) - 1].table
    }

    fn guest_agrees(&self, vcpu: &Vcpu, way: &Way) -> bool {
        let mode = vcpu.role.mode;
        let host = &self.shadow.memory.host;
        let contents = way.level > Level::PT || way.contents(host) == host.contents(way.walk.steps[0].table);
        contents
            && (way.level.0 + 1..=mode.top.0).all(|level| {
                let step = &way.walk.steps[usize::from(level) - 1];
                let at = mode.index(way.first_address(), Level(level));
                host.entry(step.table, at, mode.entry_bytes) == step.pte.0
                    && way.walk.steps[usize::from(level) - 2].table == step.pte.gfn()
            })
    }
}
