//! Whether the guest's rights allow an access, and whether a shadow entry's do.

use crate::bits::{PT_A, PT_D, PT_NX, PT_P, PT_U, PT_W};
use crate::cpu::CpuRole;
use crate::ops::{FLAG_AC, FLAG_USER};
use crate::types::{Access, AccessKind, ErrorCode};

/// Faults looked up: for each kind of access one bit for each set of rights (KVM's `mmu->permissions`).
pub(super) type FaultTable = [u8; ROWS];

/// What kind of access it is, as the tables of rights have it: the number of a row. Bit 0 stands for a store, bit 1 for a
/// fetch, bit 2 for CPL 3, and bit 4 says that EFLAGS.AC lifts SMAP. So they stand in the rows of a trace, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessRow(u8);

/// The number of rows; half of them are nobody's.
pub(super) const ROWS: usize = 32;

impl AccessRow {
    /// That of an access of which W, U and F are known.
    #[inline(always)]
    #[must_use]
    pub const fn new(access: ErrorCode, smap_holds: bool) -> Self {
        let (write, fetch) = (access.has(ErrorCode::W) as u8, access.has(ErrorCode::F) as u8);
        Self(write | fetch << 1 | access.0 as u8 & 4 | (!smap_holds as u8) << 4)
    }

    /// That of an instruction's access.
    #[inline]
    #[must_use]
    pub const fn of_kind(kind: AccessKind, user: bool, ac: bool) -> Self {
        Self(kind as u8 | (user as u8) << 2 | (ac as u8) << 4)
    }

    /// That of a row of a trace that is a load, store or fetch: op and flags are its bytes 0 and 2.
    #[inline(always)]
    #[must_use]
    pub const fn of_trace(head: u64) -> Self {
        const { assert!(FLAG_USER == 1 && FLAG_AC == 4, "they are bits 2 and 4 here") };
        Self((head & 3 | head >> 14 & 0b1_0100) as u8)
    }

    /// W, U and F of the error code.
    #[inline(always)]
    #[must_use]
    pub const fn code(self) -> ErrorCode {
        ErrorCode((self.0 as u64 & 1) << 1 | (self.0 as u64 & 2) << 3 | self.0 as u64 & 4)
    }

    /// Load, store or fetch.
    #[inline(always)]
    #[must_use]
    pub const fn kind(self) -> AccessKind {
        match self.0 & 3 {
            0 => AccessKind::Read,
            1 => AccessKind::Write,
            _ => AccessKind::Fetch,
        }
    }

    /// Whether EFLAGS.AC lifts SMAP.
    #[inline(always)]
    #[must_use]
    pub const fn ac(self) -> bool {
        self.0 & 16 != 0
    }

    /// Whether it stores.
    #[inline(always)]
    #[must_use]
    pub const fn is_store(self) -> bool {
        self.0 & 1 != 0
    }

    #[inline(always)]
    const fn fetch(self) -> bool {
        self.0 & 2 != 0
    }

    /// Whether it is made at CPL 3.
    #[inline(always)]
    #[must_use]
    pub const fn user(self) -> bool {
        self.0 & 4 != 0
    }

    /// What the CPU's own walk obeys for it, where there are no keys.
    #[inline(always)]
    #[must_use]
    pub const fn view(self) -> CpuView {
        CpuView { user: self.user(), smap_holds: !self.ac(), rsvd_sets_p: true, key0: 0 }
    }

    #[inline(always)]
    const fn index(self) -> usize {
        self.0 as usize % ROWS
    }
}

/// Whether an access of the kind in `access` (W, U, F, IMPLICIT) to a page with the rights `have` faults
/// (`permission_fault`, 6.1; APM vol. 2 section 5.6). `ac` is EFLAGS.AC.
#[inline]
#[must_use]
pub const fn permission_fault(role: &CpuRole, have: Access, access: ErrorCode, ac: bool) -> bool {
    let row = AccessRow::new(access, !ac || access.has(ErrorCode::IMPLICIT));
    role.faults[row.index()] >> have.0 & 1 != 0
}

/// What a row of a role's tables stands for: a store, CPL 3, a fetch, SMAP.
const fn parts(role: &CpuRole, row: usize) -> (bool, bool, bool, bool) {
    let row = AccessRow(row as u8);
    (row.is_store(), row.user(), row.fetch(), role.smap && !row.ac())
}

/// The table of a role (`update_permission_bitmask`, 6.1).
pub(super) const fn fault_table(role: &CpuRole) -> FaultTable {
    let mut table = [0; ROWS];
    let mut row = 0;
    while row < ROWS {
        let (write, user, fetch, smap) = parts(role, row);
        let mut rights = 0;
        while rights < 8 {
            let have = Access(rights);
            let user_page = have.has(Access::U);
            let by_write = write && !have.has(Access::W) && (user || role.wp);
            let by_fetch = fetch && !have.has(Access::X) && role.nx;
            let by_mode = if user { !user_page } else { user_page && if fetch { role.smep } else { smap } };
            table[row] |= ((by_write || by_fetch || by_mode) as u8) << rights;
            rights += 1;
        }
        row += 1;
    }
    table
}

/// The same for the CPU that walks the shadow: CR0.WP and EFER.NX are always on while a shadow guest runs.
pub(super) const fn hardware_table(role: &CpuRole) -> FaultTable {
    fault_table(&CpuRole { wp: true, nx: true, ..*role })
}

/// What bits of a shadow leaf let an access pass with nothing left to do: those in `mask` must be as in `value`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeafTest {
    mask: u64,
    value: u64,
}

/// An address bit that no host has: what an MMIO entry of the shadow is recognised by.
const RESERVED: u64 = 1 << 51;

impl LeafTest {
    pub(super) const NONE: Self = Self { mask: 0, value: 0 };

    /// Whether the leaf is present, allows the access, and has its A and D bits already.
    #[inline(always)]
    #[must_use]
    pub const fn passes(self, leaf: u64) -> bool {
        leaf & self.mask == self.value
    }
}

/// `hardware_table` as tests of whole entries; keys are left out.
pub(super) const fn leaf_tests(role: &CpuRole) -> [LeafTest; ROWS] {
    let mut tests = [LeafTest::NONE; ROWS];
    let mut row = 0;
    while row < ROWS {
        let (write, user, fetch, smap) = parts(role, row);
        let supervisors = !user && if fetch { role.smep } else { smap };
        let set = PT_P | PT_A | if write { PT_W | PT_D } else { 0 } | if user { PT_U } else { 0 };
        let clear = RESERVED | if fetch { PT_NX } else { 0 } | if supervisors { PT_U } else { 0 };
        tests[row] = LeafTest { mask: set | clear, value: set };
        row += 1;
    }
    tests
}

/// What bits of the guest's last-level entry, and what rights above it, let an access pass with nothing left to do. An
/// entry that does not pass may be in order all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestTest {
    leaf: LeafTest,
    need: Access,
}

impl GuestTest {
    pub(super) const NONE: Self = Self { leaf: LeafTest::NONE, need: Access::NONE };

    /// Whether the entry is present, without reserved bits, allows the access, and has its A and D bits already.
    #[inline(always)]
    #[must_use]
    pub const fn passes(self, gpte: u64, above: Access) -> bool {
        self.leaf.passes(gpte) && above.0 & self.need.0 == self.need.0
    }
}

/// `fault_table` as tests of whole last-level entries. A store always needs W here.
pub(super) const fn guest_tests(role: &CpuRole) -> [GuestTest; ROWS] {
    let mut tests = [GuestTest::NONE; ROWS];
    let reserved = role.reserved[1][0] | role.reserved[1][1];
    let mut row = 0;
    while row < ROWS {
        let (write, user, fetch, smap) = parts(role, row);
        let supervisors = !user && if fetch { role.smep } else { smap };
        let no_nx = fetch && role.nx;
        let set = PT_P | PT_A | if write { PT_W | PT_D } else { 0 } | if user { PT_U } else { 0 };
        let clear = reserved | if no_nx { PT_NX } else { 0 } | if supervisors { PT_U } else { 0 };
        let need = if write { Access::W.0 } else { 0 } | if user { Access::U.0 } else { 0 };
        let need = Access(need | if no_nx { Access::X.0 } else { 0 });
        tests[row] = GuestTest { leaf: LeafTest { mask: set | clear, value: set }, need };
        row += 1;
    }
    tests
}

impl CpuRole {
    /// Whether the CPU forbids an access to a shadow entry with the rights `have`.
    #[inline(always)]
    #[must_use]
    pub const fn cpu_forbids(&self, have: Access, row: AccessRow) -> bool {
        self.hardware_faults[row.index()] >> have.0 & 1 != 0
    }

    /// The test that a leaf of the shadow must pass for an access without anything left to do.
    #[inline(always)]
    #[must_use]
    pub const fn leaf_test(&self, row: AccessRow) -> LeafTest {
        self.leaf_tests[row.index()]
    }

    /// The guest's test for an access.
    #[inline(always)]
    #[must_use]
    pub const fn guest_test(&self, row: AccessRow) -> GuestTest {
        self.guest_tests[row.index()]
    }
}

/// The state of the CPU that its own walk of the shadow obeys, for one instruction.
#[derive(Clone, Copy, Debug)]
pub struct CpuView {
    /// CPL 3.
    pub user: bool,
    /// SMAP holds: EFLAGS.AC does not lift it.
    pub smap_holds: bool,
    /// A reserved-bit fault has P set.
    pub rsvd_sets_p: bool,
    /// PKRU's bits for key 0, which is the key of every shadow entry; 0 without CR4.PKE.
    pub key0: u32,
}

impl CpuView {
    /// The kind of an access that it makes.
    #[inline]
    #[must_use]
    pub const fn row(self, kind: AccessKind) -> AccessRow {
        AccessRow::of_kind(kind, self.user, !self.smap_holds)
    }

    /// Whether PKRU forbids an access to a shadow entry with the rights `have`.
    #[inline]
    #[must_use]
    pub const fn forbids_by_key(self, have: Access, row: AccessRow) -> bool {
        let bits = if row.is_store() { 3 } else { 1 };
        self.key0 & bits != 0 && have.has(Access::U) && !row.fetch()
    }
}

/// Whether PKRU forbids an access to a page with the rights `have` and the protection key `key` (`permission_fault`,
/// 6.1; SDM vol. 3 section 4.6.2). Fetches and supervisor pages have no keys.
#[must_use]
pub const fn key_fault(role: &CpuRole, pkru: u32, key: u32, have: Access, access: ErrorCode) -> bool {
    if !role.pke || access.has(ErrorCode::F) || !have.has(Access::U) {
        return false;
    }
    let bits = pkru >> (2 * key);
    bits & 1 != 0 || bits & 2 != 0 && access.has(ErrorCode::W) && (access.has(ErrorCode::U) || role.wp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ZEN;
    use crate::cpu::Registers;

    #[test]
    fn each_rule_has_its_own_case() {
        let base = CpuRole::of(&Registers::default(), &ZEN);
        let with = |role: CpuRole| CpuRole { faults: fault_table(&role), ..role };
        let no_wp = with(CpuRole { wp: false, ..base });
        let (w, u, f) = (ErrorCode::W, ErrorCode::U, ErrorCode::F);
        let ux = Access::U.with(Access::X);
        assert!(permission_fault(&base, ux, w, false));
        assert!(!permission_fault(&no_wp, ux, w, false));
        assert!(permission_fault(&no_wp, ux, w.with(u), false));
        assert!(permission_fault(&base, Access::W, u, false));
        assert!(permission_fault(&base, Access::W, f, false));
        assert!(!permission_fault(&with(CpuRole { nx: false, ..base }), Access::W, f, false));
        assert!(permission_fault(&with(CpuRole { smep: true, ..base }), ux, f, false));
        let smap = with(CpuRole { smap: true, ..base });
        assert!(permission_fault(&smap, ux, ErrorCode(0), false));
        assert!(!permission_fault(&smap, ux, ErrorCode(0), true));
        assert!(permission_fault(&smap, ux, ErrorCode::IMPLICIT, true));
        assert!(!permission_fault(&smap, ux, f, false));
    }

    #[test]
    fn the_cpu_obeys_wp_and_nx_whatever_the_guest_set() {
        let regs = Registers { cr0: 0x8000_0033, efer: 0x500, ..Registers::default() };
        let role = CpuRole::of(&regs, &ZEN);
        let row = |kind| AccessRow::of_kind(kind, false, false);
        assert!(!role.wp && role.cpu_forbids(Access::X, row(AccessKind::Write)));
        assert!(!role.nx && role.cpu_forbids(Access::W, row(AccessKind::Fetch)));
        assert!(!role.cpu_forbids(Access::NONE, row(AccessKind::Read)));
    }

    #[test]
    fn an_access_has_one_row_whoever_asks() {
        for (kind, op) in [(AccessKind::Read, 0), (AccessKind::Write, 1), (AccessKind::Fetch, 2)] {
            for (user, ac) in [(false, false), (false, true), (true, false), (true, true)] {
                let row = AccessRow::of_kind(kind, user, ac);
                let flags = if user { FLAG_USER } else { 0 } | if ac { FLAG_AC } else { 0 };
                assert_eq!(AccessRow::of_trace(op | 8 << 8 | u64::from(flags | 0x48) << 16), row);
                assert_eq!(AccessRow::new(row.code(), !ac), row);
                assert_eq!((row.kind(), row.ac(), row.view().user), (kind, ac, user));
            }
        }
    }

    #[test]
    fn leaf_tests_are_the_table() {
        for (cr4, cr0) in [(0x20, 0x8000_0033), (0x10_0020, 0x8001_0033), (0x30_0020, 0x8001_0033)] {
            let role = CpuRole::of(&Registers { cr0, cr4, ..Registers::default() }, &ZEN);
            for (row, rights) in (0..ROWS).flat_map(|row| (0..8).map(move |rights| (row, Access(rights)))) {
                let [x, w, u] = [Access::X, Access::W, Access::U].map(|right| rights.has(right));
                let bits = if x { 0 } else { PT_NX } | if w { PT_W } else { 0 } | if u { PT_U } else { 0 };
                let leaf = bits | PT_P | PT_A | PT_D;
                let allowed = role.hardware_faults[row] >> rights.0 & 1 == 0;
                let passes = |leaf| role.leaf_tests[row].passes(leaf);
                assert_eq!(passes(leaf), allowed, "row {row}, {rights:?}");
                assert!(!passes(leaf & !PT_A) && !passes(leaf & !PT_P) && !passes(leaf | RESERVED));
                assert!(row & 1 == 0 || !passes(leaf & !PT_D));
            }
        }
    }

    #[test]
    fn what_passes_the_guest_test_is_in_order() {
        let mut passed = 0;
        for (cr4, cr0, efer) in
            [(0x20, 0x8001_0033, 0xd01), (0x30_0020, 0x8001_0033, 0xd01), (0x20, 0x8000_0033, 0x500)]
        {
            let role = CpuRole::of(&Registers { cr0, cr4, efer, ..Registers::default() }, &ZEN);
            for (row, bits) in (0..ROWS).flat_map(|row| (0..256_u64).map(move |bits| (row, bits))) {
                let above = Access(bits as u8 >> 5);
                // P, W, U, A, D of the entry, and NX where U is.
                let gpte = bits & 7 | (bits >> 3 & 3) << 5 | if bits & 4 != 0 { PT_NX } else { 0 };
                if role.guest_tests[row].passes(gpte, above) {
                    let [x, w, u] = [gpte & PT_NX == 0, gpte & PT_W != 0, gpte & PT_U != 0].map(u8::from);
                    let own = Access((x * Access::X.0) | (w * Access::W.0) | (u * Access::U.0));
                    assert!(gpte & (PT_P | PT_A) == PT_P | PT_A && gpte & role.reserved[1][0] == 0);
                    assert!(role.faults[row] >> above.and(own).0 & 1 == 0);
                    assert!(row & 1 == 0 || gpte & PT_D != 0 && above.and(own).has(Access::W));
                    passed += 1;
                }
            }
        }
        assert!(passed > 100);
    }

    #[test]
    fn keys_forbid_data_of_user_pages() {
        let role = CpuRole { pke: true, ..CpuRole::of(&Registers::default(), &ZEN) };
        let (none, write) = (ErrorCode(0), ErrorCode::W);
        let fault = |role: &CpuRole, pkru, have, access| key_fault(role, pkru, 3, have, access);
        assert!(fault(&role, 1 << 6, Access::ALL, none), "AD of key 3");
        assert!(!fault(&role, 1 << 4, Access::ALL, none), "another key");
        assert!(!fault(&role, 1 << 7, Access::ALL, none) && fault(&role, 1 << 7, Access::ALL, write), "WD");
        assert!(!fault(&CpuRole { wp: false, ..role }, 1 << 7, Access::ALL, write));
        assert!(!fault(&role, 1 << 6, Access::W, none), "a supervisor page");
        assert!(!fault(&role, 1 << 6, Access::ALL, ErrorCode::F));
        assert!(!fault(&CpuRole { pke: false, ..role }, 1 << 6, Access::ALL, none));
    }
}
