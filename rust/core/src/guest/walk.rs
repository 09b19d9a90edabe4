//! The walk through the guest's tables (`walk_addr_generic`, 6.1).

use crate::bits::{PT_A, PT_D};
use crate::cpu::CpuRole;
use crate::events::EventLog;
use crate::guest::gpte::Gpte;
use crate::guest::permission::{key_fault, permission_fault};
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

impl Walker<'_> {
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

/// What a walk found. Arrays are indexed by level - 1.
#[derive(Clone, Copy, Debug)]
pub struct GuestWalk {
    /// The leaf's level.
    pub level: Level,
    /// The frame of the address (inside a large page: of its 4 KiB part).
    pub gfn: Gfn,
    /// The entries, after their A and D bits were set.
    pub ptes: [Gpte; 5],
    /// The frames of the tables.
    pub tables: [Gfn; 5],
    /// The rights that the levels above grant.
    pub pt_access: [Access; 5],
    /// The rights of the whole walk, without W while the page is clean.
    pub pte_access: Access,
}

impl GuestWalk {
    /// The translation with paging off: every address is its own, every access is allowed, and nothing is raised
    /// (`nonpaging_gva_to_gpa`, 6.1).
    #[must_use]
    pub const fn flat(gva: Gva) -> Self {
        Self { gfn: Gfn(gva.0 >> 12), ..Self::start(Level::PT) }
    }

    const fn start(level: Level) -> Self {
        Self {
            level,
            gfn: Gfn(0),
            ptes: [Gpte(0); 5],
            tables: [Gfn(0); 5],
            pt_access: [Access::ALL; 5],
            pte_access: Access::ALL,
        }
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

/// Walks the guest's tables for an access of the kind in `access`, sets A and D bits, and raises the walk's events.
///
/// # Errors
/// The fault that the guest gets.
pub fn walk_addr(
    memory: &mut Memory,
    events: &mut EventLog,
    walker: &Walker<'_>,
    gva: Gva,
    access: ErrorCode,
) -> Result<GuestWalk, GuestFault> {
    events.pagetable_walk(gva, access);
    loop {
        let walked = descend(memory, events, walker, gva, access);
        let mut walk = match walked {
            Ok(walk) => walk,
            Err(base) => {
                let mut code = base.with(ErrorCode(access.0 & (ErrorCode::W.0 | ErrorCode::U.0)));
                if access.has(ErrorCode::F) && (walker.role.nx || walker.role.smep) {
                    code = code.with(ErrorCode::F);
                }
                events.walker_error(code);
                return Err(GuestFault { address: gva, code });
            }
        };
        if update_accessed_dirty(memory, events, walker.role, gva, access, &mut walk) {
            return Ok(walk);
        }
    }
}

/// One way down. The error holds the code's P and RSVD bits only.
fn descend(
    memory: &mut Memory,
    events: &mut EventLog,
    walker: &Walker<'_>,
    gva: Gva,
    access: ErrorCode,
) -> Result<GuestWalk, ErrorCode> {
    let (role, mode) = (walker.role, walker.role.mode);
    let mut walk = GuestWalk::start(mode.top);
    let Some(mut table) = walker.top_table(events, gva) else { return Err(ErrorCode(0)) };
    let mut granted = Access::ALL;
    let mut level = mode.top;
    let leaf = loop {
        let at = usize::from(level.0) - 1;
        walk.pt_access[at] = granted;
        if memory.slot(table).is_none() {
            return Err(ErrorCode(0));
        }
        let (there, entry) = memory.host.present_and_entry(table, mode.index(gva, level), mode.entry_bytes);
        if !there {
            // Reading an absent page brings in the shared zero page.
            memory.host.set_state(table, HostState::Zero);
        }
        let pte = Gpte(entry);
        events.paging_element(pte.0, level.0);
        (walk.tables[at], walk.ptes[at]) = (table, pte);
        if !pte.present() {
            return Err(ErrorCode(0));
        }
        if pte.has_reserved(role, level) {
            return Err(ErrorCode::P.with(ErrorCode::RSVD));
        }
        granted = granted.and(pte.access());
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
    Ok(walk)
}

/// Sets A in every entry of the walk and D in the leaf of a write, from the top down (`update_accessed_dirty_bits`,
/// 6.1). It is the host's write: it zaps nothing, whatever the table is. Returns `false` if an entry changed in between
/// (a table that maps itself), so that the walk must be made again.
fn update_accessed_dirty(
    memory: &mut Memory,
    events: &mut EventLog,
    role: &CpuRole,
    gva: Gva,
    access: ErrorCode,
    walk: &mut GuestWalk,
) -> bool {
    let write = access.has(ErrorCode::W);
    let (mode, bytes) = (role.mode, role.mode.entry_bytes);
    for level in (walk.level.0..=mode.top.0).rev() {
        let at = usize::from(level) - 1;
        let (table, index) = (walk.tables[at], mode.index(gva, Level(level)));
        let (old, mut new) = (walk.ptes[at], walk.ptes[at].0);
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
        let Some(slot) = memory.slot_mut(table) else { continue };
        if slot.readonly {
            continue;
        }
        if memory.host.entry(table, index, bytes) != old.0 {
            return false;
        }
        memory.host.set_entry(table, index, bytes, new);
        memory.mark_dirty(table);
        walk.ptes[at] = Gpte(new);
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
        let found = walk_addr(memory, &mut events, &walker, Gva(gva), access);
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
