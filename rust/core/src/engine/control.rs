//! Instructions that change how the guest pages: CR0, CR3, CR4, EFER, INVLPG; and the plain exits.

use crate::bits::{CR0_CD, CR0_MP, CR0_NW, CR0_PG, CR0_TS, CR0_WP, CR4_PCIDE};
use crate::cpu::Requests;
use crate::engine::Vm;
use crate::engine::registers::Refused;
use crate::fault::insn::{Action, Insn};
use crate::fault::{Ctx, Stop};
use crate::outcome::{Outcome, Status};
use crate::types::{ErrorCode, Gpa, Gva};

/// An instruction without a memory operand that exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// MOV to CR0.
    Cr0(u64),
    /// MOV to CR3.
    Cr3(u64),
    /// MOV to CR4.
    Cr4(u64),
    /// WRMSR to EFER.
    Efer(u64),
    /// INVLPG.
    Invlpg(u64),
    /// INVPCID of that type, with its descriptor at that address.
    Invpcid(u64, u64),
    /// HLT.
    Hlt,
    /// IN or OUT.
    Io,
}

impl Vm {
    /// Runs one control instruction; with `rip` it is fetched through the shadow first.
    pub fn control(&mut self, vcpu: usize, what: Control, rip: Option<u64>) -> Outcome {
        self.with(vcpu, |ctx| ctx.run_control(what, rip))
    }
}

impl Ctx<'_> {
    /// Runs one control instruction as an operation.
    #[inline(always)]
    pub(super) fn run_control(&mut self, what: Control, rip: Option<u64>) -> Outcome {
        self.shadow.events.vcpu = self.vcpu.id;
        self.vcpu.counters.x_ops += 1;
        let outcome = self.control(what, rip);
        self.shadow.events.op += 1;
        outcome
    }

    #[inline(always)]
    fn control(&mut self, what: Control, rip: Option<u64>) -> Outcome {
        if !self.enter() {
            return Outcome::of(Status::Shutdown);
        }
        if let Some(rip) = rip
            && let Err(outcome) = self.fetch_insn(rip, false)
        {
            return outcome;
        }
        match what {
            Control::Cr3(_) | Control::Invlpg(_) => {
                self.vcpu.counters.exits += 1;
                let outcome = self.intercepted(what, rip);
                if self.serve_flush() { outcome } else { self.leave(outcome) }
            }
            _ => self.rare_control(what, rip),
        }
    }

    #[inline(never)]
    fn rare_control(&mut self, what: Control, rip: Option<u64>) -> Outcome {
        // The emulator hands only 32 bits of CR0 and CR4 on (emulator_set_cr, 6.1); the CPU's decoder all 64.
        let word = |value: u64| if self.shadow.config.cpu.decode_assists { value } else { value & 0xffff_ffff };
        let what = match what {
            Control::Cr0(value) => Control::Cr0(word(value)),
            Control::Cr4(value) => Control::Cr4(word(value)),
            other => other,
        };
        if let Control::Cr0(value) = what
            && !self.cr0_write_exits(value)
        {
            self.vcpu.regs.cr0 = value;
            return Outcome::done(0);
        }
        self.vcpu.counters.exits += 1;
        let outcome = match what {
            Control::Hlt => {
                self.shadow.events.exit(1, rip.unwrap_or(0), 0);
                self.vcpu.counters.halt_exits += 1;
                self.skip(rip)
            }
            Control::Io => {
                self.shadow.events.exit(2, rip.unwrap_or(0), 0);
                self.vcpu.counters.io_exits += 1;
                Outcome::done(0)
            }
            Control::Efer(value) => {
                self.shadow.events.exit(8, rip.unwrap_or(0), 1);
                match self.set_efer(value) {
                    Ok(()) => self.skip(rip),
                    Err(Refused) => self.general_protection(),
                }
            }
            Control::Invpcid(kind, descriptor) => {
                self.shadow.events.exit(9, rip.unwrap_or(0), descriptor);
                match self.invpcid(kind, Gva(descriptor)) {
                    Ok(()) => self.skip(rip),
                    Err(outcome) => outcome,
                }
            }
            Control::Cr0(_) | Control::Cr3(_) | Control::Cr4(_) | Control::Invlpg(_) => self.intercepted(what, rip),
        };
        match what {
            // These end the run of the vCPU; it enters again with the next operation.
            Control::Hlt | Control::Io => outcome,
            _ => self.leave(outcome),
        }
    }

    /// A write to CR0 exits unless the guest's CR0 is the hardware's and only TS or MP change (section 8.9 of the
    /// specification: the selective intercept, `svm_set_cr0`, 6.1).
    const fn cr0_write_exits(&self, value: u64) -> bool {
        !self.cr0_is_hardwares() || (self.vcpu.regs.cr0 ^ value) & !(CR0_TS | CR0_MP) != 0
    }

    const fn cr0_is_hardwares(&self) -> bool {
        let cr0 = self.vcpu.regs.cr0;
        cr0 & (CR0_PG | CR0_WP | CR0_CD | CR0_NW) == CR0_PG | CR0_WP
    }

    /// CR writes and INVLPG: without decode assists the emulator carries them out.
    #[inline(always)]
    fn intercepted(&mut self, what: Control, rip: Option<u64>) -> Outcome {
        let reason = match what {
            Control::Cr0(_) if self.cr0_is_hardwares() => 4,
            Control::Cr0(_) => 3,
            Control::Cr3(_) => 5,
            Control::Cr4(_) => 6,
            _ => 7,
        };
        self.shadow.events.exit(reason, rip.unwrap_or(0), 0);
        let assisted = self.shadow.config.cpu.decode_assists;
        if !assisted {
            if !self.shadow.config.kernel.retry_needs_zap {
                self.vcpu.last_retry = (0, 0);
            }
            if let Err(outcome) = self.decode(rip) {
                return outcome;
            }
        }
        let done = match what {
            Control::Cr0(value) => self.set_cr0(value),
            Control::Cr3(value) => self.set_cr3(value),
            Control::Cr4(value) => self.set_cr4(value),
            Control::Invlpg(gva) => {
                self.invlpg(Gva(gva), assisted);
                Ok(())
            }
            Control::Efer(_) | Control::Invpcid(..) | Control::Hlt | Control::Io => Ok(()),
        };
        match done {
            Ok(()) => Outcome::done(0),
            Err(Refused) => self.general_protection(),
        }
    }

    /// Decodes an instruction that exited for another reason than a fault.
    #[inline(never)]
    fn decode(&mut self, rip: Option<u64>) -> Result<(), Outcome> {
        let fetched = rip.map_or(Ok(()), |rip| self.walk_for_bytes(Gva(rip), false));
        self.vcpu.counters.insn_emulation += 1;
        self.shadow.events.emulate_insn(rip.unwrap_or(0), false);
        fetched.map_err(|stop| match stop {
            Stop::Fault(fault) => self.inject(fault),
            Stop::NoBytes | Stop::Unhandled => {
                self.vcpu.counters.insn_emulation_fail += 1;
                Outcome::of(Status::InternalError)
            }
        })
    }

    /// Skips an instruction: the CPU tells the next RIP, or the decoder does.
    #[inline(never)]
    fn skip(&mut self, rip: Option<u64>) -> Outcome {
        if self.shadow.config.cpu.nrips {
            return Outcome::done(0);
        }
        self.decode(rip).map_or_else(|outcome| outcome, |()| Outcome::done(0))
    }

    #[inline(never)]
    fn general_protection(&mut self) -> Outcome {
        self.shadow.events.inj_exception(13, 0, false);
        self.vcpu.injected = Some((13, 0));
        Outcome::of(Status::GeneralProtection)
    }

    /// `kvm_mmu_invlpg`, 6.1. The emulator checks the address before it gets there; the direct intercept does not.
    #[inline(always)]
    fn invlpg(&mut self, gva: Gva, assisted: bool) {
        if !self.is_noncanonical(gva) {
            let flush = self.shadow.invlpg(self.vcpu, gva, true);
            self.pay(flush);
        } else if !assisted {
            return;
        }
        self.vcpu.counters.invlpg += 1;
    }

    /// `kvm_handle_invpcid`, 6.1.
    #[inline(never)]
    fn invpcid(&mut self, kind: u64, descriptor: Gva) -> Result<(), Outcome> {
        if !self.shadow.config.cpu.invpcid {
            self.shadow.events.inj_exception(6, 0, false);
            return Err(Outcome::of(Status::InvalidOpcode));
        }
        let (pcid, address) = self.read_descriptor(descriptor)?;
        let enabled = self.vcpu.regs.cr4 & CR4_PCIDE != 0;
        let known = pcid >> 12 == 0 && (enabled || pcid == 0 || kind > 1);
        match kind {
            0 if known && !self.is_noncanonical(address) => {
                let flush = self.shadow.invpcid_gva(self.vcpu, address, pcid);
                self.pay(flush);
                self.vcpu.counters.invlpg += 1;
            }
            1 if known => self.invalidate_pcid(pcid),
            // Shadow entries are never global, so both kinds of "all" are the same.
            2 | 3 if known => self.vcpu.requests.raise(Requests::TLB_FLUSH_GUEST),
            _ => return Err(self.general_protection()),
        }
        Ok(())
    }

    /// The operand of INVPCID, 16 bytes: PCID and address (`kvm_read_guest_virt`, 6.1).
    fn read_descriptor(&mut self, at: Gva) -> Result<(u64, Gva), Outcome> {
        let (mut bytes, mut done) = ([0; 16], 0);
        for (gva, size) in Insn::new(Action::Load, at.0, 16).pieces() {
            if size == 0 {
                continue;
            }
            let walk = self.walk(gva, ErrorCode(0), false).map_err(|fault| self.inject(fault))?;
            if self.shadow.memory.slot(walk.gfn).is_none() {
                return Err(Outcome::of(Status::InternalError));
            }
            for i in 0..u64::from(size) {
                bytes[done] = self.read_ram(Gpa((walk.gfn.gpa().0 | gva.offset()) + i), 1) as u8;
                done += 1;
            }
        }
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Ok((word(0), Gva(word(8))))
    }
}
