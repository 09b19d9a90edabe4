//! Rows that are plain accesses of one vCPU, many at a time: what decides about an access that the shadow allows does
//! not change until one of them exits, so it is looked up once for all up to there.

use crate::cpu::Requests;
use crate::engine::Vm;
use crate::engine::plain::Ran;
use crate::engine::trace::{RunOptions, RunTotals};
use crate::fault::Ctx;
use crate::fault::quick::Plain;
use crate::hw::walk::access_entry;
use crate::memory::Host;
use crate::ops::{FLAG_AC, FLAG_KEEP, FLAG_MMIO, FLAG_USER, OpCode, ROW_BYTES, Row};
use crate::outcome::{Outcome, Status};
use crate::types::{AccessKind, Gpa, Gva, Level, SptePos};

/// Rows under way.
pub(super) struct Rows<'a, F> {
    pub all: &'a [[u8; ROW_BYTES]],
    /// How many of them were run.
    pub done: usize,
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

    /// The same for a plain access that ended with more than its load or store.
    #[cold]
    fn end_by_status(&mut self, outcome: &Outcome) {
        let row = Row::decode(&self.all[self.done], 0).expect("it was run");
        self.end(&row, outcome);
    }

    /// The next row is over.
    #[inline]
    pub(super) fn end(&mut self, row: &Row, outcome: &Outcome) {
        self.totals.note(row, outcome, self.index());
        (self.each)(outcome);
        self.done += 1;
    }
}

impl Vm {
    /// Runs rows as long as each is a plain access of the vCPU of the first. Returns how far the next one came.
    #[inline]
    pub(super) fn run_plain_rows<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Ran {
        match rows.all.get(rows.done) {
            Some(row) if row[0] <= OpCode::Fetch as u8 && usize::from(row[3]) < self.vcpus.len() => {
                self.with(usize::from(row[3]), |ctx| ctx.run_plain_rows(rows))
            }
            _ => Ran::NotAtAll,
        }
    }
}

/// Flags that a row of the loop may have. One with a recorded fault is left to its own step, which compares them.
const USUAL_FLAGS: u8 = FLAG_USER | FLAG_AC | FLAG_KEEP | FLAG_MMIO;
/// What the first 8 bytes of a row say (op, size, flags, vcpu, site): the bits that are clear in a plain access, but for
/// those of its vCPU.
const NOT_PLAIN: u64 = 0xffff_ffff_0000_0000 | (!USUAL_FLAGS as u64) << 16;
const VCPU: u64 = 0xff << 24;

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
    fn plain(self, no_values: bool) -> Plain {
        let kind = match self.head as u8 {
            0 => AccessKind::Read,
            1 => AccessKind::Write,
            _ => AccessKind::Fetch,
        };
        let wanted = if kind == AccessKind::Read { !no_values } else { !self.flag(FLAG_KEEP) };
        Plain {
            gva: self.gva,
            size: (self.head >> 8) as u8,
            kind,
            user: self.flag(FLAG_USER),
            ac: self.flag(FLAG_AC),
            writes_tables: kind == AccessKind::Write,
            value: wanted.then_some(self.value),
        }
    }
}

impl Ctx<'_> {
    fn run_plain_rows<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Ran {
        while self.vcpu.requests == Requests::default() && !self.vcpu.role.pke && !self.shadow.policy.failed() {
            let Some((words, (pos, level))) = self.run_hits(rows) else { break };
            match self.run_other(rows, words.head, words.gva, words.value, pos, level) {
                Ran::Ended(_) => {}
                other => return other,
            }
        }
        Ran::NotAtAll
    }

    /// Runs rows as long as the shadow allows them, and nothing is left to be done but the load or store itself.
    /// Returns the first that is otherwise and where the shadow's walk for it ends; `None` if it is no plain access, or
    /// there is none.
    #[inline(always)]
    fn run_hits<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Option<(Words, (SptePos, Level))> {
        let first = rows.done;
        let stop = self.run_until_stop(rows);
        let hits = (rows.done - first) as u64;
        if hits > 0 {
            self.vcpu.counters.x_ops += hits;
            self.vcpu.injected = None;
            self.shadow.events.op += hits;
            rows.totals.by_status[Status::Done as usize] += hits;
        }
        stop
    }

    #[inline(always)]
    fn run_until_stop<F: FnMut(&Outcome)>(&mut self, rows: &mut Rows<'_, F>) -> Option<(Words, (SptePos, Level))> {
        let (id, mode, root) = (u64::from(self.vcpu.id), self.vcpu.role.mode, self.vcpu.root.page());
        loop {
            let words = Words::of(rows.all.get(rows.done)?);
            let gva = words.gva;
            if !words.is_plain(id) || !mode.takes(gva) {
                return None;
            }
            let end = self.walk_near(root.or_else(|| self.vcpu.root.table(gva))?, gva);
            let leaf = self.shadow.spte(end.0);
            let plain = words.plain(rows.options.no_values);
            let allowed = plain.view().leaf_test(&self.vcpu.role, plain.kind).passes(leaf.0);
            if !allowed || leaf.is_table(end.1.0) {
                return Some((words, end));
            }
            let inside = gva.0 & ((end.1.pages() << 12) - 1);
            let outcome = self.touch_plain(&plain, || Some(Gpa(Host::gfn(leaf.pfn())?.gpa().0 | inside)));
            (rows.each)(&outcome);
            rows.done += 1;
        }
    }

    /// Runs the next row, an access that is not simply allowed: the shadow's walk for it ends at `pos`.
    #[inline(never)]
    fn run_other<F: FnMut(&Outcome)>(
        &mut self,
        rows: &mut Rows<'_, F>,
        head: u64,
        gva: Gva,
        value: u64,
        pos: SptePos,
        level: Level,
    ) -> Ran {
        let plain = Words { head, gva, value }.plain(rows.options.no_values);
        let ran = match access_entry(self.shadow, &self.vcpu.role, (pos, level), gva, (plain.kind, plain.view())) {
            Ok(frame) => self.finish_plain(&plain, frame),
            Err(code) => self.fault_plain(&plain, code),
        };
        match ran {
            Ran::Ended(outcome) if outcome.status == Status::Done => {
                rows.totals.by_status[Status::Done as usize] += 1;
                (rows.each)(&outcome);
                rows.done += 1;
            }
            Ran::Ended(outcome) => rows.end_by_status(&outcome),
            _ => {}
        }
        ran
    }
}
