//! Whether the guest's rights allow an access.

use crate::cpu::CpuRole;
use crate::types::{Access, ErrorCode};

/// Whether an access of the kind in `access` (W, U, F, IMPLICIT) to a page with the rights `have` faults
/// (`permission_fault`, 6.1; APM vol. 2 section 5.6). `ac` is EFLAGS.AC.
#[must_use]
pub const fn permission_fault(role: &CpuRole, have: Access, access: ErrorCode, ac: bool) -> bool {
    let (write, user, fetch) = (access.has(ErrorCode::W), access.has(ErrorCode::U), access.has(ErrorCode::F));
    let user_page = have.has(Access::U);
    if write && !have.has(Access::W) && (user || role.wp) {
        return true;
    }
    if user && !user_page {
        return true;
    }
    if fetch && !have.has(Access::X) && role.nx {
        return true;
    }
    if !user && user_page {
        if fetch && role.smep {
            return true;
        }
        if !fetch && role.smap && (!ac || access.has(ErrorCode::IMPLICIT)) {
            return true;
        }
    }
    false
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
        let (w, u, f) = (ErrorCode::W, ErrorCode::U, ErrorCode::F);
        let ux = Access::U.with(Access::X);
        assert!(permission_fault(&base, ux, w, false));
        assert!(!permission_fault(&CpuRole { wp: false, ..base }, ux, w, false));
        assert!(permission_fault(&CpuRole { wp: false, ..base }, ux, w.with(u), false));
        assert!(permission_fault(&base, Access::W, u, false));
        assert!(permission_fault(&base, Access::W, f, false));
        assert!(!permission_fault(&CpuRole { nx: false, ..base }, Access::W, f, false));
        let smep = CpuRole { smep: true, ..base };
        assert!(permission_fault(&smep, ux, f, false));
        let smap = CpuRole { smap: true, ..base };
        assert!(permission_fault(&smap, ux, ErrorCode(0), false));
        assert!(!permission_fault(&smap, ux, ErrorCode(0), true));
        assert!(permission_fault(&smap, ux, ErrorCode::IMPLICIT, true));
        assert!(!permission_fault(&smap, ux, f, false));
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
