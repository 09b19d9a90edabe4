//! Remembered ways of faults: what they say of the tables is what the tables say.

use super::Audit;
use crate::cpu::Vcpu;
use crate::fault::ways::{DirectoryWay, Way, Ways};
use crate::guest::gpte::Gpte;
use crate::types::{Access, Gfn, Gva, Level, PageId};

/// What the guest's tables and the shadow's say of a table on the way of an address.
struct Met {
    /// The guest's table, and its entry for the address.
    table: Gfn,
    pte: Gpte,
    /// The rights above it.
    granted: Access,
    /// The shadow's table.
    page: PageId,
}

impl Audit<'_> {
    /// Each way that still holds for a root of the vCPU: the shadow's links and the guest's entries are as remembered.
    pub(super) fn check_ways(&mut self, vcpu: &Vcpu, ways: &Ways) {
        let roots: Vec<_> = std::iter::once(vcpu.root).chain(vcpu.prev_roots).filter_map(|root| root.page()).collect();
        let (last, directories) = ways.all(self.shadow);
        let last = last.into_iter().filter(|way| roots.contains(&way.pages().0));
        let last = last.map(|way| (way.first_address(), self.last_agrees(vcpu, way)));
        let directories = directories.into_iter().filter(|way| roots.contains(&way.root()));
        let directories = directories.map(|way| (way.first_address(), self.directory_agrees(vcpu, way)));
        for (gva, agrees) in last.chain(directories).collect::<Vec<_>>() {
            self.expect(agrees, |_| format!("vCPU {} remembers a way to {gva:#x} that is no more", vcpu.id));
        }
    }

    fn last_agrees(&self, vcpu: &Vcpu, way: &Way) -> bool {
        let (root, directory) = way.pages();
        let met = self.go(vcpu, root, way.first_address(), Level::PT);
        let [.., above, last] = met.as_slice() else { return false };
        let contents = self.shadow.memory.host.contents(last.table);
        (above.page, above.pte, last.page, last.granted) == (directory, way.pde, way.table, way.granted)
            && way.contents(&self.shadow.memory.host) == contents
    }

    fn directory_agrees(&self, vcpu: &Vcpu, way: &DirectoryWay) -> bool {
        let met = self.go(vcpu, way.root(), way.first_address(), Level::PD);
        let contents = met.last().map(|met| self.shadow.memory.host.contents(met.table));
        met.iter().rev().enumerate().all(|(i, met)| {
            let (step, page) = (&way.walk.steps[i + 1], way.path[i + 1]);
            // Its own entry is another for each address below it.
            (step.table, step.access, page) == (met.table, met.granted, met.page) && (i == 0 || step.pte == met.pte)
        }) && contents == Some(way.contents(&self.shadow.memory.host))
            && met.last().is_some_and(|met| met.page == way.directory())
    }

    /// Goes down to a level as far as the shadow's links are the guest's; nothing if that is not so far.
    fn go(&self, vcpu: &Vcpu, root: PageId, gva: Gva, down_to: Level) -> Vec<Met> {
        let (mode, host) = (vcpu.role.mode, &self.shadow.memory.host);
        let (mut table, mut granted, mut page) = (self.shadow.arena[root].gfn, Access::ALL, root);
        let (mut met, mut level) = (Vec::new(), mode.top);
        loop {
            let pte = Gpte(host.entry(table, mode.index(gva, level), mode.entry_bytes));
            if self.shadow.arena[page].gfn != table || self.shadow.arena[page].level() != level || !self.is_valid(page)
            {
                return Vec::new();
            }
            met.push(Met { table, pte, granted, page });
            if level == down_to {
                return met;
            }
            let spte = self.shadow.spte(page.entry(gva.index(level)));
            if !spte.is_table(level.0) {
                return Vec::new();
            }
            (table, granted, page) = (pte.gfn(), granted.and(pte.access()), spte.child());
            level = level.down();
        }
    }
}
