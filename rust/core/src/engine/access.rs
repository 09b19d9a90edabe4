//! Running one instruction with a memory operand: the CPU's accesses, its exits, and running it again.

use crate::config::MAX_RESUMES;
use crate::cpu::CpuView;
use crate::engine::Vm;
use crate::engine::operand;
use crate::engine::plain::Rest;
use crate::fault::insn::{Action, Insn};
use crate::fault::quick::Plain;
use crate::fault::{After, Ctx, GuestFault};
use crate::hw::walk::access;
use crate::outcome::{Outcome, RetPf, Status};
use crate::types::{AccessKind, ErrorCode, Gfn, Gva};

/// Why the CPU did not finish an instruction.
#[derive(Clone, Copy)]
enum Trap {
    /// #PF, which exits: where, with which code, of an operand or of the instruction's own bytes.
    Fault { gva: Gva, code: ErrorCode, operand: bool },
    /// #GP: an address that is not canonical.
    GeneralProtection,
}

impl Vm {
    /// Runs one instruction, or one access of event delivery, on a vCPU of the VM.
    pub fn execute(&mut self, vcpu: usize, insn: &Insn) -> Outcome {
        let ran = Plain::of(insn).map_or(Err(Rest::All), |plain| self.run_plain(vcpu, &plain));
        ran.unwrap_or_else(|rest| self.execute_rest(vcpu, insn, rest))
    }

    /// The rest of an instruction that came so far as a plain access.
    #[inline]
    pub(crate) fn execute_rest(&mut self, vcpu: usize, insn: &Insn, rest: Rest) -> Outcome {
        self.begin(vcpu);
        let outcome = self.with(vcpu, |ctx| match (insn.action, insn.rip) {
            // A jump: it is fetched and done with before its target is.
            (Action::Fetch, Some(rip)) => ctx.fetch_insn(rip, insn.user).map_or_else(|o| o, |()| ctx.run_insn(insn)),
            _ => ctx.run_rest_of_insn(insn, rest),
        });
        self.end();
        outcome
    }
}

/// The fetch of an instruction's own bytes, as an instruction of its own.
fn fetch_of(insn: &Insn) -> Insn {
    Insn { action: Action::Fetch, gva: Gva(insn.rip_or_zero()), size: insn.length, system: false, ..*insn }
}

impl Ctx<'_> {
    pub(crate) fn run_insn(&mut self, insn: &Insn) -> Outcome {
        self.run_rest_of_insn(insn, Rest::All)
    }

    fn run_rest_of_insn(&mut self, insn: &Insn, rest: Rest) -> Outcome {
        if insn.delivery {
            self.vcpu.delivering = self.vcpu.delivering.or(self.vcpu.injected.map(|(vector, _)| vector));
        } else {
            // An instruction runs, so whatever was delivered has arrived.
            self.vcpu.injected = None;
        }
        let outcome = self.run_until_done(insn, rest);
        self.vcpu.delivering = None;
        outcome
    }

    /// Runs an instruction, exits and all, until the CPU has done it or something else ends it. The first round may have
    /// been made as a plain access.
    fn run_until_done(&mut self, insn: &Insn, rest: Rest) -> Outcome {
        let (mut done, mut device) = (0, None);
        let mut first = match rest {
            Rest::Again => Some(After::Resume),
            Rest::Protected(write_to_table) => {
                let after = self.not_mapped(insn, insn.gva, RetPf::WriteProtected, write_to_table);
                Some(self.leave_if_finished(after))
            }
            Rest::All => None,
        };
        // Elements that were stored are progress, and each may need a resumption and an emulation of its own.
        for _ in 0..MAX_RESUMES + 4 * (insn.repeat - 1) {
            let after = match first.take() {
                Some(after) => after,
                None => match self.run_once(insn, &mut done) {
                    Ok(value) => {
                        return device
                            .map_or(Outcome::done(value), |address| Outcome { address, ..Outcome::of(Status::Mmio) });
                    }
                    Err(After::Finished(outcome)) => return outcome,
                    Err(after) => after,
                },
            };
            match after {
                // After KVM's decoding the CPU comes to the INT itself again (a run shows the fetch).
                After::Resume if insn.soft && !self.shadow.config.cpu.nrips => {
                    if let Err(outcome) = self.fetch_insn(insn.rip_or_zero(), insn.user) {
                        return outcome;
                    }
                }
                After::Resume => {}
                // The emulator leaves RIP at a REP, even at one that it carried out to the end.
                After::Stored(elements, gpa) => {
                    done += elements;
                    device = device.or(gpa);
                }
                After::Finished(outcome) => return outcome,
            }
        }
        Outcome::of(Status::Livelock)
    }

    /// One round: entry, the CPU's part, and the exit if there is one. The error is what came of it.
    fn run_once(&mut self, insn: &Insn, done: &mut u32) -> Result<u64, After> {
        if !self.enter() {
            return Err(After::Finished(Outcome::of(Status::Shutdown)));
        }
        let (gva, code, operand) = match self.run_on_cpu(insn, done) {
            Ok(value) => return Ok(value),
            Err(Trap::GeneralProtection) => return Err(After::Finished(Outcome::of(Status::GeneralProtection))),
            Err(Trap::Fault { gva, code, operand }) => (gva, code, operand),
        };
        let rest = insn.element(*done);
        let who = if operand { rest } else { fetch_of(&rest) };
        let after = self.handle_page_fault(&who, gva, code);
        Err(self.leave_if_finished(after))
    }

    /// The guest gets a fault of its own.
    #[inline(never)]
    pub(crate) fn reflect(&mut self, fault: GuestFault) -> Outcome {
        let outcome = self.inject(fault);
        self.leave(outcome)
    }

    fn leave_if_finished(&mut self, after: After) -> After {
        match after {
            After::Finished(outcome) => After::Finished(self.leave(outcome)),
            other => other,
        }
    }

    /// KVM enters the guest again before anything else happens, so requests are served within the operation.
    #[inline]
    pub(crate) fn leave(&mut self, outcome: Outcome) -> Outcome {
        match outcome.status {
            Status::InternalError | Status::Shutdown => outcome,
            _ if self.enter() => outcome,
            _ => Outcome::of(Status::Shutdown),
        }
    }

    /// Fetches an instruction through the shadow, exits handled, until the CPU has it. For instructions without a
    /// memory operand.
    pub(crate) fn fetch_insn(&mut self, rip: u64, user: bool) -> Result<(), Outcome> {
        let outcome = self.run_insn(&Insn { user, ..Insn::new(Action::Fetch, rip, 1) });
        if outcome.status == Status::Done { Ok(()) } else { Err(outcome) }
    }

    /// Runs an instruction from element `done` on, which moves on past the elements that were carried out.
    #[inline]
    fn run_on_cpu(&mut self, insn: &Insn, done: &mut u32) -> Result<u64, Trap> {
        if let Some(rip) = insn.rip
            && !insn.delivery
            && insn.action != Action::Fetch
        {
            let view = CpuView { user: insn.user, ..self.cpu_view(insn) };
            self.access_page(Gva(rip), AccessKind::Fetch, view, false)?;
            if let Some(next) = insn.second_page(Gva(rip)) {
                self.access_page(next, AccessKind::Fetch, view, false)?;
            }
        }
        let mut value = 0;
        while *done < insn.repeat {
            value = self.run_element(&insn.element(*done))?;
            *done += 1;
        }
        Ok(value)
    }

    #[inline]
    fn run_element(&mut self, insn: &Insn) -> Result<u64, Trap> {
        let view = self.cpu_view(insn);
        if insn.action == Action::Copy {
            let load = insn.loading();
            let from = self.operand_pages(&load, AccessKind::Read, view)?;
            let to = self.operand_pages(insn, AccessKind::Write, view)?;
            let host = &mut self.shadow.memory.host;
            let value = operand::load(host, &load, from);
            operand::store(host, insn, to, u128::from(value));
            return Ok(0);
        }
        let mut frames = [None; 2];
        for kind in insn.kinds(self.shadow.config.cpu.rmw_reads_first) {
            frames = self.operand_pages(insn, *kind, view)?;
        }
        Ok(operand::touch(&mut self.shadow.memory.host, insn, frames))
    }

    #[inline]
    fn operand_pages(&mut self, insn: &Insn, kind: AccessKind, view: CpuView) -> Result<[Option<Gfn>; 2], Trap> {
        let first = self.access_page(insn.gva, kind, view, true)?;
        let [_, (second, rest)] = insn.pieces();
        let second = if rest == 0 { None } else { self.access_page(second, kind, view, true)? };
        Ok([first, second])
    }

    #[inline]
    fn access_page(&mut self, gva: Gva, kind: AccessKind, view: CpuView, operand: bool) -> Result<Option<Gfn>, Trap> {
        if !self.vcpu.role.mode.takes(gva) {
            return Err(Trap::GeneralProtection);
        }
        let table = self.vcpu.root.table(gva);
        access(self.shadow, &self.vcpu.role, table, gva, (view.row(kind), view)).map_err(|code| Trap::Fault {
            gva,
            code,
            operand,
        })
    }
}
