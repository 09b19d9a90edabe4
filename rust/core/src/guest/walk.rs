//! The walk through the guest's tables (`walk_addr_generic`, 6.1).

use crate::bits::{PT_A, PT_ADDR, PT_D};
use crate::cpu::{CpuRole, Vcpu, key_fault, permission_fault};
use crate::events::{EventKind, EventLog};
use crate::guest::gpte::Gpte;
use crate::memory::{HostState, Memory};
use crate::types::{Access, ErrorCode, Gfn, Gpa, Gva, Level};

/// Who walks: the vCPU's state that the walk obeys.
#[derive(Clone, Copy, Debug)]
pub struct Walker<'a> {
    /// Rights and reserved bits.
    pub role: &'a CpuRole,
    /// The root of the tables.
    pub cr3: u64,
    /// The PDPTE registers.
    pub pdptes: &'a [u64; 4],
    /// EFLAGS.AC.
    pub ac: bool,
    /// PKRU.
    pub pkru: u32,
}

impl<'a> Walker<'a> {
    /// A vCPU's.
    #[inline]
    #[must_use]
    pub const fn of(vcpu: &'a Vcpu, ac: bool) -> Self {
        Self { role: &vcpu.role, cr3: vcpu.regs.cr3 & PT_ADDR, pdptes: &vcpu.pdptes, ac, pkru: vcpu.pkru }
    }

    /// The table where the walk for an address begins. PAE: the frame in the PDPTE register, which is not checked
    /// again; `None` if it is not present.
    fn top_table(&self, events: &mut EventLog, gva: Gva) -> Option<Gfn> {
        if !self.role.mode.pdptes {
            return Some(Gpte(self.cr3).gfn());
        }
        let pdpte = Gpte(self.pdptes[(gva.0 >> 30) as usize & 3]);
        events.paging_element(pdpte.0, 3);
        pdpte.present().then(|| pdpte.gfn())
    }
}

/// What a walk met at one level.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The frame of the table.
    pub table: Gfn,
    /// The entry, after its A and D bits were set.
    pub pte: Gpte,
    /// The rights that the levels above grant.
    pub access: Access,
}

/// What a walk found.
#[derive(Clone, Copy, Debug)]
pub struct GuestWalk {
    /// The leaf's level.
    pub level: Level,
    /// The frame of the address (inside a large page: of its 4 KiB part).
    pub gfn: Gfn,
    /// What stands at each level, by level - 1.
    pub steps: [Step; 5],
    /// The rights of the whole walk, without W while the page is clean.
    pub pte_access: Access,
    /// A and D bits were written, so that an entry may have changed since it was read (a table that maps itself).
    pub wrote: bool,
}

impl GuestWalk {
    /// The translation with paging off: every address is its own, every access is allowed, and nothing is raised
    /// (`nonpaging_gva_to_gpa`, 6.1).
    #[must_use]
    pub const fn flat(gva: Gva) -> Self {
        Self { level: Level::PT, gfn: Gfn(gva.0 >> 12), ..Self::start() }
    }

    /// A walk that has not begun.
    #[inline]
    #[must_use]
    pub const fn start() -> Self {
        let step = Step { table: Gfn(0), pte: Gpte(0), access: Access::ALL };
        Self { level: Level(0), gfn: Gfn(0), steps: [step; 5], pte_access: Access::ALL, wrote: false }
    }

    /// Whether every entry above the last level has A (one in a read-only slot never gets it).
    #[must_use]
    pub fn tables_are_accessed(&self, top: Level) -> bool {
        self.steps[1..usize::from(top.0)].iter().all(|step| step.pte.accessed())
    }

    /// Whether the walk has come to its last-level table already.
    const fn is_under_way(&self) -> bool {
        self.level.0 > 0
    }
}

/// The guest forbids the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestFault {
    /// CR2.
    pub address: Gva,
    /// The code that the guest gets.
    pub code: ErrorCode,
}

/// Walks the guest's tables for an access of the kind in `access`, sets A and D bits, and raises the walk's events. What
/// it found goes to `walk`, which may be one that has come to the last-level table already.
///
/// # Errors
/// The fault that the guest gets.
pub fn walk_addr(
    memory: &mut Memory,
    events: &mut EventLog,
    walker: &Walker<'_>,
    (gva, access): (Gva, ErrorCode),
    walk: &mut GuestWalk,
) -> Result<(), GuestFault> {
    events.pagetable_walk(gva, access);
    if walk.is_under_way() && events.wants(EventKind::PagingElement) {
        for level in (2..=walker.role.mode.top.0).rev() {
            events.paging_element(walk.steps[usize::from(level) - 1].pte.0, level);
        }
    }
    loop {
        match descend(memory, events, walker, (gva, access), walk) {
            Ok(marked) if marked.has_all(access) => return Ok(()),
            Ok(_) if update_accessed_dirty(memory, events, walker.role, (gva, access), walk) => return Ok(()),
            Ok(_) => walk.level = Level(0),
            Err(base) => {
                let code = fault_code(walker.role, base, access);
                events.walker_error(code);
                return Err(GuestFault { address: gva, code });
            }
        }
    }
}

/// The whole code of a fault of which P and RSVD are known (`walk_addr_generic`, 6.1).
#[must_use]
pub const fn fault_code(role: &CpuRole, base: ErrorCode, access: ErrorCode) -> ErrorCode {
    let fetch = access.has(ErrorCode::F) && (role.nx || role.smep);
    base.with(ErrorCode(access.0 & (ErrorCode::W.0 | ErrorCode::U.0))).with(ErrorCode::F.when(fetch))
}

/// The marks that a walk found: A if every entry has it, D if the leaf has it.
#[derive(Clone, Copy)]
struct Marks(u64);

impl Marks {
    /// Whether the access leaves nothing to be set.
    #[inline]
    const fn has_all(self, access: ErrorCode) -> bool {
        let wanted = if access.has(ErrorCode::W) { PT_A | PT_D } else { PT_A };
        self.0 & wanted == wanted
    }
}

/// One way down. The error holds the code's P and RSVD bits only.
#[inline]
fn descend(
    memory: &mut Memory,
    events: &mut EventLog,
    walker: &Walker<'_>,
    (gva, access): (Gva, ErrorCode),
    walk: &mut GuestWalk,
) -> Result<Marks, ErrorCode> {
    let (role, mode) = (walker.role, walker.role.mode);
    let (mut table, mut granted, mut level);
    if walk.is_under_way() {
        (table, granted, level) = (walk.steps[0].table, walk.steps[0].access, Level::PT);
    } else {
        let Some(top) = walker.top_table(events, gva) else { return Err(ErrorCode(0)) };
        (table, granted, level) = (top, Access::ALL, mode.top);
    }
    let mut marks = !0;
    walk.wrote = false;
    let leaf = loop {
        if !memory.has_slot(table) {
            return Err(ErrorCode(0));
        }
        let (there, entry) = memory.host.present_and_entry(table, mode.index(gva, level), mode.entry_bytes);
        if !there {
            // Reading an absent page brings in the shared zero page.
            memory.host.set_state(table, HostState::Zero);
        }
        let pte = Gpte(entry);
        events.paging_element(pte.0, level.0);
        walk.steps[usize::from(level.0) - 1] = Step { table, pte, access: granted };
        if !pte.present() {
            return Err(ErrorCode(0));
        }
        if pte.has_reserved(role, level) {
            return Err(ErrorCode::P.with(ErrorCode::RSVD));
        }
        granted = granted.and(pte.access());
        marks &= pte.0 | PT_D;
        if pte.is_leaf(role, level) {
            break pte;
        }
        table = pte.gfn();
        level = level.down();
    };
    let by_key = key_fault(role, walker.pkru, leaf.key(), granted, access);
    if by_key || permission_fault(role, granted, access, walker.ac) {
        return Err(ErrorCode::P.with(ErrorCode::PK.when(by_key)));
    }
    walk.level = level;
    walk.gfn = Gfn(leaf.leaf_gfn(mode, level).0 + ((gva.0 >> 12) & (mode.pages(level) - 1)));
    walk.pte_access = if access.has(ErrorCode::W) { granted } else { leaf.protect_clean(granted) };
    Ok(Marks(marks & (leaf.0 | !PT_D)))
}

/// Sets A in every entry of the walk and D in the leaf of a write, from the top down (`update_accessed_dirty_bits`,
/// 6.1). It is the host's write: it zaps nothing, whatever the table is. Returns `false` if an entry changed in between
/// (a table that maps itself), so that the walk must be made again.
#[cold]
fn update_accessed_dirty(
    memory: &mut Memory,
    events: &mut EventLog,
    role: &CpuRole,
    (gva, access): (Gva, ErrorCode),
    walk: &mut GuestWalk,
) -> bool {
    let write = access.has(ErrorCode::W);
    let (mode, bytes) = (role.mode, role.mode.entry_bytes);
    for level in (walk.level.0..=mode.top.0).rev() {
        let Step { table, pte: old, .. } = walk.steps[usize::from(level) - 1];
        let (index, mut new) = (mode.index(gva, Level(level)), old.0);
        let gpa = Gpa(table.gpa().0 + u64::from(bytes) * index as u64);
        if !old.accessed() {
            events.set_accessed_bit(gpa);
            new |= PT_A;
        }
        if level == walk.level.0 && write && !old.dirty() {
            events.set_dirty_bit(gpa);
            new |= PT_D;
        }
        if new == old.0 {
            continue;
        }
        let Some(slot) = memory.slot(table) else { continue };
        if slot.readonly {
            continue;
        }
        let tracked = memory.books(table).track > 0;
        if memory.host.entry(table, index, bytes) != old.0 {
            return false;
        }
        memory.host.set_entry(table, index, bytes, new);
        memory.mark_dirty(table);
        memory.ways_epoch += u64::from(tracked);
        walk.steps[usize::from(level) - 1].pte = Gpte(new);
        walk.wrote = true;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ZEN;
    use crate::cpu::Registers;

    fn memory(entries: &[(u64, u64)]) -> Memory {
        let mut memory = Memory::new(64);
        memory.add_slot(0, Gpa(0), 64 << 12, false, 48).unwrap();
        for (gpa, value) in entries {
            memory.host.write(Gpa(*gpa), 8, *value);
        }
        memory
    }

    fn walk(memory: &mut Memory, gva: u64, access: ErrorCode) -> (Result<GuestWalk, GuestFault>, Vec<String>) {
        let mut events = EventLog::new(EventLog::EVERYTHING);
        let role = CpuRole::of(&Registers::default(), &ZEN);
        let walker = Walker { role: &role, cr3: 0x1000, pdptes: &[0; 4], ac: false, pkru: 0 };
        let mut walk = GuestWalk::start();
        let found = walk_addr(memory, &mut events, &walker, (Gva(gva), access), &mut walk).map(|()| walk);
        (found, events.take().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn accessed_and_dirty_bits_are_set_from_the_top_down() {
        let mut memory = memory(&[(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x9007)]);
        let (found, events) = walk(&mut memory, 0x1234, ErrorCode::W);
        let found = found.unwrap();
        assert_eq!((found.gfn, found.level, found.pte_access), (Gfn(9), Level(1), Access::ALL));
        assert_eq!(memory.host.read(Gpa(0x4008), 8), 0x9067);
        let bits: Vec<_> = events.iter().filter(|e| e.contains("_bit")).cloned().collect();
        assert_eq!(bits.len(), 5);
        assert_eq!(bits[0], "kvm_mmu_set_accessed_bit: gpa 1000");
        assert_eq!(bits[4], "kvm_mmu_set_dirty_bit: gpa 4008");
    }

    #[test]
    fn a_table_that_maps_itself_is_walked_again() {
        let mut memory = memory(&[(0x1000, 0x1007)]);
        let (found, events) = walk(&mut memory, 0, ErrorCode(0));
        assert_eq!(found.unwrap().gfn, Gfn(1));
        assert_eq!(events.iter().filter(|e| e.contains("paging_element")).count(), 8);
    }

    #[test]
    fn codes_tell_not_present_reserved_and_forbidden() {
        let mut memory = memory(&[
            (0x1000, 0x2067),
            (0x2000, 0x3067),
            (0x3000, 0x4067),
            (0x4000, 0x9065),
            (0x4010, 1 << 50 | 0x9067),
        ]);
        let code = |m: &mut Memory, gva, access| walk(m, gva, access).0.unwrap_err().code.0;
        assert_eq!(code(&mut memory, 0, ErrorCode::W), 3);
        assert_eq!(code(&mut memory, 0x1000, ErrorCode::U), 4);
        assert_eq!(code(&mut memory, 0x2000, ErrorCode(0)), 9);
        assert_eq!(code(&mut memory, 1 << 39, ErrorCode::F), 16);
    }
}
