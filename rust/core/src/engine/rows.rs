//! Rows that are plain accesses of one vCPU, many at a time, with the CR3 loads and INVLPGs between them: what decides
//! about an access that the shadow allows is looked up once for all, and exits are handled without leaving the loop.

use crate::cpu::{AccessRow, Requests};
use crate::engine::plain::{End, Rest};
use crate::engine::trace::{RunOptions, RunTotals};
use crate::engine::{Control, Vm};
use crate::fault::Ctx;
use crate::fault::quick::Plain;
use crate::memory::Host;
use crate::ops::{FLAG_AC, FLAG_KEEP, FLAG_MMIO, FLAG_USER, OpCode, ROW_BYTES};
use crate::outcome::{Outcome, Status};
use crate::shadow::spte::Spte;
use crate::types::{Gpa, Gva, Level, SptePos};

/// Rows under way.
pub(super) struct Rows<'a, F> {
    pub all: &'a [[u8; ROW_BYTES]],
    /// How many of them were run.
    pub done: usize,
    /// How many of those have been counted.
    pub counted: usize,
    pub options: RunOptions<'a>,
    pub totals: RunTotals,
    /// Sees every outcome.
    pub each: F,
}

impl<F: FnMut(&Outcome)> Rows<'_, F> {
    /// The number of the next row, for errors.
    pub(super) const fn index(&self) -> u64 {
        self.options.first_row + self.done as u64
    }

    /// The next row is over, and counted.
    #[inline]
    pub(super) fn end(&mut self, outcome: &Outcome) {
        (self.each)(outcome);
        self.done += 1;
        self.counted = self.done;
    }
}

impl Vm {
    /// Runs rows as long as each is a plain access, CR3 load or INVLPG of the vCPU of the first. Returns how far the next
    /// one came.
    #[inline]
    pub(super) fn run_plain_rows<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Rest {
        match rows.all.get(rows.done) {
            Some(row)
                if (row[0] <= OpCode::Fetch as u8 || matches!(row[0], CR3 | INVLPG))
                    && usize::from(row[3]) < self.vcpus.len() =>
            {
                self.with(usize::from(row[3]), |ctx| ctx.run_plain_rows(rows))
            }
            _ => Rest::All,
        }
    }
}

/// Flags that a row of the loop may have. One with a recorded fault is left to its own step, which compares them.
const USUAL_FLAGS: u8 = FLAG_USER | FLAG_AC | FLAG_KEEP | FLAG_MMIO;
/// What the first 8 bytes of a row say (op, size, flags, vcpu, site): the bits that are clear in a plain access, but for
/// those of its vCPU.
const NOT_PLAIN: u64 = SITE | (!USUAL_FLAGS as u64) << 16;
const VCPU: u64 = 0xff << 24;
const SITE: u64 = 0xffff_ffff_0000_0000;

const CR3: u8 = OpCode::Cr3 as u8;
const INVLPG: u8 = OpCode::Invlpg as u8;

/// The words of a row; every row of the loop is looked at so, whole only if more is to be done.
#[derive(Clone, Copy)]
struct Words {
    head: u64,
    gva: Gva,
    value: u64,
}

impl Words {
    #[inline(always)]
    fn of(row: &[u8; ROW_BYTES]) -> Self {
        let [head, gva, value] = *row.as_chunks::<8>().0 else { unreachable!("24 bytes are three words") };
        let [head, gva, value] = [head, gva, value].map(u64::from_le_bytes);
        Self { head, gva: Gva(gva), value }
    }

    /// Whether it is a plain access of a vCPU, on one page.
    #[inline(always)]
    const fn is_plain(self, vcpu: u64) -> bool {
        let (op, size) = (self.head & 0xff, self.head >> 8 & 0xff);
        let plain = self.head & (NOT_PLAIN | VCPU) == vcpu << 24 && op <= OpCode::Fetch as u64;
        plain && size.wrapping_sub(1) < 8 && self.gva.offset() + size <= 4096
    }

    #[inline(always)]
    const fn flag(self, flag: u8) -> bool {
        self.head & (flag as u64) << 16 != 0
    }

    #[inline(always)]
    const fn row(self) -> AccessRow {
        AccessRow::of_trace(self.head)
    }

    #[inline(always)]
    fn plain(self, no_values: bool) -> Plain {
        let op = self.head as u8;
        let wanted = if op == OpCode::Read as u8 { !no_values } else { !self.flag(FLAG_KEEP) };
        Plain {
            gva: self.gva,
            size: (self.head >> 8) as u8,
            row: self.row(),
            writes_tables: op == OpCode::Write as u8,
            value: wanted.then_some(self.value),
        }
    }
}

impl Ctx<'_> {
    /// Returns how far the first row came that is none of these.
    fn run_plain_rows<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Rest {
        if self.vcpu.role.pke || self.has_to_stop() {
            return Rest::All;
        }
        self.shadow.events.vcpu = self.vcpu.id;
        let rest = self.run_until_left(rows);
        self.count_hits(rows);
        rest
    }

    /// Whether something must be done before the next row can be plain.
    #[inline(always)]
    fn has_to_stop(&self) -> bool {
        self.vcpu.requests != Requests::default() || self.shadow.policy.failed()
    }

    /// Counts the rows since it was last done, which all ended with their load or store.
    #[inline(always)]
    fn count_hits<F>(&mut self, rows: &mut Rows<'_, F>) {
        let hits = (rows.done - rows.counted) as u64;
        if hits > 0 {
            self.vcpu.counters.x_ops += hits;
            self.vcpu.injected = None;
            self.shadow.events.op += hits;
            rows.totals.by_status[Status::Done as usize] += hits;
            rows.counted = rows.done;
        }
    }

    /// Runs rows as long as the shadow allows them, and nothing is left to be done but the load or store itself; others
    /// are run by the way.
    #[inline(always)]
    fn run_until_left<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Rest {
        let (id, mode) = (u64::from(self.vcpu.id), self.vcpu.role.mode);
        let mut root = self.vcpu.root.page();
        loop {
            let Some(row) = rows.all.get(rows.done) else { return Rest::All };
            let words = Words::of(row);
            let gva = words.gva;
            if !words.is_plain(id) || !mode.takes(gva) {
                if let Some(rest) = self.run_control_row(rows) {
                    return rest;
                }
                root = self.vcpu.root.page();
                continue;
            }
            let Some(table) = root.or_else(|| self.vcpu.root.table(gva)) else { return Rest::All };
            let end = self.walk_near(table, gva);
            let leaf = self.shadow.spte(end.0);
            debug_assert!(!leaf.is_table(end.1.0), "a walk does not end at a table");
            if self.vcpu.role.leaf_test(words.row()).passes(leaf.0) {
                let inside = || gva.0 & ((end.1.pages() << 12) - 1);
                let plain = words.plain(rows.options.no_values);
                let outcome = self.touch_plain(plain, || Some(Gpa(Host::gfn(leaf.pfn())?.gpa().0 | inside())));
                (rows.each)(&outcome);
                rows.done += 1;
                continue;
            }
            let rest = if words.row().is_store() && leaf.lacks_w() {
                self.run_write(rows, end, leaf)
            } else {
                self.run_other(rows, end, leaf)
            };
            if let Some(rest) = rest {
                return rest;
            }
            root = self.vcpu.root.page();
        }
    }

    /// Runs the next row if it is a load of CR3 or an INVLPG of the same vCPU, without a fetch.
    #[inline(never)]
    fn run_control_row<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Option<Rest> {
        let Words { head, gva, value } = Words::of(&rows.all[rows.done]);
        if head & (SITE | VCPU) != u64::from(self.vcpu.id) << 24 {
            return Some(Rest::All);
        }
        self.count_hits(rows);
        let outcome = match head as u8 {
            CR3 => self.run_control(Control::Cr3(value), None),
            INVLPG => self.run_control(Control::Invlpg(gva.0), None),
            _ => return Some(Rest::All),
        };
        rows.totals.by_status[outcome.status as usize] += 1;
        rows.end(&outcome);
        self.has_to_stop().then_some(Rest::All)
    }

    /// Runs the next row, an access that is not simply allowed: the shadow's walk for it ends at `end`, where `leaf` is.
    /// Returns how far it came, or that the one after it must wait; `None` if all can go on.
    #[inline(never)]
    fn run_other<F: FnMut(&Outcome)>(
        &mut self,
        rows: &mut Rows<'_, F>,
        end: (SptePos, Level),
        leaf: Spte,
    ) -> Option<Rest> {
        let plain = Words::of(&rows.all[rows.done]).plain(rows.options.no_values);
        let came = self.come_to_end(plain, end, leaf);
        self.end_row(rows, plain, came)
    }

    /// The same for a store to a leaf without W.
    #[inline(never)]
    fn run_write<F: FnMut(&Outcome)>(
        &mut self,
        rows: &mut Rows<'_, F>,
        end: (SptePos, Level),
        leaf: Spte,
    ) -> Option<Rest> {
        let plain = Words::of(&rows.all[rows.done]).plain(rows.options.no_values);
        match self.write_to_end(plain, end) {
            Some(came) => self.end_row(rows, plain, came),
            None => self.run_other(rows, end, leaf),
        }
    }

    #[inline(always)]
    fn end_row<F: FnMut(&Outcome)>(
        &mut self,
        rows: &mut Rows<'_, F>,
        plain: Plain,
        came: Result<End, Rest>,
    ) -> Option<Rest> {
        match came {
            Err(rest) => Some(rest),
            Ok(end @ End::Access(_)) => {
                let outcome = self.end_plain(plain, end);
                (rows.each)(&outcome);
                rows.done += 1;
                // No request is pending, or it would not have come so far.
                self.shadow.policy.failed().then_some(Rest::All)
            }
            Ok(end) => {
                self.count_hits(rows);
                let outcome = self.end_counted(plain, end);
                rows.totals.note_access(&outcome, rows.index());
                rows.end(&outcome);
                self.has_to_stop().then_some(Rest::All)
            }
        }
    }
}
