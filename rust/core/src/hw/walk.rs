//! The CPU's walk through the shadow tables, and the guest memory behind a leaf.
//!
//! There is no TLB model: KVM flushes on every change that takes a right away, so walking anew on each access differs
//! from a CPU with a TLB only where x86 leaves both open (section 12.1 of the specification, docs/fidelity.md).

use crate::bits::{PT_A, PT_D};
use crate::cpu::{AccessRow, CpuRole, CpuView};
use crate::memory::Host;
use crate::shadow::Shadow;
use crate::shadow::spte::Spte;
use crate::types::{ErrorCode, Gfn, Gva, Level, PageId, SptePos};

/// Walks the shadow for an access; sets A, and D for a store. The frame is `None` for the zero page. `table` is where
/// the walk begins, `None` behind an entry of a PAE root that is not present.
///
/// # Errors
/// The error code of the fault that the CPU raises.
#[inline]
pub fn access(
    shadow: &mut Shadow,
    role: &CpuRole,
    table: Option<PageId>,
    gva: Gva,
    what: (AccessRow, CpuView),
) -> Result<Option<Gfn>, ErrorCode> {
    let Some(table) = table else { return Err(what.0.code()) };
    let (pos, level) = shadow.walk_down(table, gva);
    access_entry(shadow, role, (pos, level), gva, what)
}

/// The same at the end of the walk: the entry at `pos`, of a page of `level`, decides.
///
/// # Errors
/// The error code of the fault that the CPU raises.
#[inline(always)]
pub fn access_entry(
    shadow: &mut Shadow,
    role: &CpuRole,
    (pos, level): (SptePos, Level),
    gva: Gva,
    (row, cpu): (AccessRow, CpuView),
) -> Result<Option<Gfn>, ErrorCode> {
    let spte = shadow.spte(pos);
    if !spte.present() {
        if !spte.is_mmio() {
            return Err(row.code());
        }
        return Err(row.code().with(ErrorCode::RSVD).with(ErrorCode::P.when(cpu.rsvd_sets_p)));
    }
    let have = spte.access();
    let by_key = cpu.forbids_by_key(have, row);
    if by_key || role.cpu_forbids(have, row) {
        return Err(row.code().with(ErrorCode::P).with(ErrorCode::PK.when(by_key)));
    }
    let marks = if row.is_store() { PT_A | PT_D } else { PT_A };
    if spte.0 & marks != marks {
        shadow.arena.update_spte(pos, Spte(spte.0 | marks));
    }
    Ok(Host::gfn(spte.pfn()).map(|gfn| Gfn(gfn.0 + (gva.0 >> 12 & (level.pages() - 1)))))
}
