//! Instructions that change how the guest pages: CR0, CR3, CR4, EFER, INVLPG; and the plain exits.

use crate::bits::{
    CR0_CD, CR0_ET, CR0_MP, CR0_NW, CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE,
    CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NX, EFER_SCE,
};
use crate::cpu::Requests;
use crate::engine::Vm;
use crate::fault::{Ctx, Stop};
use crate::outcome::{Outcome, Status};
use crate::shadow::roots::NewPgd;
use crate::types::Gva;

/// CR4 bits that the guest's CPUID allows, beside PCIDE: 0 to 10, UMIP, FSGSBASE, OSXSAVE, SMEP, SMAP.
const CR4_ALLOWED: u64 = 0x7ff | 1 << 11 | 1 << 16 | 1 << 18 | CR4_SMEP | CR4_SMAP;
/// CR4 bits that split roles (`KVM_MMU_CR4_ROLE_BITS`, 6.1).
const CR4_ROLE: u64 = CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE;
/// EFER bits that the guest may set; bit 14 is FFXSR.
const EFER_ALLOWED: u64 = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX | 1 << 14;
/// CR3 bit 63: keep the TLB's entries.
const CR3_NOFLUSH: u64 = 1 << 63;

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
    /// HLT.
    Hlt,
    /// IN or OUT.
    Io,
}

/// The guest gets #GP(0).
struct Refused;

impl Vm {
    /// Runs one control instruction; with `rip` it is fetched through the shadow first.
    pub fn control(&mut self, vcpu: usize, what: Control, rip: Option<u64>) -> Outcome {
        self.begin(vcpu);
        let outcome = self.with(vcpu, |ctx| ctx.control(what, rip));
        self.end();
        outcome
    }
}

impl Ctx<'_> {
    fn control(&mut self, what: Control, rip: Option<u64>) -> Outcome {
        if !self.enter() {
            return Outcome::of(Status::Shutdown);
        }
        if let Some(rip) = rip
            && let Err(outcome) = self.fetch_insn(rip, false)
        {
            return outcome;
        }
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
        cr0 & CR0_WP != 0 && cr0 & (CR0_CD | CR0_NW) == 0
    }

    /// CR writes and INVLPG: without decode assists the emulator carries them out.
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
            self.vcpu.last_retry = (0, 0);
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
            Control::Efer(_) | Control::Hlt | Control::Io => Ok(()),
        };
        match done {
            Ok(()) => Outcome::done(0),
            Err(Refused) => self.general_protection(),
        }
    }

    /// Decodes an instruction that exited for another reason than a fault.
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
    fn skip(&mut self, rip: Option<u64>) -> Outcome {
        if self.shadow.config.cpu.nrips {
            return Outcome::done(0);
        }
        self.decode(rip).map_or_else(|outcome| outcome, |()| Outcome::done(0))
    }

    fn general_protection(&mut self) -> Outcome {
        self.shadow.events.inj_exception(13, 0, false);
        self.vcpu.injected = Some((13, 0));
        Outcome::of(Status::GeneralProtection)
    }

    /// `kvm_set_cr0`, 6.1. Paging cannot be left from 64-bit code.
    fn set_cr0(&mut self, value: u64) -> Result<(), Refused> {
        let value = value | CR0_ET;
        let bad = value >> 32 != 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
            || value & CR0_PG == 0
            || value & CR0_PE == 0;
        if bad {
            return Err(Refused);
        }
        let old = std::mem::replace(&mut self.vcpu.regs.cr0, value);
        if (old ^ value) & CR0_WP != 0 {
            self.reset_context();
        }
        Ok(())
    }

    /// `kvm_set_cr4` and `kvm_post_set_cr4`, 6.1.
    fn set_cr4(&mut self, value: u64) -> Result<(), Refused> {
        let old = self.vcpu.regs.cr4;
        let allowed = CR4_ALLOWED | if self.shadow.config.cpu.pcid { CR4_PCIDE } else { 0 };
        let pcid_on = value & !old & CR4_PCIDE != 0;
        if value & !allowed != 0 || value & CR4_PAE == 0 || pcid_on && self.vcpu.regs.cr3 & 0xfff != 0 {
            return Err(Refused);
        }
        self.vcpu.regs.cr4 = value;
        if (old ^ value) & CR4_ROLE != 0 {
            self.reset_context();
        }
        if pcid_on {
            let flush = self.shadow.free_all_roots(self.vcpu);
            self.pay(flush);
        }
        if (old ^ value) & CR4_PGE != 0 || old & !value & CR4_PCIDE != 0 {
            self.vcpu.requests.raise(Requests::TLB_FLUSH_GUEST);
        } else if value & !old & CR4_SMEP != 0 {
            self.vcpu.requests.raise(Requests::TLB_FLUSH_CURRENT);
        }
        Ok(())
    }

    /// `set_efer`, 6.1. LMA follows LME and CR0.PG, and LME cannot change while paging is on.
    fn set_efer(&mut self, value: u64) -> Result<(), Refused> {
        let old = self.vcpu.regs.efer;
        if value & !EFER_ALLOWED != 0 || (old ^ value) & EFER_LME != 0 {
            return Err(Refused);
        }
        self.vcpu.regs.efer = value & !EFER_LMA | old & EFER_LMA;
        if (old ^ value) & EFER_NX != 0 {
            self.reset_context();
        }
        Ok(())
    }

    /// `kvm_set_cr3`, 6.1.
    fn set_cr3(&mut self, value: u64) -> Result<(), Refused> {
        let pcide = self.vcpu.regs.cr4 & CR4_PCIDE != 0;
        let keep = pcide && value & CR3_NOFLUSH != 0;
        let value = if pcide { value & !CR3_NOFLUSH } else { value };
        if value != self.vcpu.regs.cr3 {
            if value >> self.shadow.config.cpu.maxphyaddr != 0 {
                return Err(Refused);
            }
            self.new_pgd(value);
            self.vcpu.regs.cr3 = value;
        }
        if !keep {
            self.vcpu.requests.raise(Requests::MMU_SYNC);
            self.vcpu.requests.raise(Requests::TLB_FLUSH_CURRENT);
            if pcide {
                let flush = self.shadow.free_prev_roots_of_pcid(self.vcpu, value & 0xfff);
                self.pay(flush);
            }
        }
        Ok(())
    }

    /// `kvm_mmu_new_pgd`, 6.1.
    fn new_pgd(&mut self, pgd: u64) {
        let (found, flush) = self.shadow.new_pgd(self.vcpu, pgd);
        self.pay(flush);
        if found == NewPgd::Miss {
            return;
        }
        // Without `flush_on_reuse` a cached root is neither synced nor flushed here; CR3 without bit 63 asks for it.
        self.vcpu.requests.raise(Requests::LOAD_MMU_PGD);
        self.vcpu.clear_mmio();
        self.shadow.clear_root_flood(self.vcpu);
    }

    /// `kvm_mmu_invlpg`, 6.1. The emulator checks the address before it gets there; the direct intercept does not.
    fn invlpg(&mut self, gva: Gva, assisted: bool) {
        if gva.is_canonical() {
            let flush = self.shadow.invlpg(self.vcpu, gva, true);
            self.pay(flush);
        } else if !assisted {
            return;
        }
        self.vcpu.counters.invlpg += 1;
    }
}
