//! A VM of a state that comes from elsewhere. Its bytes are the binding's business; what they say is looked through here.

use crate::config::{MAX_QUOTA, MAX_VCPUS, MAXPHYADDR};
use crate::cpu::{CpuRole, Root, Vcpu};
use crate::engine::Vm;
use crate::error::InvariantError;
use crate::fault::ways::Ways;
use crate::policy::{Decisions, Policy};
use crate::shadow::Shadow;
use crate::types::ENTRIES;
use serde::Deserialize;

/// A state as [`Vm`] is serialised, that was read: no VM before [`SavedVm::revive`] has looked through it.
#[derive(Debug, Deserialize)]
pub struct SavedVm {
    shadow: Shadow,
    vcpus: Vec<Vcpu>,
    sites: Vec<u64>,
}

impl SavedVm {
    /// The VM that goes on from the state, with a policy of the caller's: a state holds none.
    ///
    /// # Errors
    /// The state cannot be: a number in it leads to nothing, or an invariant does not hold ([`Vm::audit`]).
    pub fn revive(self, policy: Box<dyn Policy>) -> Result<Vm, InvariantError> {
        self.check_bounds()?;
        let Self { mut shadow, mut vcpus, sites } = self;
        shadow.policy = Decisions::new(policy, vcpus.len());
        for vcpu in &mut vcpus {
            vcpu.role = CpuRole::of(&vcpu.regs, &shadow.config.cpu);
        }
        let ways = vec![Ways::default(); vcpus.len()];
        let vm = Vm { shadow, vcpus, ways, sites };
        vm.audit()?;
        Ok(vm)
    }

    /// Whether numbers are in their ranges, so that the audit and the engine can follow them.
    fn check_bounds(&self) -> Result<(), InvariantError> {
        let Self { shadow, vcpus, .. } = self;
        let unless = InvariantError::unless;
        let numbered = vcpus.iter().enumerate().all(|(at, vcpu)| usize::from(vcpu.id) == at);
        unless((1..=MAX_VCPUS).contains(&vcpus.len()) && numbered, "vCPUs that are not numbered from 0")?;
        unless(MAXPHYADDR.contains(&shadow.config.cpu.maxphyaddr), "an impossible number of address bits")?;
        unless(shadow.max_pages <= MAX_QUOTA, "an impossible quota of shadow pages")?;
        shadow.memory.check_bounds()?;
        shadow.lists.check_bounds()?;
        shadow.arena.check_bounds()?;
        let roots = vcpus.iter().flat_map(|vcpu| std::iter::once(&vcpu.root).chain(&vcpu.prev_roots));
        let named = roots.flat_map(Root::pages).chain(shadow.unsync_queue.iter().copied());
        unless(named.into_iter().all(|id| (id.0 as usize) < shadow.arena.capacity()), "a root beyond the last page")?;
        let parents = shadow.arena.live().into_iter().map(|id| shadow.arena[id].parents);
        let mapped = shadow.memory.slots().iter().flat_map(|slot| shadow.memory.rmaps(slot).map(|(_, _, head)| head));
        let limit = shadow.arena.capacity();
        let leads = |head| {
            shadow.lists.has(head)
                && shadow.lists.iter(head).take(limit * ENTRIES).all(|pos| (pos.page().0 as usize) < limit)
        };
        unless(parents.chain(mapped).all(leads), "a list of entries that are not there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::cpu::Top;
    use crate::policy::Kvm;
    use crate::types::{Gfn, Gpa, Level, PageId, RmapHead};

    fn saved() -> SavedVm {
        let Vm { shadow, vcpus, sites, .. } = Vm::new(16 << 20, 2, Config::default(), Box::new(Kvm), 0).unwrap();
        SavedVm { shadow, vcpus, sites }
    }

    fn refuses(harm: impl FnOnce(&mut SavedVm), expected: &str) {
        let mut state = saved();
        harm(&mut state);
        let text = state.revive(Box::new(Kvm)).expect_err(expected).to_string();
        assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
    }

    #[test]
    fn a_state_becomes_the_same_vm() {
        let vm = Vm::new(16 << 20, 2, Config::default(), Box::new(Kvm), 0).unwrap();
        assert_eq!(saved().revive(Box::new(Kvm)).unwrap().state_hash(), vm.state_hash());
    }

    #[test]
    fn numbers_that_lead_to_nothing_are_refused() {
        refuses(|s| s.vcpus.clear(), "vCPUs");
        refuses(|s| s.vcpus[1].id = 0, "vCPUs");
        refuses(|s| s.shadow.max_pages = 1 << 40, "quota");
        refuses(|s| s.shadow.config.cpu.maxphyaddr = 70, "address bits");
        refuses(|s| s.vcpus[0].root = Root { top: Top::Page(PageId(7)), pgd: 0 }, "beyond the last page");
        refuses(|s| s.shadow.unsync_queue.push_back(PageId(0)), "beyond the last page");
        let list = |s: &mut SavedVm| {
            *s.shadow.memory.rmap_mut(Gfn(3), Level::PT).unwrap() = RmapHead(8);
        };
        refuses(list, "list of entries");
    }

    #[test]
    fn bookkeeping_that_is_no_slots_is_refused() {
        let far = |s: &mut SavedVm, level, head| {
            // A slot that begins inside of 2 MiB and of 1 GiB.
            s.shadow.memory.add_slot(1, Gpa(65 << 20), 4 << 20, false, 48).unwrap();
            *s.shadow.memory.rmap_mut(Gfn(65 << 8), level).unwrap() = RmapHead(head);
        };
        refuses(|s| far(s, Level::PDPT, 8), "not its own");
        refuses(|s| far(s, Level::PD, 8), "does not add up");
        let gone = |s: &mut SavedVm| {
            far(s, Level::PT, 8);
            s.shadow.memory.remove_slot(1);
        };
        refuses(gone, "no memslot");
        let counted = |s: &mut SavedVm| {
            far(s, Level::PT, 0);
            s.shadow.memory.books_mut(Gfn(65 << 8)).unwrap().tables = 0xffff;
            s.shadow.memory.remove_slot(1);
        };
        refuses(counted, "no memslot");
    }

    #[test]
    fn a_broken_invariant_is_refused() {
        refuses(|s| s.shadow.counters.mmu_unsync = 1, "mmu_unsync");
    }
}
