//! What a walk of the hardware reads and what it exits for, once the guest's own walk has gone through.

use crate::bits::{CR4_PGE, PT_G};
use crate::engine::Vm;
use crate::guest::walk::GuestWalk;
use crate::memory::Host;
use crate::mode::Mode;
use crate::paging::Nested;
use crate::paging::stage::StageExit;
use crate::types::{Gva, Level};

/// How a page is accessed.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    /// By a store that the CPU carries out, so that D is set.
    pub(super) write: bool,
    /// By the hypervisor, after an exit.
    pub(super) emulated: bool,
}

impl Nested {
    /// What the hardware did for an access that goes through. What the hypervisor emulates (`emulated`) took its exit already.
    pub(super) fn count(&mut self, vm: &mut Vm, number: usize, gva: Gva, walk: &GuestWalk, how: How) {
        let How { write, emulated } = how;
        let vcpu = &vm.vcpus[number];
        let (mode, pcid) = (vcpu.role.mode, vcpu.pcid());
        let pge = vcpu.regs.cr4 & CR4_PGE != 0;
        self.counts.accesses += 1;
        if self.cpus[number].hit(gva, pcid, write) {
            self.counts.hits += 1;
            return;
        }
        self.counts.misses += 1;
        let (mut shadowed, mut filled, mut global) = (false, emulated, false);
        if mode.has_tables() {
            let start = self.cpus[number].begin_walk(gva, pcid, (mode.top, mode.index_bits), walk.level);
            let leaf = walk.steps[usize::from(walk.level.0) - 1];
            let at = self.changeover(&vm.shadow.memory.host, mode, gva, walk, &mut filled);
            self.walk_tables(vm, number, walk, (mode.top, start, at), emulated);
            shadowed = at.0 == 0;
            global = pge && leaf.pte.0 & PT_G != 0 && !shadowed;
        }
        if !shadowed {
            self.counts.host_references += self.cpus[number].stage_walk(walk.gfn, self.stage.level());
        } else if let Some(agile) = &mut self.agile {
            agile.note_references(u64::from(walk.level.0.saturating_sub(self.stage.level().0)));
        }
        let exit = self.stage.touch(vm, walk.gfn, write);
        // The exit that fills the shadow down to the page brings that, too.
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
        let (missing, neighbours) = agile.fill(host, walk, mode, (gva, at, walk.level.min(self.stage.level())));
        // What a fill brings beside is resolved to the host's pages, too.
        for gfn in neighbours.into_iter().flatten() {
            self.stage.bring(gfn);
        }
        if missing && !*filled {
            agile.note_fill();
        }
        // A fill that ends above the last level leaves the CPU to walk on, so that the page has an exit of its own.
        *filled |= missing && at.0 == 0;
        at
    }

    /// The tables of a walk from level `start` on: shadow tables above the changeover, the guest's own from there.
    fn walk_tables(
        &mut self,
        vm: &mut Vm,
        number: usize,
        walk: &GuestWalk,
        (top, start, at): (Level, Level, Level),
        emulated: bool,
    ) {
        for level in (walk.level.0..=start.0).rev() {
            let table = walk.steps[usize::from(level) - 1].table;
            if level > at.0 {
                self.agile.iter_mut().for_each(|agile| agile.note_references(1));
                continue;
            }
            // The CPU may set A there: to the second stage a walk's read is a write (APM vol. 2 section 15.25.5).
            let exit = self.stage.touch(vm, table, true);
            self.note(if emulated { StageExit::None } else { exit });
            // What changes over (a shadow entry, or the root's pair) names the table's own frame, and so does a page-walk
            // cache (combined mappings: SDM vol. 3, section "Caching Translation Information" of EPT).
            let cached = level == start.0 && start < top;
            let named = self.agile.is_some() && level == at.0;
            if !cached && !named && !self.cpus[number].nested_hit(self.stage.unit(table)) {
                self.counts.host_references += self.cpus[number].stage_walk(table, self.stage.level());
            }
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
