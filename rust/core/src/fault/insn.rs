//! An instruction as the shadow MMU sees it: one memory operand and what is done with it.

use crate::types::{AccessKind, Gva};

/// What a read-modify-write computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RmwKind {
    /// old | operand.
    Or,
    /// old & operand.
    And,
    /// old ^ operand.
    Xor,
    /// old + operand.
    Add,
    /// operand.
    Xchg,
    /// operand if old equals the expected value, else old.
    Cmpxchg,
}

/// What the instruction does with its operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Loads it.
    Load,
    /// Stores it.
    Store,
    /// Loads, computes, stores.
    Rmw(RmwKind),
    /// Loads it from another place and stores it (MOVS).
    Copy,
    /// Is fetched from there: the address is the instruction's own.
    Fetch,
}

/// One instruction, or one access of event delivery.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Insn {
    /// What it does.
    pub action: Action,
    /// Where.
    pub gva: Gva,
    /// Operand bytes: 1 to 8, or 16.
    pub size: u8,
    /// The value stored, or the operand of a read-modify-write.
    pub value: u64,
    /// The upper half of a value of 16 bytes.
    pub high: u64,
    /// Where a copy comes from.
    pub source: Gva,
    /// What CMPXCHG compares with; `None` compares equal.
    pub expected: Option<u64>,
    /// LOCK prefix (XCHG always has it).
    pub locked: bool,
    /// KVM counts it as an instruction that writes page tables (`page_table_writing_insn`, 6.1).
    pub writes_tables: bool,
    /// CPL 3; for event delivery the CPL before it.
    pub user: bool,
    /// EFLAGS.AC.
    pub ac: bool,
    /// A supervisor access that the CPU makes by itself (descriptor tables).
    pub system: bool,
    /// An access of event delivery.
    pub delivery: bool,
    /// The event that is delivered is INT3 or INT n; `rip` is that instruction's.
    pub soft: bool,
    /// The store leaves memory as it is.
    pub keep: bool,
    /// REP prefix.
    pub rep: bool,
    /// Elements that are stored one after the other (REP STOS, REP MOVS); 1 for everything else.
    pub repeat: u32,
    /// Its address; with one, it is fetched through the shadow first. For a fetch: the jump that leads there.
    pub rip: Option<u64>,
    /// Its bytes, 1 to 15; they matter when they cross a page end.
    pub length: u8,
}

impl Insn {
    /// An instruction with the defaults of a plain supervisor MOV.
    #[must_use]
    pub const fn new(action: Action, gva: u64, size: u8) -> Self {
        Self {
            action,
            gva: Gva(gva),
            size,
            value: 0,
            high: 0,
            source: Gva(0),
            expected: None,
            locked: true,
            writes_tables: true,
            user: false,
            ac: false,
            system: false,
            delivery: false,
            soft: false,
            keep: false,
            rep: false,
            repeat: 1,
            rip: None,
            length: 1,
        }
    }

    /// The instruction with its first `done` elements carried out.
    #[inline]
    #[must_use]
    pub const fn element(&self, done: u32) -> Self {
        let mut rest = *self;
        rest.gva = Gva(self.gva.0.wrapping_add(done as u64 * self.size as u64));
        rest.source = Gva(self.source.0.wrapping_add(done as u64 * self.size as u64));
        rest.repeat = self.repeat - done;
        rest
    }

    /// Whether the access is made by the system, with supervisor rights.
    #[must_use]
    pub const fn implicit(&self) -> bool {
        self.system || self.delivery
    }

    /// The page where the instruction's bytes go on, if they do not all lie on the page where they begin.
    #[must_use]
    pub const fn second_page(&self, rip: Gva) -> Option<Gva> {
        let length = if matches!(self.action, Action::Fetch) { self.size } else { self.length };
        if rip.offset() + length as u64 > 4096 { Some(Gva(rip.page().0.wrapping_add(4096))) } else { None }
    }

    /// The address of the instruction, 0 if it is not known.
    #[must_use]
    pub const fn rip_or_zero(&self) -> u64 {
        match (self.action, self.rip) {
            (Action::Fetch, _) => self.gva.0,
            (_, Some(rip)) => rip,
            (_, None) => 0,
        }
    }

    /// The pieces of the operand, one a page: address and bytes.
    #[must_use]
    pub const fn pieces(&self) -> [(Gva, u8); 2] {
        let room = 4096 - self.gva.offset();
        if self.size as u64 <= room {
            [(self.gva, self.size), (Gva(0), 0)]
        } else {
            let first = room as u8;
            [(self.gva, first), (Gva(self.gva.0.wrapping_add(room)), self.size - first)]
        }
    }

    /// The half of a copy that loads.
    #[must_use]
    pub const fn loading(&self) -> Self {
        let mut load = *self;
        load.action = Action::Load;
        load.gva = self.source;
        load
    }

    /// The value to store, with `low` for its lower half.
    #[must_use]
    pub const fn wide(&self, low: u64) -> u128 {
        (self.high as u128) << 64 | low as u128
    }

    /// The accesses to its destination that the CPU makes in order; QEMU's TCG makes a read-modify-write read first.
    #[must_use]
    pub const fn kinds(&self, rmw_reads_first: bool) -> &'static [AccessKind] {
        match self.action {
            Action::Load => &[AccessKind::Read],
            Action::Store | Action::Copy => &[AccessKind::Write],
            Action::Fetch => &[AccessKind::Fetch],
            Action::Rmw(_) if rmw_reads_first => &[AccessKind::Read, AccessKind::Write],
            Action::Rmw(_) => &[AccessKind::Write],
        }
    }

    /// What a read-modify-write stores for the old value, and whether CMPXCHG compared equal (always for others).
    #[must_use]
    pub const fn compute(&self, old: u64) -> (u64, bool) {
        match self.action {
            Action::Rmw(RmwKind::Or) => (old | self.value, true),
            Action::Rmw(RmwKind::And) => (old & self.value, true),
            Action::Rmw(RmwKind::Xor) => (old ^ self.value, true),
            Action::Rmw(RmwKind::Add) => (old.wrapping_add(self.value), true),
            Action::Rmw(RmwKind::Cmpxchg) => match self.expected {
                Some(expected) if expected & mask(self.size) != old & mask(self.size) => (old, false),
                _ => (self.value, true),
            },
            Action::Rmw(RmwKind::Xchg) | Action::Load | Action::Store | Action::Copy | Action::Fetch => {
                (self.value, true)
            }
        }
    }
}

/// The bits of an operand of that size.
#[must_use]
pub const fn mask(size: u8) -> u64 {
    if size >= 8 { !0 } else { (1 << (size * 8)) - 1 }
}

/// `size` bytes of a value from byte `from` on.
#[must_use]
pub const fn slice(value: u128, from: u8, size: u8) -> u128 {
    let rest = value >> (from * 8);
    if size >= 16 { rest } else { rest & ((1 << (size * 8)) - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operand_over_a_page_end_is_two_pieces() {
        let insn = Insn::new(Action::Store, 0x1ffd, 8);
        assert_eq!(insn.pieces(), [(Gva(0x1ffd), 3), (Gva(0x2000), 5)]);
        assert_eq!(Insn::new(Action::Load, 0x1ff8, 8).pieces()[1].1, 0);
        assert_eq!(slice(0x8877_6655_4433_2211, 3, 5), 0x88_7766_5544);
        assert_eq!(slice(1, 8, 8), 0);
        assert_eq!(slice(7 << 64 | 1, 8, 8), 7);
    }

    #[test]
    fn each_kind_computes_its_own() {
        let with = |kind, value| Insn { value, ..Insn::new(Action::Rmw(kind), 0, 8) }.compute(0b1100).0;
        assert_eq!(with(RmwKind::Or, 0b1010), 0b1110);
        assert_eq!(with(RmwKind::And, 0b1010), 0b1000);
        assert_eq!(with(RmwKind::Xor, 0b1010), 0b0110);
        assert_eq!(with(RmwKind::Add, 1), 0b1101);
        assert_eq!(with(RmwKind::Xchg, 7), 7);
        let cmpxchg = Insn { value: 9, expected: Some(5), ..Insn::new(Action::Rmw(RmwKind::Cmpxchg), 0, 8) };
        assert_eq!(cmpxchg.compute(5), (9, true));
        assert_eq!(cmpxchg.compute(6), (6, false));
    }
}
