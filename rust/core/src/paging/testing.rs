//! What the tests of this module share.

use crate::config::Config;
use crate::cpu::Registers;
use crate::engine::Vm;
use crate::ops::{OpCode, Row};
use crate::policy::Kvm;
use crate::types::Gpa;

/// A guest whose pages 0 to 7 at gva 0 are frames 16 to 23.
pub(super) fn guest() -> Vm {
    let mut vm = Vm::new(16 << 20, 1, Config::default(), Box::new(Kvm), 0).unwrap();
    for (gpa, entry) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
        vm.write_memory(Gpa(gpa), &u64::to_le_bytes(entry)).unwrap();
    }
    for page in 0..8 {
        vm.write_memory(Gpa(0x4000 + 8 * page), &(0x10007 + (page << 12)).to_le_bytes()).unwrap();
    }
    vm.set_sregs(0, Registers { cr3: 0x1000, ..Registers::default() }).unwrap();
    vm
}

/// A row of vCPU 0, 8 bytes at CPL 0.
pub(super) fn row(op: OpCode, addr: u64, value: u64) -> Row {
    Row { op, size: 8, flags: 0, vcpu: 0, site: 0, addr, value }
}
