//! The instruction emulator, as far as the shadow MMU can see it (`x86_emulate_instruction`, 6.1).

use crate::bits::CR4_PAE;
use crate::cpu::permission_fault;
use crate::fault::insn::{Action, Insn, mask, slice};
use crate::fault::{After, Ctx, Stop};
use crate::guest::walk::GuestFault;
use crate::outcome::{Outcome, Status};
use crate::types::{ErrorCode, Gpa, Gva};

/// What the fault handler tells the emulator.
#[derive(Clone, Copy, Debug)]
pub struct Emulation {
    /// The instruction may be resumed instead (`EMULTYPE_ALLOW_RETRY_PF`).
    pub allow_retry: bool,
    /// The target is a table of the access's own walk (`EMULTYPE_WRITE_PF_TO_SP`).
    pub write_to_table: bool,
}

/// Where an emulated operand lies.
#[derive(Clone, Copy, Debug)]
enum Operand {
    Ram(Gpa),
    Mmio(Gpa),
}

/// What executing told: the value loaded, and the first device that was touched.
#[derive(Clone, Copy, Debug, Default)]
struct Effect {
    value: u64,
    mmio: Option<u64>,
    /// Elements of a REP that were stored.
    elements: u32,
    /// A locked exchange met another value than its read: the instruction runs again.
    again: bool,
}

impl Ctx<'_> {
    /// Emulates the instruction whose access to `gva` faulted.
    pub(crate) fn emulate(&mut self, insn: &Insn, gva: Gva, how: Emulation) -> After {
        let fetched = self.fetch_for_emulation(insn);
        self.vcpu.counters.insn_emulation += 1;
        self.shadow.events.emulate_insn(insn.rip_or_zero(), false);
        if let Err(stop) = fetched {
            return self.emulation_failed(insn, gva, how, stop);
        }
        if self.retry_instruction(insn, gva, how) {
            return After::Resume;
        }
        match self.execute(insn) {
            Ok(effect) if effect.again => After::Resume,
            Ok(effect) if insn.rep => {
                self.vcpu.counters.mmio_exits += u64::from(effect.mmio.is_some());
                After::Stored(effect.elements, effect.mmio)
            }
            Ok(Effect { value, mmio: Some(gpa), .. }) => {
                self.vcpu.counters.mmio_exits += 1;
                After::Finished(Outcome { status: Status::Mmio, value, error_code: 0, address: gpa })
            }
            Ok(effect) => After::Finished(Outcome::done(effect.value)),
            Err(Stop::Fault(fault)) => After::Finished(self.inject(fault)),
            Err(stop) => self.emulation_failed(insn, gva, how, stop),
        }
    }

    /// Reads the instruction's bytes, unless the CPU handed them over (decode assists do, except for a fetch fault).
    /// Also used where an instruction is skipped or emulated without a fault.
    pub(crate) fn fetch_for_emulation(&mut self, insn: &Insn) -> Result<(), Stop> {
        let rip = match insn.action {
            Action::Fetch => insn.gva,
            _ if self.shadow.config.cpu.decode_assists => return Ok(()),
            _ => match insn.rip {
                Some(rip) => Gva(rip),
                None => return Ok(()),
            },
        };
        self.walk_for_bytes(rip, insn.user)?;
        insn.second_page(rip).map_or(Ok(()), |next| self.walk_for_bytes(next, insn.user))
    }

    pub(crate) fn walk_for_bytes(&mut self, rip: Gva, user: bool) -> Result<(), Stop> {
        let walk = self.walk(rip, ErrorCode::F.with(ErrorCode::U.when(user)), false)?;
        if self.shadow.memory.slot(walk.gfn).is_some() { Ok(()) } else { Err(Stop::NoBytes) }
    }

    /// The instruction cannot be decoded (`handle_emulation_failure`, 6.1).
    fn emulation_failed(&mut self, insn: &Insn, gva: Gva, how: Emulation, stop: Stop) -> After {
        if self.retry_after_failure(insn, gva, how) {
            return After::Resume;
        }
        if let Stop::Fault(fault) = stop {
            return After::Finished(self.inject(fault));
        }
        self.shadow.events.emulate_insn(insn.rip_or_zero(), true);
        self.vcpu.counters.insn_emulation_fail += 1;
        self.shadow.events.inj_exception(6, 0, false);
        After::Finished(Outcome::of(if insn.user { Status::InvalidOpcode } else { Status::InternalError }))
    }

    fn execute(&mut self, insn: &Insn) -> Result<Effect, Stop> {
        let mut effect = Effect::default();
        match insn.action {
            // Its bytes are there; what they do is the next operation.
            Action::Fetch => {}
            Action::Load => self.emulated_read(insn, &mut effect)?,
            Action::Copy => {
                // A load from a device is completed by going on where the emulator was (complete_emulated_mmio, 6.1): only
                // a store to one ends the exit.
                let mut stored = Effect::default();
                while effect.elements < insn.repeat && stored.mmio.is_none() {
                    let element = insn.element(effect.elements);
                    let mut load = Effect::default();
                    self.emulated_read(&element.loading(), &mut load)?;
                    self.emulated_write(&element, load.value, &mut stored)?;
                    self.vcpu.counters.mmio_exits += u64::from(load.mmio.is_some() && effect.mmio.is_some());
                    effect.mmio = effect.mmio.or(load.mmio).or(stored.mmio);
                    effect.elements += 1;
                }
            }
            // REP: every element that is left, one after the other, in this one exit. One that goes to a device ends
            // the exit; its completion in user space enters the guest at the same RIP.
            Action::Store => {
                while effect.elements < insn.repeat && effect.mmio.is_none() {
                    self.emulated_write(&insn.element(effect.elements), insn.value, &mut effect)?;
                    effect.elements += 1;
                }
            }
            Action::Rmw(_) => {
                self.emulated_read(insn, &mut effect).map_err(|fault| GuestFault {
                    // The operand is written as well, and the fault says so although the walk did not.
                    code: fault.code.with(ErrorCode::W),
                    ..fault
                })?;
                if insn.size > 8 {
                    // CMPXCHG16B is decoded and its operand read, but em_cmpxchg8b (6.1) does not do it.
                    return Err(Stop::Unhandled);
                }
                let (new, _) = insn.compute(effect.value);
                if insn.locked {
                    self.emulated_cmpxchg(insn, effect.value, new, &mut effect)?;
                } else {
                    self.emulated_write(insn, new, &mut effect)?;
                }
            }
        }
        effect.value &= mask(insn.size);
        if matches!(insn.action, Action::Store | Action::Copy) {
            effect.value = 0;
        }
        Ok(effect)
    }

    /// Finds an operand (`vcpu_mmio_gva_to_gpa`, 6.1): by the MMIO cache, or by a walk.
    fn locate(&mut self, insn: &Insn, gva: Gva, write: bool) -> Result<Operand, GuestFault> {
        let user = insn.user && !insn.implicit();
        let mut access = ErrorCode::U.when(user).with(ErrorCode::W.when(write));
        let cached = self.vcpu.mmio_matches(gva, self.shadow.memory.generation);
        let paging = self.vcpu.role.mode.has_tables();
        if cached && !(paging && permission_fault(&self.vcpu.role, self.vcpu.mmio.access, access, insn.ac)) {
            let gpa = Gpa(self.vcpu.mmio.gfn.gpa().0 | gva.offset());
            self.shadow.events.match_mmio(gva, gpa, write, false);
            return Ok(Operand::Mmio(gpa));
        }
        access = access.with(ErrorCode::IMPLICIT.when(insn.implicit()));
        let walk = self.walk(gva, access, insn.ac)?;
        let gpa = Gpa(walk.gfn.gpa().0 | gva.offset());
        // The default page of the local APIC is a device whatever the slots say.
        if gpa.gfn().0 == APIC_GFN {
            return Ok(Operand::Mmio(gpa));
        }
        if self.vcpu.mmio_gfn_matches(gpa.gfn(), self.shadow.memory.generation) {
            self.shadow.events.match_mmio(gva, gpa, write, true);
            return Ok(Operand::Mmio(gpa));
        }
        Ok(match self.shadow.memory.slot(walk.gfn) {
            Some(slot) if !(write && slot.readonly) => Operand::Ram(gpa),
            _ => Operand::Mmio(gpa),
        })
    }

    fn emulated_read(&mut self, insn: &Insn, effect: &mut Effect) -> Result<(), GuestFault> {
        let mut done = 0;
        for (gva, size) in insn.pieces() {
            if size == 0 {
                continue;
            }
            let piece = match self.locate(insn, gva, false)? {
                Operand::Ram(gpa) => self.read_ram(gpa, size.min(8)),
                Operand::Mmio(gpa) => {
                    effect.mmio.get_or_insert(gpa.0);
                    // User space answers with all ones, as a bus does where no device is.
                    self.shadow.events.mmio(0, size, gpa, 0);
                    self.shadow.events.mmio(1, size, gpa, mask(size));
                    mask(size)
                }
            };
            if done < 8 {
                effect.value |= piece << (done * 8);
            }
            done += size;
        }
        Ok(())
    }

    /// Stores an operand, one page after the other: walk, store and shadow of the first part come before the walk of
    /// the second (`emulator_read_write`, 6.1).
    fn emulated_write(&mut self, insn: &Insn, value: u64, effect: &mut Effect) -> Result<(), GuestFault> {
        let mut done = 0;
        for (gva, size) in insn.pieces() {
            if size == 0 {
                continue;
            }
            let part = slice(insn.wide(value), done, size);
            match self.locate(insn, gva, true)? {
                Operand::Ram(gpa) => self.write_ram(insn.keep, gpa, size, part),
                Operand::Mmio(gpa) => {
                    effect.mmio.get_or_insert(gpa.0);
                    self.shadow.events.mmio(2, size, gpa, part as u64);
                }
            }
            done += size;
        }
        Ok(())
    }

    pub(crate) fn write_ram(&mut self, keep: bool, gpa: Gpa, size: u8, value: u128) {
        self.host_makes_writable(gpa.gfn());
        if !keep {
            self.shadow.memory.host.write_wide(gpa, size, value);
            // The shadow of the entry goes, and with it every way through it; of an entry where the store only ends it stays.
            self.shadow.memory.ways_epoch += u64::from(gpa.0 % 8 + u64::from(size) > 8);
        }
        self.shadow.memory.mark_dirty(gpa.gfn());
        let flush = self.shadow.pte_write(gpa, size, &self.vcpu.role, self.vcpu.regs.cr4 & CR4_PAE != 0);
        self.pay(flush);
    }

    /// A locked exchange (`emulator_cmpxchg_emulated`, 6.1): always walks; what is not RAM, or crosses a line, is
    /// written the ordinary way after it.
    fn emulated_cmpxchg(&mut self, insn: &Insn, old: u64, new: u64, effect: &mut Effect) -> Result<(), GuestFault> {
        let crosses_line = insn.size > 8 || insn.gva.0 % 64 + u64::from(insn.size) > 64;
        if crosses_line {
            return self.emulated_write(insn, new, effect);
        }
        let user = insn.user && !insn.implicit();
        let access = ErrorCode::W.with(ErrorCode::U.when(user)).with(ErrorCode::IMPLICIT.when(insn.implicit()));
        let walk = self.walk(insn.gva, access, insn.ac);
        let ram = walk.ok().filter(|w| self.shadow.memory.slot(w.gfn).is_some_and(|slot| !slot.readonly));
        let Some(walk) = ram else { return self.emulated_write(insn, new, effect) };
        let gpa = Gpa(walk.gfn.gpa().0 | insn.gva.offset());
        let now = self.read_ram(gpa, insn.size);
        self.host_makes_writable(gpa.gfn());
        if now != old & mask(insn.size) {
            // The value came from a device that has become RAM since: nothing is written, the guest tries again.
            effect.again = true;
            return Ok(());
        }
        self.write_ram(insn.keep, gpa, insn.size, u128::from(new));
        Ok(())
    }
}

/// The frame of the local APIC's default page.
pub(crate) const APIC_GFN: u64 = 0xfee00;
