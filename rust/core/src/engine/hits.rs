//! Rows that need no exit, many at a time: accesses that the shadow allows and that leave nothing to be done but the load
//! or store itself. Nothing that decides about them changes meanwhile, so it is looked up once for all.

use crate::cpu::{CpuView, Requests};
use crate::engine::Vm;
use crate::fault::Ctx;
use crate::memory::Host;
use crate::ops::{FLAG_AC, FLAG_KEEP, FLAG_MMIO, FLAG_USER, OpCode, ROW_BYTES};
use crate::outcome::Outcome;
use crate::shadow::spte::Spte;
use crate::types::{AccessKind, Gpa, Gva};

/// What the first 8 bytes of a row say (op, size, flags, vcpu, site): which bits must be clear for a plain access, but
/// for its vCPU.
const NOT_PLAIN: u64 = !0xffff | !((FLAG_USER | FLAG_AC | FLAG_KEEP | FLAG_MMIO) as u64) << 16 & 0xff_0000;
const VCPU: u64 = 0xff00_0000;

/// The rest of an access that the shadow allows.
struct Hit {
    gpa: Gpa,
    size: u8,
    kind: AccessKind,
    keep: bool,
    value: u64,
}

impl Vm {
    /// Runs rows from the front as long as each is an access of one vCPU that takes nothing but its own load or store,
    /// and returns how many. `each` sees their outcomes.
    #[inline]
    pub(super) fn run_hits(
        &mut self,
        rows: &[[u8; ROW_BYTES]],
        no_values: bool,
        each: &mut impl FnMut(&Outcome),
    ) -> usize {
        let Some(vcpu) = rows.first().map(|row| usize::from(row[3])).filter(|vcpu| *vcpu < self.vcpus.len()) else {
            return 0;
        };
        self.with(vcpu, |ctx| ctx.run_hits(rows, no_values, each))
    }
}

impl Ctx<'_> {
    fn run_hits(&mut self, rows: &[[u8; ROW_BYTES]], no_values: bool, each: &mut impl FnMut(&Outcome)) -> usize {
        if self.vcpu.requests != Requests::default() || self.vcpu.role.pke {
            return 0;
        }
        let mut count = 0;
        for row in rows {
            let Some(hit) = self.hit(row) else { break };
            let host = &mut self.shadow.memory.host;
            let value = match hit.kind {
                AccessKind::Read if !no_values => host.read(hit.gpa, hit.size),
                AccessKind::Write if !hit.keep => {
                    host.write(hit.gpa, hit.size, hit.value);
                    0
                }
                _ => 0,
            };
            each(&Outcome::done(value));
            count += 1;
        }
        if count > 0 {
            self.vcpu.counters.x_ops += count as u64;
            self.vcpu.injected = None;
            self.shadow.events.op += count as u64;
        }
        count
    }

    #[inline(always)]
    fn hit(&mut self, row: &[u8; ROW_BYTES]) -> Option<Hit> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| row[at + i]));
        let (head, gva) = (word(0), Gva(word(8)));
        let (op, size, flags) = (head as u8, (head >> 8) as u8, (head >> 16) as u8);
        if head & NOT_PLAIN != u64::from(self.vcpu.id) << 24 & VCPU {
            return None;
        }
        let kind = match OpCode::from_code(op)? {
            OpCode::Read => AccessKind::Read,
            OpCode::Write => AccessKind::Write,
            OpCode::Fetch => AccessKind::Fetch,
            _ => return None,
        };
        let role = &self.vcpu.role;
        let on_one_page = size.wrapping_sub(1) < 8 && gva.offset() + u64::from(size) <= 4096;
        if !on_one_page || !role.mode.takes(gva) {
            return None;
        }
        let (user, smap_holds) = (flags & FLAG_USER != 0, flags & FLAG_AC == 0);
        let test = CpuView { user, smap_holds, rsvd_sets_p: true, key0: 0 }.leaf_test(role, kind);
        let (pos, level) = self.walk_near(self.vcpu.root.table(gva)?, gva);
        let leaf = self.shadow.spte(pos);
        if !test.passes(leaf.0) || leaf.is_table(level.0) {
            return None;
        }
        let gpa = Self::gpa_behind(leaf, level.pages(), gva)?;
        Some(Hit { gpa, size, kind, keep: flags & FLAG_KEEP != 0, value: word(16) })
    }

    /// `None` for the zero page.
    #[inline(always)]
    fn gpa_behind(leaf: Spte, pages: u64, gva: Gva) -> Option<Gpa> {
        Some(Gpa(Host::gfn(leaf.pfn())?.gpa().0 | gva.0 & ((pages << 12) - 1)))
    }
}
