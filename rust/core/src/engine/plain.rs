//! Plain accesses: a load, a store or a fetch on one page, which is what most instructions and most rows of a trace are.
//!
//! They are run without the ways that they do not go: no instruction's own fetch, no REP, no event delivery. One that
//! the shadow allows is a walk and a copy; one that a fault must repair first takes the short way of `fault::quick`.
//! Whatever is not plain after all is left to `engine::access`, as if nothing had been tried.

use crate::cpu::Requests;
use crate::engine::Vm;
use crate::fault::Ctx;
use crate::fault::quick::{Plain, Quick};
use crate::hw::walk::access_entry;
use crate::memory::Host;
use crate::outcome::Outcome;
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva, Level, PageId, SptePos};

/// How far a plain access came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ran {
    /// It is over.
    Ended(Outcome),
    /// Nothing was done.
    NotAtAll,
    /// A fault was handled in full, and the instruction runs again.
    Again,
    /// A fault was handled to where the store turned out to be write-protected; it goes to one of its own tables or not.
    Protected(bool),
}

impl Vm {
    /// Runs a plain access as far as it stays plain.
    #[inline]
    pub(crate) fn run_plain(&mut self, vcpu: usize, plain: &Plain) -> Ran {
        if vcpu >= self.vcpus.len() {
            return Ran::NotAtAll;
        }
        self.with(vcpu, |ctx| ctx.run_plain(plain))
    }
}

impl Ctx<'_> {
    #[inline]
    fn run_plain(&mut self, plain: &Plain) -> Ran {
        let Some(root) = self.vcpu.root.table(plain.gva) else { return Ran::NotAtAll };
        let role = &self.vcpu.role;
        let plainly = self.vcpu.requests == Requests::default() && role.mode.takes(plain.gva) && !role.pke;
        if !plainly || plain.gva.offset() + u64::from(plain.size) > 4096 {
            return Ran::NotAtAll;
        }
        let end = self.walk_near(root, plain.gva);
        match access_entry(self.shadow, &self.vcpu.role, end, plain.gva, (plain.kind, plain.view())) {
            Ok(frame) => self.finish_plain(plain, frame),
            Err(code) => self.fault_plain(plain, code),
        }
    }

    /// The end of the shadow's walk, by the way that the last one nearby has gone, if it is still true.
    #[inline(always)]
    pub(super) fn walk_near(&mut self, root: PageId, gva: Gva) -> (SptePos, Level) {
        let directory = match self.ways.near(root, gva, self.shadow) {
            Some(directory) => directory,
            None => match self.seek_near(root, gva) {
                Ok(directory) => directory,
                Err(end) => return end,
            },
        };
        self.shadow.walk_directory(directory, gva)
    }

    /// Walks to the directory of an address; the error is where the walk ends before.
    #[inline(never)]
    fn seek_near(&mut self, root: PageId, gva: Gva) -> Result<PageId, (SptePos, Level)> {
        let directory = self.shadow.directory(root, gva)?;
        self.ways.remember_near(root, gva, self.shadow, directory);
        Ok(directory)
    }

    /// The load or store itself. No address is the zero page, which reads as 0 and which a writable entry never maps;
    /// nobody asks for it if no value is moved.
    #[inline(always)]
    pub(super) fn touch_plain(&mut self, plain: &Plain, gpa: impl FnOnce() -> Option<Gpa>) -> Outcome {
        let mut outcome = Outcome::done(0);
        if let Some(value) = plain.value {
            let host = &mut self.shadow.memory.host;
            match (gpa(), plain.kind) {
                (Some(gpa), AccessKind::Read) => outcome.value = host.read(gpa, plain.size),
                (Some(gpa), AccessKind::Write) => host.write(gpa, plain.size, value),
                _ => {}
            }
        }
        outcome
    }

    /// The end of an access that the shadow allows: its load or store.
    #[inline(always)]
    pub(super) fn finish_plain(&mut self, plain: &Plain, frame: Option<Gfn>) -> Ran {
        self.vcpu.counters.x_ops += 1;
        self.vcpu.injected = None;
        self.shadow.events.op += 1;
        Ran::Ended(self.touch_plain(plain, || Some(Gpa(frame?.gpa().0 | plain.gva.offset()))))
    }

    /// The access ends with something else than its own load or store.
    #[inline]
    fn end_plain(&mut self, end: impl FnOnce(&mut Self) -> Outcome) -> Ran {
        self.vcpu.counters.x_ops += 1;
        self.vcpu.injected = None;
        let outcome = end(self);
        self.shadow.events.op += 1;
        Ran::Ended(outcome)
    }

    #[inline]
    pub(super) fn fault_plain(&mut self, plain: &Plain, code: ErrorCode) -> Ran {
        if code.has(ErrorCode::RSVD) || self.shadow.events.wants_any() {
            return Ran::NotAtAll;
        }
        match self.quick_fault(plain, code) {
            Quick::No => Ran::NotAtAll,
            Quick::Guest(fault) => self.end_plain(|ctx| ctx.reflect(fault)),
            Quick::Stored => self.end_plain(|ctx| ctx.leave(Outcome::done(0))),
            Quick::Protected { write_to_table } => Ran::Protected(write_to_table),
            // Unless KVM has to do something first, the access goes on by the entry that was repaired.
            Quick::Mapped(_) if self.vcpu.requests != Requests::default() => Ran::Again,
            Quick::Mapped(pos) => {
                let (end, what) = ((pos, Level::PT), (plain.kind, plain.view()));
                let leaf = self.shadow.spte(pos);
                if plain.view().leaf_test(&self.vcpu.role, plain.kind).passes(leaf.0) {
                    return self.finish_plain(plain, Host::gfn(leaf.pfn()));
                }
                match access_entry(self.shadow, &self.vcpu.role, end, plain.gva, what) {
                    Ok(frame) => self.finish_plain(plain, frame),
                    Err(_) => Ran::Again,
                }
            }
        }
    }
}
