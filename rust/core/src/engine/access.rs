//! Running one instruction with a memory operand: the CPU's accesses, its exits, and running it again.

use crate::config::MAX_RESUMES;
use crate::engine::Vm;
use crate::fault::insn::{Action, Insn, mask, slice};
use crate::fault::{After, Ctx};
use crate::hw::walk::access;
use crate::outcome::{Outcome, Status};
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva};

/// Why the CPU did not finish an instruction.
enum Trap {
    /// #PF, which exits: who accessed, where, with which code.
    Fault(Insn, Gva, ErrorCode),
    /// #GP: an address that is not canonical.
    GeneralProtection,
}

impl Vm {
    /// Runs one instruction, or one access of event delivery, on a vCPU of the VM.
    pub fn execute(&mut self, vcpu: usize, insn: &Insn) -> Outcome {
        self.begin(vcpu);
        let outcome = self.with(vcpu, |ctx| ctx.run_insn(insn));
        self.end();
        outcome
    }
}

impl Ctx<'_> {
    fn run_insn(&mut self, insn: &Insn) -> Outcome {
        let mut at = *insn;
        // Elements that were stored already count as progress, so a long REP may fault more often.
        for _ in 0..MAX_RESUMES + insn.repeat {
            if !self.enter() {
                return Outcome::of(Status::Shutdown);
            }
            match self.run_on_cpu(&at) {
                Ok(value) => return Outcome::done(value),
                Err(Trap::GeneralProtection) => return Outcome::of(Status::GeneralProtection),
                Err(Trap::Fault(who, gva, code)) => {
                    if who.action == insn.action {
                        at = who;
                    }
                    if let After::Finished(outcome) = self.handle_page_fault(&who, gva, code) {
                        return self.finish(&who, outcome);
                    }
                }
            }
        }
        Outcome::of(Status::Livelock)
    }

    /// KVM enters the guest again before anything else happens, so requests are served within the operation.
    pub(crate) fn leave(&mut self, outcome: Outcome) -> Outcome {
        match outcome.status {
            Status::InternalError | Status::Shutdown => outcome,
            _ if self.enter() => outcome,
            _ => Outcome::of(Status::Shutdown),
        }
    }

    /// The emulator leaves RIP at a REP that it carried out, so that the CPU runs it once more with nothing left.
    fn finish(&mut self, insn: &Insn, outcome: Outcome) -> Outcome {
        let left = self.leave(outcome);
        if insn.rep
            && matches!(left.status, Status::Done | Status::Mmio)
            && let Some(rip) = insn.rip
            && let Err(fault) = self.fetch_insn(rip, insn.user)
        {
            return fault;
        }
        left
    }

    /// Fetches an instruction through the shadow, exits handled, until the CPU has it. For instructions without a
    /// memory operand.
    pub(crate) fn fetch_insn(&mut self, rip: u64, user: bool) -> Result<(), Outcome> {
        let outcome = self.run_insn(&Insn { user, ..Insn::new(Action::Fetch, rip, 1) });
        if outcome.status == Status::Done { Ok(()) } else { Err(outcome) }
    }

    #[inline]
    fn run_on_cpu(&mut self, insn: &Insn) -> Result<u64, Trap> {
        if let Some(rip) = insn.rip
            && !insn.delivery
            && insn.action != Action::Fetch
        {
            let fetch = Insn { action: Action::Fetch, gva: Gva(rip), size: 1, system: false, ..*insn };
            self.access_page(&fetch, Gva(rip), AccessKind::Fetch)?;
            if let Some(next) = insn.second_page(Gva(rip)) {
                self.access_page(&Insn { gva: next, ..fetch }, next, AccessKind::Fetch)?;
            }
        }
        let mut value = 0;
        for element in 0..insn.repeat {
            value = self.run_element(&insn.element(element))?;
        }
        Ok(value)
    }

    #[inline]
    fn run_element(&mut self, insn: &Insn) -> Result<u64, Trap> {
        let pieces = insn.pieces();
        let mut frames = [None; 2];
        for kind in insn.kinds(self.shadow.config.cpu.rmw_reads_first) {
            frames[0] = self.access_page(insn, insn.gva, *kind)?;
            if pieces[1].1 != 0 {
                frames[1] = self.access_page(insn, pieces[1].0, *kind)?;
            }
        }
        Ok(self.touch_memory(insn, frames))
    }

    #[inline]
    fn access_page(&mut self, who: &Insn, gva: Gva, kind: AccessKind) -> Result<Option<Gfn>, Trap> {
        if !gva.is_canonical() {
            return Err(Trap::GeneralProtection);
        }
        let Some(root) = self.vcpu.root.page else { return Err(Trap::GeneralProtection) };
        let view = self.cpu_view(who);
        access(self.shadow, root, gva, kind, &view).map_err(|code| Trap::Fault(*who, gva, code))
    }

    /// The load, store, or both: every page is there and allows it. `None` is the zero page.
    #[inline]
    fn touch_memory(&mut self, insn: &Insn, frames: [Option<Gfn>; 2]) -> u64 {
        match insn.action {
            Action::Fetch => 0,
            Action::Load => self.load(insn, frames),
            Action::Store if insn.keep => 0,
            Action::Store => {
                self.store(insn, frames, insn.value);
                0
            }
            Action::Rmw(_) => {
                let old = self.load(insn, frames);
                let (new, equal) = insn.compute(old);
                // Half of a 16-byte operand is all that is known of it; a failed exchange leaves it alone.
                if equal || insn.size <= 8 {
                    self.store(insn, frames, new);
                }
                old
            }
        }
    }

    #[inline]
    fn load(&self, insn: &Insn, frames: [Option<Gfn>; 2]) -> u64 {
        let [(gva, size), (_, rest)] = insn.pieces();
        let host = &self.shadow.memory.host;
        let at = |frame: Option<Gfn>, offset: u64, size: u8| {
            frame.map_or(0, |gfn| host.read(Gpa(gfn.gpa().0 | offset), size.min(8)))
        };
        let mut value = at(frames[0], gva.offset(), size);
        if rest != 0 && size < 8 {
            value |= at(frames[1], 0, rest) << (size * 8);
        }
        value & mask(insn.size)
    }

    #[inline]
    fn store(&mut self, insn: &Insn, frames: [Option<Gfn>; 2], value: u64) {
        let [(gva, size), (_, rest)] = insn.pieces();
        self.store_piece(frames[0], gva.offset(), size, value, 0);
        if rest != 0 {
            self.store_piece(frames[1], 0, rest, value, size);
        }
    }

    /// Stores `size` bytes of the operand from its byte `from` on. A writable entry never maps the zero page.
    fn store_piece(&mut self, frame: Option<Gfn>, offset: u64, size: u8, value: u64, from: u8) {
        let Some(gfn) = frame else { return };
        let host = &mut self.shadow.memory.host;
        host.write(Gpa(gfn.gpa().0 | offset), size.min(8), slice(value, from, size));
        if size > 8 {
            host.write(Gpa((gfn.gpa().0 | offset) + 8), size - 8, slice(value, from + 8, size - 8));
        }
    }
}
