//! What a walk of the hardware reads and what it exits for, once the guest's own walk has gone through.

use crate::bits::{CR4_PGE, PT_G};
use crate::engine::Vm;
use crate::guest::walk::GuestWalk;
use crate::memory::Host;
use crate::mode::Mode;
use crate::paging::Nested;
use crate::paging::stage::StageExit;
use crate::types::{Gva, Level};

impl Nested {
    /// What the hardware did for an access that goes through.
    pub(super) fn count(&mut self, vm: &mut Vm, number: usize, gva: Gva, walk: &GuestWalk, write: bool) {
        let vcpu = &vm.vcpus[number];
        let (mode, pcid) = (vcpu.role.mode, vcpu.pcid());
        let pge = vcpu.regs.cr4 & CR4_PGE != 0;
        self.counts.accesses += 1;
        if self.cpus[number].hit(gva, pcid, write) {
            self.counts.hits += 1;
            return;
        }
        self.counts.misses += 1;
        let (mut shadowed, mut filled, mut global) = (false, false, false);
        if mode.has_tables() {
            let start = self.cpus[number].begin_walk(gva, pcid, (mode.top, mode.index_bits), walk.level);
            let leaf = walk.steps[usize::from(walk.level.0) - 1];
            let at = self.changeover(&vm.shadow.memory.host, mode, gva, walk, &mut filled);
            self.walk_tables(vm, number, walk, start, at);
            shadowed = at.0 == 0;
            global = pge && leaf.pte.0 & PT_G != 0 && !shadowed;
        }
        if !shadowed {
            self.counts.host_references += self.stage.depth();
        } else if let Some(agile) = &mut self.agile {
            agile.note_references(u64::from(walk.level.0.saturating_sub(self.stage.level().0)));
        }
        let exit = self.stage.touch(vm, walk.gfn, write);
        // The exit that fills the shadow brings the page, too.
        self.note(if filled { StageExit::None } else { exit });
        // A page is kept at the smaller of its two sizes.
        let level = walk.level.min(self.stage.level()).max(Level::PT);
        self.cpus[number].fill(gva, pcid, level, (global, write));
    }

    /// The level of the first table that the CPU reads itself: the top without agile paging, 0 if the whole walk is in
    /// the shadow.
    fn changeover(&mut self, host: &Host, mode: &Mode, gva: Gva, walk: &GuestWalk, filled: &mut bool) -> Level {
        let Some(agile) = &mut self.agile else { return mode.top };
        let at = agile.changeover(walk, mode.top, walk.level);
        *filled = agile.fill(host, walk, mode, (gva, at, walk.level.min(self.stage.level())));
        at
    }

    /// The tables of a walk from level `start` on: shadow tables above the changeover, the guest's own from there.
    fn walk_tables(&mut self, vm: &mut Vm, number: usize, walk: &GuestWalk, start: Level, at: Level) {
        for level in (walk.level.0..=start.0).rev() {
            let table = walk.steps[usize::from(level) - 1].table;
            if level > at.0 {
                self.agile.iter_mut().for_each(|agile| agile.note_references(1));
                continue;
            }
            // The CPU may set A there: to the second stage a walk's read is a write (APM vol. 2 section 15.25.5).
            let exit = self.stage.touch(vm, table, true);
            self.note(exit);
            // What changes over (a shadow entry, or the root's pair) names the table's own frame.
            let named = self.agile.is_some() && level == at.0;
            let known = named || self.cpus[number].nested_hit(self.stage.unit(table));
            self.counts.host_references += if known { 0 } else { self.stage.depth() };
            self.counts.guest_references += 1;
        }
    }

    const fn note(&mut self, exit: StageExit) {
        match exit {
            StageExit::None => {}
            StageExit::Fault => self.counts.stage_faults += 1,
            StageExit::Dirty => self.counts.dirty_faults += 1,
        }
    }
}
