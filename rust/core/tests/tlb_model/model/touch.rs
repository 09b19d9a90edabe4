//! What an operation touches: pages, kinds, bytes; and what of it the model leaves out.

use super::memory::{A, D, Memory};
use super::rules::{Access, Kind};
use crate::decode::Act;
use crate::world::SITES;
use shadowkvm_core::engine::Vm;
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::ops::{FLAG_AC, FLAG_DELIVERY, FLAG_IMPLICIT, FLAG_KEEP, FLAG_USER, OpCode, Row};
use shadowkvm_core::types::Gfn;

/// The part of an operation that lies in one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub(crate) access: Access,
    /// Bytes in this page.
    pub(crate) bytes: u64,
    /// Where in the operand they begin.
    pub(crate) from: u64,
    /// What a store stores; `None` if it is not a plain store.
    value: Option<u64>,
    pub(crate) rmw: bool,
    pub(crate) keep: bool,
}

impl Touch {
    pub(crate) fn covers_word(&self, index: usize) -> bool {
        let first = self.access.gva & 0xfff;
        let (first, last) = (first / 8, (first + self.bytes - 1) / 8);
        (first..=last).contains(&(index as u64)) && !self.keep
    }

    /// Whether the frame's contents fit: what was loaded stood there, what was stored stands there.
    pub(crate) fn matches(&self, memory: &Memory, changed: &[(u64, usize, u64)], gfn: u64, loaded: u64) -> bool {
        let Some(words) = memory.frame(gfn) else { return false };
        if self.keep || self.access.kind == Kind::Fetch || self.bytes > 8 {
            return true;
        }
        let at = self.access.gva & 0xfff;
        let gather = |word: &dyn Fn(usize) -> u64| {
            (at..at + self.bytes).rev().fold(0, |sum, byte| sum << 8 | word(byte as usize / 8) >> (byte % 8 * 8) & 0xff)
        };
        let now = gather(&|index| words[index]);
        let before = gather(&|index| {
            let old = changed.iter().find(|c| c.0 == gfn && c.1 == index).map(|c| c.2);
            old.unwrap_or(words[index])
        });
        // The operation's own walks may have set A and D there, after a store or before a load.
        let care = !gather(&|_| (A | D) << 32 | A | D);
        let mask = if self.bytes >= 8 { !0 } else { (1 << (8 * self.bytes)) - 1 };
        let part = |value: u64| if self.from >= 8 { 0 } else { value >> (8 * self.from) & mask };
        match self.value {
            Some(value) => (now ^ part(value)) & care & mask == 0,
            None if self.access.kind == Kind::Write && !self.rmw => true,
            None => [before, now].iter().any(|found| (found ^ part(loaded)) & care & mask == 0),
        }
    }
}

/// What an instruction does that is no memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    Cr0(u64),
    Cr3(u64),
    Cr4(u64),
    Efer(u64),
    Invlpg(u64),
    Invpcid(u64),
    /// An exit.
    Plain,
}

/// All that an operation touches.
pub(crate) struct Plan {
    pub(crate) vcpu: usize,
    pub(crate) touches: Vec<Touch>,
    pub(crate) control: Option<Control>,
    /// An access that the CPU makes by itself, with EFLAGS.AC set.
    pub(crate) implicit_with_ac: bool,
    /// An access of event delivery.
    pub(crate) delivery: bool,
    /// Guest memory that the host writes or drops.
    pub(crate) host_range: Option<(u64, u64)>,
}

impl Plan {
    pub(crate) fn of(vm: &Vm, act: &Act) -> Self {
        let mut plan = Self {
            vcpu: 0,
            touches: Vec::new(),
            control: None,
            delivery: false,
            implicit_with_ac: false,
            host_range: None,
        };
        match act {
            Act::Row(row) => {
                plan.vcpu = usize::from(row.vcpu) % vm.vcpus().len();
                plan.add_row(row);
            }
            Act::Insn(vcpu, insn) => {
                plan.vcpu = *vcpu;
                plan.add_insn(insn);
            }
            Act::HostPages(gpa, bytes, _) => plan.host_range = Some((*gpa, *bytes)),
            Act::Sregs(vcpu, _) | Act::Pkru(vcpu, _) => plan.vcpu = *vcpu,
            Act::Invpcid(vcpu, kind, gva) => {
                plan.vcpu = *vcpu;
                plan.control = Some(Control::Invpcid(*kind));
                plan.add(Access { gva: *gva, kind: Kind::Read, user: false, ac: false }, 16, |touch| touch);
            }
            Act::Table(frame, _) => plan.host_range = Some((frame << 12, 4096)),
            Act::Sweep(..) | Act::Switch(..) | Act::Toggle(..) | Act::Aim(_) => unreachable!("several operations"),
        }
        plan
    }

    fn add(&mut self, access: Access, size: u64, with: impl Fn(Touch) -> Touch) {
        let room = 4096 - (access.gva & 0xfff);
        let touch = Touch { access, bytes: size.min(room), from: 0, value: None, rmw: false, keep: false };
        self.touches.push(with(touch));
        if size > room {
            let access = Access { gva: access.gva.wrapping_add(room), ..access };
            self.touches.push(with(Touch { access, bytes: size - room, from: room, ..touch }));
        }
    }

    fn add_fetch(&mut self, rip: u64, user: bool, length: u8) {
        let access = Access { gva: rip, kind: Kind::Fetch, user, ac: false };
        self.add(access, u64::from(length.max(1)), |touch| touch);
    }

    fn add_insn(&mut self, insn: &Insn) {
        self.delivery = insn.delivery;
        if let Some(rip) = insn.rip
            && !insn.delivery
        {
            self.add_fetch(rip, insn.user, insn.length);
        }
        let implicit = insn.system || insn.delivery;
        if insn.action == Action::Copy {
            self.add_insn(&Insn { rip: None, ..insn.loading() });
        }
        self.implicit_with_ac = implicit && insn.ac;
        let kind = match insn.action {
            Action::Load => Kind::Read,
            Action::Store | Action::Copy | Action::Rmw(_) => Kind::Write,
            Action::Fetch => Kind::Fetch,
        };
        let access = Access { gva: insn.gva.0, kind, user: insn.user && !implicit, ac: insn.ac && !implicit };
        let rmw = matches!(insn.action, Action::Rmw(_));
        let plain = kind == Kind::Write && !rmw && insn.repeat == 1;
        self.add(access, u64::from(insn.size) * u64::from(insn.repeat), |touch| Touch {
            value: (plain && insn.action == Action::Store).then_some(insn.value),
            rmw,
            keep: insn.keep && !rmw,
            ..touch
        });
    }

    fn add_row(&mut self, row: &Row) {
        let rip = (row.site != 0).then(|| SITES[row.site as usize]);
        let action = match row.op {
            OpCode::Read => Action::Load,
            OpCode::Write | OpCode::Store => Action::Store,
            OpCode::Fetch => Action::Fetch,
            op if (op as u8) < OpCode::Store as u8 => Action::Rmw(shadowkvm_core::fault::insn::RmwKind::Or),
            op if op as u8 <= OpCode::Io as u8 => {
                self.control = Some(match op {
                    OpCode::Cr0 => Control::Cr0(row.value),
                    OpCode::Cr3 => Control::Cr3(row.value),
                    OpCode::Cr4 => Control::Cr4(row.value),
                    OpCode::Efer => Control::Efer(row.value),
                    OpCode::Invlpg => Control::Invlpg(row.addr),
                    _ => Control::Plain,
                });
                if let Some(rip) = rip {
                    self.add_fetch(rip, false, 1);
                }
                return;
            }
            OpCode::HostWrite | OpCode::Unmap => {
                self.host_range = Some((row.addr, if row.op == OpCode::Unmap { row.value } else { 8 }));
                return;
            }
            _ => return,
        };
        let flag = |flag: u8| row.flags & flag != 0;
        self.add_insn(&Insn {
            value: row.value,
            user: flag(FLAG_USER),
            ac: flag(FLAG_AC),
            system: flag(FLAG_IMPLICIT),
            delivery: flag(FLAG_DELIVERY),
            keep: flag(FLAG_KEEP),
            rip,
            ..Insn::new(action, row.addr, row.size)
        });
    }
}

/// Whether an act would leave the shadow behind the guest's tables in a way that KVM has, and x86 has not.
pub(crate) fn outside(vm: &Vm, act: &Act) -> bool {
    let arena = vm.shadow().arena();
    let shadowed = |gfn: u64| arena.chain(Gfn(gfn)).any(|id| arena[id].gfn == Gfn(gfn) && arena[id].has_gptes());
    let any_shadowed = |gpa: u64, bytes: u64| (gpa >> 12..(gpa + bytes).div_ceil(4096)).any(shadowed);
    match act {
        // The host's own stores are not seen, and a dropped table reads as zeros while its shadow stays.
        Act::Row(Row { op: OpCode::HostWrite, addr, .. }) => any_shadowed(*addr, 16),
        Act::Row(Row { op: OpCode::Unmap, addr, value, .. }) => any_shadowed(*addr, *value),
        Act::HostPages(gpa, bytes, _) => any_shadowed(*gpa, *bytes),
        Act::Table(..) => true,
        // Without memory nothing runs.
        Act::Row(Row { op: OpCode::SlotDel, size: 0, .. }) => true,
        // Of a store of 4 bytes KVM sees only the entry in which it begins.
        Act::Row(row) => row.op as u8 <= 9 && row.size == 4 && row.addr % 8 > 4,
        Act::Insn(_, insn) => insn.size == 4 && insn.gva.0 % 8 > 4,
        _ => false,
    }
}
