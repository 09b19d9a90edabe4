//! Finding a way anew: where all upper tables are linked, a fault needs nothing from them but where they lead.

use crate::fault::Ctx;
use crate::guest::gpte::Gpte;
use crate::guest::walk::{GuestWalk, Step};
use crate::types::{Access, Gfn, Gva, Level, PageId};

impl Ctx<'_> {
    /// Goes down the guest's tables and the shadow's together, and remembers the way to the last-level table of an
    /// address, or at least to its directory. `false`, and nothing is remembered, if that takes more than looking.
    pub(super) fn seek_way(&mut self, root: PageId, gva: Gva) -> bool {
        let (mode, top) = (self.vcpu.role.mode, self.vcpu.role.mode.top);
        if mode.pdptes || self.shadow.arena[root].level() != top || !self.is_readable(Gpte(self.vcpu.regs.cr3).gfn()) {
            return false;
        }
        if self.shadow.memory.leaks {
            return false;
        }
        let mut walk = GuestWalk { level: Level::PT, ..GuestWalk::start() };
        let (mut id, mut level) = (root, top);
        let mut step = Step { table: Gpte(self.vcpu.regs.cr3).gfn(), pte: Gpte(0), access: Access::ALL };
        let mut path = [root; 5];
        while level > Level::PD {
            let Some((child, below)) = self.linked_below(id, &mut step, gva, level) else { return false };
            walk.steps[usize::from(level.0) - 1] = step;
            (id, step, level) = (child, below, level.down());
            path[usize::from(level.0) - 1] = id;
        }
        walk.steps[1] = step;
        let below = self.linked_below(id, &mut step, gva, level);
        self.ways.remember_directory((root, gva), self.shadow, &path, &walk);
        if let Some((table, last)) = below {
            let contents = self.shadow.memory.host.contents(last.table);
            self.ways.remember(gva, table, (step.pte, contents, last.access));
        }
        true
    }

    /// The same, if it comes to the last-level table.
    #[inline(never)]
    pub(super) fn seek_last_way(&mut self, root: PageId, gva: Gva) -> bool {
        self.seek_way(root, gva) && self.ways.find(root, gva, self.shadow).is_some()
    }

    /// Whether a walk can read a table without bringing its page in.
    pub(super) fn is_readable(&self, table: Gfn) -> bool {
        self.shadow.memory.has_slot(table) && self.shadow.memory.host.present(table)
    }

    /// Reads the guest's entry of one level, and gives the shadow page and the guest's table below if the one is linked
    /// for the other and a walk would change nothing.
    fn linked_below(&self, id: PageId, step: &mut Step, gva: Gva, level: Level) -> Option<(PageId, Step)> {
        let role = &self.vcpu.role;
        let index = role.mode.index(gva, level);
        let pte = Gpte(self.shadow.memory.host.entry(step.table, index, role.mode.entry_bytes));
        step.pte = pte;
        if !pte.leads_on(role, level) || !self.is_readable(pte.gfn()) {
            return None;
        }
        let below = Step { table: pte.gfn(), pte: Gpte(0), access: step.access.and(pte.access()) };
        let pos = id.entry(gva.index(level));
        let child = self.shadow.arena[id].role.child(pos.index(), false, below.access);
        self.shadow.is_linked(pos, below.table, child).then(|| (self.shadow.spte(pos).child(), below))
    }
}
