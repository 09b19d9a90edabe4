//! All translations that the shadow offers a vCPU, each held to the model.

use super::referee::Referee;
use super::rules::{Access, Kind};
use crate::world::Paging;
use shadowkvm_core::cpu::{Requests, Top};
use shadowkvm_core::engine::Vm;
use shadowkvm_core::memory::Host;
use shadowkvm_core::types::{Access as Rights, Gfn, Level, PageId};

/// A leaf of the shadow: where, to which frame, with which rights of the CPU.
struct Leaf {
    gva: u64,
    gfn: u64,
    rights: Rights,
    device: bool,
}

fn leaves(vm: &Vm, id: PageId, level: u8, base: u64, found: &mut Vec<Leaf>) {
    let arena = vm.shadow().arena();
    for index in 0..512 {
        let spte = arena.spte(id.entry(index));
        let gva = base | (index as u64) << (12 + 9 * (level - 1));
        if spte.is_table(level) {
            leaves(vm, spte.child(), level - 1, gva, found);
        } else if spte.is_mmio() {
            found.push(Leaf { gva, gfn: spte.mmio_gfn().0, rights: spte.mmio_access(), device: true });
        } else if spte.present() {
            // The zero page stands for whatever frame it is mapped for: contents alone cannot tell.
            let Some(first) = Host::gfn(spte.pfn()) else { continue };
            for page in [0, Level(level).pages() - 1] {
                found.push(Leaf { gva: gva + (page << 12), gfn: first.0 + page, rights: spte.access(), device: false });
            }
        }
    }
}

/// KVM's one hole (`make_spte`, 6.1): an entry that takes the place of an MMIO entry inherits W unseen. Afterwards
/// stores to a table may go unnoticed, and the model has nothing more to say.
pub(crate) fn hole_was_taken(vm: &Vm) -> bool {
    let arena = vm.shadow().arena();
    if vm.vcpu_counters().pf_mmio_spte_created == 0 {
        return false;
    }
    arena.live().into_iter().any(|id| {
        let level = arena[id].level().0;
        (0..512).any(|index| {
            let spte = arena.spte(id.entry(index));
            let leaf = spte.present() && !spte.is_table(level) && spte.writable() && level == 1;
            let Some(gfn) = Host::gfn(spte.pfn()).filter(|_| leaf) else { return false };
            arena.chain(gfn).any(|other| {
                let page = &arena[other];
                page.gfn == gfn && page.has_gptes() && !page.unsync && !page.role.invalid()
            })
        })
    })
}

/// Whether the shadow has nothing at all for an address, so that KVM must walk the guest's tables.
pub(crate) fn has_nothing(vm: &Vm, vcpu: usize, gva: u64) -> bool {
    let vcpu = &vm.vcpus()[vcpu];
    let Some(mut table) = vcpu.root.table(shadowkvm_core::types::Gva(gva)) else { return false };
    let arena = vm.shadow().arena();
    if vcpu.requests != Requests::default() || arena[table].role.invalid() {
        return false;
    }
    loop {
        let level = arena[table].level().0;
        let spte = arena.spte(table.entry((gva >> (12 + 9 * (level - 1))) as usize & 511));
        if !spte.is_table(level) {
            return !spte.present() && !spte.is_mmio();
        }
        table = spte.child();
    }
}

/// Each translation in the current root of each vCPU was allowed at some time since the last flush that covers it.
pub(crate) fn check(vm: &Vm, referee: &Referee) -> Result<(), String> {
    for vcpu in vm.vcpus() {
        let mut requests = vcpu.requests;
        requests.check(Requests::TLB_FLUSH);
        let roots = match vcpu.root.top {
            _ if requests != Requests::default() => continue,
            // The dummy root of 6.12 maps nothing.
            Top::None | Top::Dummy => continue,
            Top::Page(id) => [Some(id), None, None, None],
            Top::Pae(ids) => ids,
        };
        let mode = referee.tlbs[usize::from(vcpu.id)].mode();
        let levels = match mode.paging {
            Paging::Four => 4,
            Paging::Five => 5,
            _ => 2,
        };
        let mut found = Vec::new();
        for (i, id) in (0u64..).zip(roots) {
            if let Some(id) = id.filter(|id| !vm.shadow().arena()[*id].role.invalid()) {
                leaves(vm, id, levels, i << 30, &mut found);
            }
        }
        for leaf in &mut found {
            let bits = if mode.paging == Paging::Five { 57 } else { 48 };
            leaf.gva = ((leaf.gva << (64 - bits)).cast_signed() >> (64 - bits)).cast_unsigned();
            check_leaf(vm, referee, usize::from(vcpu.id), leaf)?;
        }
    }
    Ok(())
}

fn check_leaf(vm: &Vm, referee: &Referee, vcpu: usize, leaf: &Leaf) -> Result<(), String> {
    let mode = referee.tlbs[vcpu].mode();
    let (w, u, x) = (leaf.rights.has(Rights::W), leaf.rights.has(Rights::U), leaf.rights.has(Rights::X));
    if !leaf.device && vm.shadow().memory.slot(Gfn(leaf.gfn)).is_none() {
        return Err(format!("{:#x} leads to frame {:#x} without memory", leaf.gva, leaf.gfn));
    }
    let mut wanted = Vec::with_capacity(6);
    for (kind, right) in [(Kind::Read, true), (Kind::Write, w), (Kind::Fetch, x && !leaf.device)] {
        for user in [false, true] {
            // The supervisor with AC may touch the user's pages; SMEP keeps it from executing them.
            let barred = if user { !u } else { u && kind == Kind::Fetch && mode.smep };
            if right && !barred {
                wanted.push(Access { gva: leaf.gva, kind, user, ac: true });
            }
        }
    }
    let Some(refused) = referee.first_refused(vcpu, leaf.gva, leaf.gfn, &wanted) else { return Ok(()) };
    Err(format!(
        "vCPU {vcpu} may {:?} {:#x} (user {}) in frame {:#x}; no walk since the last flush allows it",
        refused.kind, leaf.gva, refused.user, leaf.gfn
    ))
}
