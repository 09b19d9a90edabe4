//! Plain accesses: a load, a store or a fetch on one page, which is what most instructions and most rows of a trace are.
//!
//! They are run without the ways that they do not go: no instruction's own fetch, no REP, no event delivery. One that
//! the shadow allows is a walk and a copy; one that a fault must repair first takes the short way of `fault::quick`.
//! Whatever is not plain after all is left to `engine::access`, as if nothing had been tried.

use crate::cpu::Requests;
use crate::engine::Vm;
use crate::fault::quick::{Plain, Quick};
use crate::fault::store::{Written, store_code};
use crate::fault::{Ctx, GuestFault};
use crate::hw::walk::access_entry;
use crate::outcome::Outcome;
use crate::shadow::spte::Spte;
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva, Level, PageId, SptePos};

/// What is left to do of a plain access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rest {
    /// Nothing was done.
    All,
    /// A fault was handled in full, and the instruction runs again.
    Again,
    /// A fault was handled to where the store turned out to be write-protected; it goes to one of its own tables or not.
    Protected(bool),
}

/// What ends a plain access.
#[derive(Clone, Copy)]
pub(super) enum End {
    /// Its load or store, at an address of this frame; `None` is the zero page, or no more than what was done.
    Access(Option<Gfn>),
    /// A fault of the guest's own.
    Guest(GuestFault),
    /// Its store was emulated.
    Stored,
}

impl Vm {
    /// Runs a plain access as far as it stays plain.
    #[inline]
    pub(crate) fn run_plain(&mut self, vcpu: usize, plain: &Plain) -> Result<Outcome, Rest> {
        if vcpu >= self.vcpus.len() {
            return Err(Rest::All);
        }
        self.with(vcpu, |ctx| ctx.run_plain(plain))
    }
}

impl Ctx<'_> {
    #[inline]
    fn run_plain(&mut self, plain: &Plain) -> Result<Outcome, Rest> {
        let Some(root) = self.vcpu.root.table(plain.gva) else { return Err(Rest::All) };
        let role = &self.vcpu.role;
        let plainly = self.vcpu.requests == Requests::default() && role.mode.takes(plain.gva) && !role.pke;
        if !plainly || plain.gva.offset() + u64::from(plain.size) > 4096 {
            return Err(Rest::All);
        }
        self.shadow.events.vcpu = self.vcpu.id;
        let end = self.walk_near(root, plain.gva);
        let leaf = self.shadow.spte(end.0);
        let write = if plain.row.is_store() && leaf.lacks_w() { self.write_to_end(*plain, end) } else { None };
        let came = write.unwrap_or_else(|| self.come_to_end(*plain, end, leaf))?;
        Ok(self.end_counted(*plain, came))
    }

    /// What ends an access that comes to `leaf`, the entry at the end of the shadow's walk.
    ///
    /// # Errors
    /// It is not plain after all; what is left to do.
    #[inline(always)]
    pub(super) fn come_to_end(&mut self, plain: Plain, end: (SptePos, Level), leaf: Spte) -> Result<End, Rest> {
        let seen = if leaf == Spte::EMPTY {
            Err(plain.row.code())
        } else {
            let what = (plain.row, plain.row.view());
            access_entry(self.shadow, &self.vcpu.role, end, plain.gva, what)
        };
        match seen {
            Ok(frame) => Ok(End::Access(frame)),
            Err(code) => self.fault_plain(plain, code),
        }
    }

    /// The same for a store to a leaf without W, where there is a shorter way; `None`, and nothing done, if it is not plain
    /// enough for that.
    #[inline(always)]
    pub(super) fn write_to_end(&mut self, plain: Plain, end: (SptePos, Level)) -> Option<Result<End, Rest>> {
        if end.1 != Level::PT || self.shadow.events.wants_any() {
            return None;
        }
        match self.quick_write(end.0, plain) {
            Written::No => None,
            Written::Forbidden(base) => Some(Ok(End::Guest(self.guest_fault(plain.gva, base, store_code(plain.row))))),
            Written::Emulated => Some(Ok(End::Stored)),
            Written::Made => Some(Ok(End::Access(None))),
            Written::Again => Some(Err(Rest::Again)),
        }
    }

    /// Brings an access to its end.
    #[inline(always)]
    pub(super) fn end_plain(&mut self, plain: Plain, end: End) -> Outcome {
        match end {
            End::Access(frame) => self.touch_plain(plain, || Some(Gpa(frame?.gpa().0 | plain.gva.offset()))),
            End::Guest(fault) => self.reflect(fault),
            End::Stored => self.leave(Outcome::done(0)),
        }
    }

    /// The same, and counts it as an operation.
    #[inline(always)]
    pub(super) fn end_counted(&mut self, plain: Plain, end: End) -> Outcome {
        self.vcpu.counters.x_ops += 1;
        self.vcpu.injected = None;
        let outcome = self.end_plain(plain, end);
        self.shadow.events.op += 1;
        outcome
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
    pub(super) fn touch_plain(&mut self, plain: Plain, gpa: impl FnOnce() -> Option<Gpa>) -> Outcome {
        let mut outcome = Outcome::done(0);
        if let Some(value) = plain.value {
            let host = &mut self.shadow.memory.host;
            match (gpa(), plain.row.kind()) {
                (Some(gpa), AccessKind::Read) => outcome.value = host.read(gpa, plain.size),
                (Some(gpa), AccessKind::Write) => host.write(gpa, plain.size, value),
                _ => {}
            }
        }
        outcome
    }

    #[inline(always)]
    fn fault_plain(&mut self, plain: Plain, code: ErrorCode) -> Result<End, Rest> {
        if code.has(ErrorCode::RSVD) || self.shadow.events.wants_any() {
            return Err(Rest::All);
        }
        match self.quick_fault(plain, code) {
            Quick::Allowed(gfn) => Ok(End::Access(Some(gfn))),
            Quick::No => Err(Rest::All),
            Quick::Guest(fault) => Ok(End::Guest(fault)),
            Quick::Protected { write_to_table } => Err(Rest::Protected(write_to_table)),
            // Unless KVM has to do something first, the access goes on by the entry that was repaired.
            Quick::Mapped(_) if self.vcpu.requests != Requests::default() => Err(Rest::Again),
            Quick::Mapped(pos) => {
                let (end, what) = ((pos, Level::PT), (plain.row, plain.row.view()));
                let frame = access_entry(self.shadow, &self.vcpu.role, end, plain.gva, what);
                frame.map_or(Err(Rest::Again), |frame| Ok(End::Access(frame)))
            }
        }
    }
}
