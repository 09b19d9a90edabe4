//! Plain accesses: a load, a store or a fetch on one page, which is what most instructions and most rows of a trace are.
//!
//! They are run without the ways that they do not go: no instruction's own fetch, no REP, no event delivery. One that
//! the shadow allows is a walk and a copy; one that a fault must repair first takes the short way of `fault::quick`.
//! Whatever is not plain after all is left to `engine::access`, as if nothing had been tried.

use crate::cpu::{CpuView, Requests};
use crate::engine::Vm;
use crate::fault::insn::{Action, Insn};
use crate::fault::quick::Quick;
use crate::hw::walk::access_entry;
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva, Level, SptePos};

/// What a plain access needs to know of an instruction; everything else about it has its default.
#[derive(Clone, Copy)]
pub(crate) struct Plain {
    pub gva: Gva,
    pub size: u8,
    pub kind: AccessKind,
    pub user: bool,
    pub ac: bool,
    /// The value that a store stores; `None` leaves memory as it is, or does not want what a load loads.
    pub value: Option<u64>,
}

/// How far a plain access came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ran {
    /// It is done; the value is what it loaded.
    Done(u64),
    /// Nothing was done.
    NotAtAll,
    /// A fault was handled in full, and the instruction runs again.
    Again,
    /// A fault was handled to where the store turned out to be write-protected; it goes to one of its own tables or not.
    Protected(bool),
}

impl Plain {
    /// The instruction as a plain access.
    #[inline]
    pub(crate) const fn of(insn: &Insn) -> Option<Self> {
        let kind = match insn.action {
            Action::Load => AccessKind::Read,
            Action::Store => AccessKind::Write,
            Action::Fetch => AccessKind::Fetch,
            Action::Rmw(_) | Action::Copy => return None,
        };
        if insn.rip.is_some() || insn.delivery || insn.system || insn.rep || insn.repeat != 1 || insn.size > 8 {
            return None;
        }
        let value = if insn.keep { None } else { Some(insn.value) };
        Some(Self { gva: insn.gva, size: insn.size, kind, user: insn.user, ac: insn.ac, value })
    }

    const fn view(&self) -> CpuView {
        CpuView { user: self.user, smap_holds: !self.ac, rsvd_sets_p: true, key0: 0 }
    }
}

impl Vm {
    /// Runs a plain access as far as it stays plain.
    #[inline]
    pub(crate) fn run_plain(&mut self, vcpu: usize, plain: &Plain) -> Ran {
        let Some(cpu) = self.vcpus.get(vcpu) else { return Ran::NotAtAll };
        let Some(table) = cpu.root.table(plain.gva) else { return Ran::NotAtAll };
        let plainly = cpu.requests == Requests::default() && cpu.role.mode.takes(plain.gva) && !cpu.role.pke;
        if !plainly || plain.gva.offset() + u64::from(plain.size) > 4096 {
            return Ran::NotAtAll;
        }
        let end = self.shadow.walk_down(table, plain.gva);
        match access_entry(&mut self.shadow, &cpu.role, end, plain.gva, (plain.kind, plain.view())) {
            Ok(frame) => self.finish_plain(vcpu, plain, frame),
            Err(code) => self.fault_plain(vcpu, plain, code),
        }
    }

    /// The load or store itself. `None` is the zero page, which a writable entry never maps.
    #[inline]
    fn finish_plain(&mut self, vcpu: usize, plain: &Plain, frame: Option<Gfn>) -> Ran {
        let cpu = &mut self.vcpus[vcpu];
        cpu.counters.x_ops += 1;
        cpu.injected = None;
        self.shadow.events.op += 1;
        let gpa = Gpa(frame.map_or(0, |gfn| gfn.gpa().0) | plain.gva.offset());
        match (plain.kind, frame, plain.value) {
            (AccessKind::Read, Some(_), Some(_)) => Ran::Done(self.shadow.memory.host.read(gpa, plain.size)),
            (AccessKind::Write, Some(_), Some(value)) => {
                self.shadow.memory.host.write(gpa, plain.size, value);
                Ran::Done(0)
            }
            _ => Ran::Done(0),
        }
    }

    #[inline(never)]
    fn fault_plain(&mut self, vcpu: usize, plain: &Plain, code: ErrorCode) -> Ran {
        if code.has(ErrorCode::RSVD) || self.shadow.events.wants_any() {
            return Ran::NotAtAll;
        }
        match self.with(vcpu, |ctx| ctx.quick_fault(plain.gva, code, plain.ac)) {
            Quick::No => Ran::NotAtAll,
            Quick::Protected { write_to_table } => Ran::Protected(write_to_table),
            Quick::Mapped(pos) => self.go_on_plain(vcpu, plain, pos),
        }
    }

    /// The access again, after its fault: by the entry that was repaired, unless KVM has to do something first.
    #[inline]
    fn go_on_plain(&mut self, vcpu: usize, plain: &Plain, pos: SptePos) -> Ran {
        let cpu = &self.vcpus[vcpu];
        if cpu.requests != Requests::default() {
            return Ran::Again;
        }
        let end = (pos, Level::PT);
        match access_entry(&mut self.shadow, &cpu.role, end, plain.gva, (plain.kind, plain.view())) {
            Ok(frame) => self.finish_plain(vcpu, plain, frame),
            Err(_) => Ran::Again,
        }
    }
}
