//! What an operation came to, held to what the model says of it.

use super::control::Verdict;
use super::memory::{A, D, Version};
use super::referee::{Before, Referee, expect};
use super::rules::{Access, Kind};
use super::touch::Touch;
use super::walk::{fault_now, walk_now};
use shadowkvm_core::engine::Vm;
use shadowkvm_core::outcome::{Outcome, Status};
use shadowkvm_core::types::Gpa;

impl Referee {
    pub(crate) fn check_outcome(&self, vm: &Vm, before: &Before, outcome: &Outcome) -> Result<(), String> {
        let plan = &before.plan;
        let all_exist = plan.touches.iter().all(|touch| before.mode.takes(touch.access.gva));
        let said = before.verdict;
        match outcome.status {
            Status::Done => {
                expect(all_exist, || "done, with an address that does not exist in this mode".to_owned())?;
                let fine = matches!(said, None | Some(Verdict::Fine(_)));
                expect(fine, || format!("{:?} was done, which is {said:x?}", plan.control))?;
                self.check_done(vm, before, outcome)
            }
            Status::PageFault | Status::DoubleFault => self.check_fault(before, outcome),
            Status::Mmio => {
                let gfn = outcome.address >> 12;
                let led = before.targets.iter().flatten().any(|target| *target == gfn);
                // The cache of MMIO addresses does not ask who makes the access (`vcpu_mmio_gva_to_gpa`, 6.1).
                expect(led || plan.implicit_with_ac && before.mode.smap, || {
                    format!("an access to the device at {:#x}, where no table led", outcome.address)
                })
            }
            Status::GeneralProtection => {
                let refused = plan.control.is_some() && matches!(said, None | Some(Verdict::GeneralProtection(_)));
                expect(refused || !all_exist, || format!("#GP for {:?}, which is {said:x?}", plan.control))
            }
            Status::InvalidOpcode if said == Some(Verdict::InvalidOpcode) => Ok(()),
            // Instructions that cannot be fetched.
            Status::InvalidOpcode | Status::InternalError => Ok(()),
            Status::Shutdown => self.check_shutdown(vm, before),
            Status::Livelock => Self::check_livelock(vm, before),
        }
    }

    /// A vCPU shuts down if a root table has no memory.
    fn check_shutdown(&self, vm: &Vm, before: &Before) -> Result<(), String> {
        let new = match before.verdict {
            Some(Verdict::Fine(state)) => Some(state.base()),
            _ => None,
        };
        let bases = [Some(self.tlbs[before.plan.vcpu].base()), new];
        let mut tables = bases.into_iter().flatten().flat_map(super::walk::Base::tables);
        let without = tables.any(|gfn| vm.read_memory(Gpa(gfn << 12), 1).is_err());
        // A #PF while #DF is delivered is a triple fault.
        expect(without || before.plan.delivery, || "a shutdown, though every root table has memory".to_owned())
    }

    /// An instruction that faults for ever: one with a device, one in event delivery, one that a protection key shuts
    /// out of a page whose shadow has another key; an access that the CPU makes by itself with EFLAGS.AC set, as the
    /// hardware's error code does not tell KVM that AC does not count (`permission_fault`, 6.1); with CR0.WP off, a store
    /// to the read-only large page in which the instruction itself lies: what serves the one takes the direct page of the
    /// other away (`validate_direct_spte`, 6.1).
    fn check_livelock(vm: &Vm, before: &Before) -> Result<(), String> {
        let touches = &before.plan.touches;
        let known = before.plan.delivery
            || before.plan.implicit_with_ac && before.mode.smap
            || !before.mode.wp && touches.iter().any(|touch| touch.access.kind == Kind::Fetch) && touches.len() > 1
            || before.mode.pkru.is_some()
            || vm.vcpu_counters().pf_mmio_spte_created != 0;
        expect(known, || format!("a livelock; the tables give {:x?}", before.faults))
    }

    fn check_done(&self, vm: &Vm, before: &Before, outcome: &Outcome) -> Result<(), String> {
        expect(!before.locked, || format!("{:x?} was done; its key forbids it", before.plan.touches))?;
        let tlb = &self.tlbs[before.plan.vcpu];
        for (i, touch) in before.plan.touches.iter().enumerate() {
            let now = tlb.targets(&self.memory, self.seen, &touch.access, false);
            let all = before.targets[i].iter().chain(&now);
            let in_slot = |gfn: &&u64| vm.read_memory(Gpa(**gfn << 12), 1).is_ok();
            expect(all.clone().any(|gfn| in_slot(&gfn)), || {
                format!("{touch:x?} was done, but no walk since the last flush allows it; now {:x?}", before.faults[i])
            })?;
            let right = before.plan.control.is_some()
                || all.clone().any(|gfn| touch.matches(&self.memory, &before.changed, *gfn, outcome.value));
            expect(right, || {
                format!("{touch:x?} gave {:#x}, which is in none of the frames {:x?}", outcome.value, before.targets[i])
            })?;
            self.check_marks(before, i)?;
        }
        Ok(())
    }

    /// An access by tables that have not changed since the last flush leaves A in each, and D in the leaf of a store.
    fn check_marks(&self, before: &Before, i: usize) -> Result<(), String> {
        let (touch, path) = (&before.plan.touches[i], &before.paths[i]);
        if before.faults[i].is_some() || touch.keep {
            return Ok(());
        }
        for (depth, at) in path.iter().enumerate() {
            let versions = self.memory.versions(*at, 0);
            let gains = |pair: &[Version]| pair[1].value & pair[0].value == pair[0].value;
            let marks = |pair: &[Version]| (pair[0].value ^ pair[1].value) & !(A | D) == 0;
            if at.gfn >= self.memory.unmarked || !versions.windows(2).all(|pair| gains(pair) && marks(pair)) {
                return Ok(());
            }
            let leaf = depth + 1 == path.len() && touch.access.kind == Kind::Write;
            let wanted = A | if leaf { D } else { 0 };
            let value = self.memory.entry(*at).unwrap_or(0);
            expect(value & wanted == wanted, || {
                format!("{touch:x?} was done, but the entry at {at:x?} is {value:#x}")
            })?;
        }
        Ok(())
    }

    /// A fault is what the tables of now give: KVM walks them before it hands a fault to the guest.
    fn check_fault(&self, before: &Before, outcome: &Outcome) -> Result<(), String> {
        let tlb = &self.tlbs[before.plan.vcpu];
        let here = |touch: &Touch| touch.access.gva >> 12 == outcome.address >> 12;
        let mut seen = Vec::new();
        for (i, touch) in before.plan.touches.iter().enumerate().filter(|(_, touch)| here(touch)) {
            let after = fault_now(&self.memory, tlb.base(), &touch.access, before.mode);
            for code in [before.faults[i], after].into_iter().flatten() {
                // #DF has no code of its own. A read-modify-write may fault as a read, whose code KVM's emulator completes.
                let any = outcome.status == Status::DoubleFault;
                if any || code == outcome.error_code || touch.rmw && code & !2 == outcome.error_code & !2 {
                    return Ok(());
                }
                seen.push(code);
            }
        }
        Err(format!("#PF {:#x} at {:#x}; the tables give {seen:x?}", outcome.error_code, outcome.address))
    }

    /// The first of these accesses for which the vCPU cannot hold a translation of `gva` to `gfn`.
    pub(crate) fn first_refused(&self, vcpu: usize, gva: u64, gfn: u64, wanted: &[Access]) -> Option<Access> {
        let tlb = &self.tlbs[vcpu];
        let mut left = wanted.to_vec();
        // Mostly the tables of now allow all.
        if let Ok(page) = walk_now(&self.memory, tlb.base(), gva, tlb.mode(), |_| ()) {
            left.retain(|access| !tlb.serves(page, access, gfn));
        }
        if !left.is_empty() {
            tlb.may_hold(&self.memory, self.seen, gva, |page| {
                left.retain(|access| !tlb.serves(page, access, gfn));
                left.is_empty()
            });
        }
        left.first().copied()
    }
}
