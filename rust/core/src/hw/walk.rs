//! The CPU's walk through the shadow tables, and the guest memory behind a leaf.
//!
//! There is no TLB model: KVM flushes on every change that takes a right away, so walking anew on each access differs
//! from a CPU with a TLB only where x86 leaves both open (section 12.1 of the specification, docs/fidelity.md).

use crate::bits::{PT_A, PT_D};
use crate::memory::Host;
use crate::shadow::Shadow;
use crate::shadow::spte::Spte;
use crate::types::{AccessKind, ErrorCode, Gfn, Gva, PageId};

/// The state of the CPU that its own walk obeys. CR0.WP and EFER.NX are always on while a shadow guest runs.
#[derive(Clone, Copy, Debug)]
pub struct CpuView {
    /// CPL 3.
    pub user: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP, unless EFLAGS.AC allows the access.
    pub smap: bool,
    /// A reserved-bit fault has P set.
    pub rsvd_sets_p: bool,
    /// PKRU's bits for key 0, which is the key of every shadow entry; 0 without CR4.PKE.
    pub key0: u32,
}

/// Walks the shadow for an access; sets A, and D for a store. The frame is `None` for the zero page. `table` is where
/// the walk begins, `None` behind an entry of a PAE root that is not present.
///
/// # Errors
/// The error code of the fault that the CPU raises.
#[inline]
pub fn access(
    shadow: &mut Shadow,
    table: Option<PageId>,
    gva: Gva,
    kind: AccessKind,
    cpu: CpuView,
) -> Result<Option<Gfn>, ErrorCode> {
    let Some(table) = table else { return Err(kind.code().with(ErrorCode::U.when(cpu.user))) };
    let (pos, level) = shadow.walk_down(table, gva);
    let spte = shadow.spte(pos);
    if !spte.present() {
        let code = kind.code().with(ErrorCode::U.when(cpu.user));
        if !spte.is_mmio() {
            return Err(code);
        }
        return Err(code.with(ErrorCode::RSVD).with(ErrorCode::P.when(cpu.rsvd_sets_p)));
    }
    if forbidden(spte, kind, cpu) {
        let key = ErrorCode::PK.when(forbidden_by_key(spte, kind, cpu));
        return Err(kind.code().with(ErrorCode::U.when(cpu.user)).with(ErrorCode::P).with(key));
    }
    let marks = if kind == AccessKind::Write { PT_A | PT_D } else { PT_A };
    if spte.0 & marks != marks {
        shadow.arena.update_spte(pos, Spte(spte.0 | marks));
    }
    Ok(Host::gfn(spte.pfn()).map(|gfn| Gfn(gfn.0 + (gva.0 >> 12 & (level.pages() - 1)))))
}

#[inline]
fn forbidden(spte: Spte, kind: AccessKind, cpu: CpuView) -> bool {
    use crate::bits::{PT_NX, PT_U, PT_W};
    let user_page = spte.0 & PT_U != 0;
    let by_kind = match kind {
        AccessKind::Read => false,
        AccessKind::Write => spte.0 & PT_W == 0,
        AccessKind::Fetch => spte.0 & PT_NX != 0,
    };
    let by_mode =
        if cpu.user { !user_page } else { user_page && if kind == AccessKind::Fetch { cpu.smep } else { cpu.smap } };
    by_kind || by_mode || forbidden_by_key(spte, kind, cpu)
}

#[inline]
fn forbidden_by_key(spte: Spte, kind: AccessKind, cpu: CpuView) -> bool {
    let bits = if kind == AccessKind::Write { 3 } else { 1 };
    cpu.key0 & bits != 0 && spte.0 & crate::bits::PT_U != 0 && kind != AccessKind::Fetch
}
