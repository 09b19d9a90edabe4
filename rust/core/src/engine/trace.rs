//! Running a trace: a loop over [`Vm::step`], and one row's way to its operation.

use crate::cpu::AccessRow;
use crate::engine::plain::Rest;
use crate::engine::rows::Rows;
use crate::engine::{Control, Vm};
use crate::error::TraceError;
use crate::fault::insn::{Action, Insn, RmwKind};
use crate::fault::quick::Plain;
use crate::ops::{
    FLAG_AC, FLAG_DELIVERY, FLAG_FAULTS, FLAG_IMPLICIT, FLAG_KEEP, FLAG_MMIO, FLAG_USER, OpCode, ROW_BYTES, Row,
};
use crate::outcome::{Outcome, Status};
use crate::types::{AccessKind, Gpa, Gva, PAGE_SIZE};

/// Page contents that `PAGE` rows refer to: page number `value` is at `value * 4096`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pages<'a>(pub &'a [u8]);

impl<'a> Pages<'a> {
    fn get(self, number: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(number.checked_mul(PAGE_SIZE)?).ok()?;
        self.0.get(start..start.checked_add(PAGE_SIZE as usize)?)
    }
}

/// How a trace is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions<'a> {
    /// The number of the first row, for errors.
    pub first_row: u64,
    /// What `PAGE` rows write.
    pub pages: Pages<'a>,
    /// Nobody looks at the values that loads give, so they need not be fetched where no exit is involved.
    pub no_values: bool,
}

/// What a run of rows came to, beside the counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RunTotals {
    /// Operations per status, in the order of [`Status::ALL`].
    pub by_status: [u64; Status::ALL.len()],
    /// Rows with `FLAG_FAULTS` that took the recorded guest fault.
    pub faults_matched: u64,
    /// Rows with `FLAG_FAULTS` that took another fault or none.
    pub faults_missed: u64,
    /// Accesses without `FLAG_FAULTS` that took a guest fault.
    pub faults_unexpected: u64,
    /// Number of the first row that was missed or unexpected.
    pub first_mismatch: Option<u64>,
}

impl Vm {
    /// Runs one row.
    ///
    /// # Errors
    /// A row that cannot be run: no such vCPU, size, slot or page. Nothing was changed.
    pub fn step(&mut self, row: &Row, options: &RunOptions<'_>, index: u64) -> Result<Outcome, TraceError> {
        let vcpu = usize::from(row.vcpu);
        match plain_of(row, options).map_or(Err(Rest::All), |plain| self.run_plain(vcpu, &plain)) {
            Ok(outcome) => Ok(outcome),
            Err(rest) => self.step_rest(row, options, index, rest),
        }
    }

    /// The rest of a row that came so far as a plain access.
    fn step_rest(
        &mut self,
        row: &Row,
        options: &RunOptions<'_>,
        index: u64,
        rest: Rest,
    ) -> Result<Outcome, TraceError> {
        let vcpu = usize::from(row.vcpu);
        let fail = |reason: String| TraceError { index, reason };
        self.check_vcpu(vcpu).map_err(|e| fail(e.0))?;
        let rip = match self.sites.get(row.site as usize) {
            _ if row.site == 0 => None,
            Some(rip) => Some(*rip),
            None => return Err(fail(format!("site {} is not in the table of {} sites", row.site, self.sites.len()))),
        };
        if let Some(action) = action_of(row.op) {
            let insn = insn_of(row, action, rip).map_err(fail)?;
            return Ok(self.execute_rest(vcpu, &insn, rest));
        }
        let control = match row.op {
            OpCode::Invlpg => Control::Invlpg(row.addr),
            OpCode::Cr0 => Control::Cr0(row.value),
            OpCode::Cr3 => Control::Cr3(row.value),
            OpCode::Cr4 => Control::Cr4(row.value),
            OpCode::Efer => Control::Efer(row.value),
            OpCode::Hlt => Control::Hlt,
            OpCode::Io => Control::Io,
            _ => {
                let before = std::mem::replace(&mut self.shadow.events.vcpu, row.vcpu);
                let done = self.host_row(row, options).map_err(|reason| {
                    self.shadow.events.vcpu = before;
                    fail(reason)
                })?;
                self.begin(vcpu);
                self.end();
                return Ok(done);
            }
        };
        Ok(self.control(vcpu, control, rip))
    }

    fn host_row(&mut self, row: &Row, options: &RunOptions<'_>) -> Result<Outcome, String> {
        let slot = |number: u64| u16::try_from(number).map_err(|_| format!("memslot {number} is out of range"));
        let mut value = 0;
        match row.op {
            OpCode::Page => {
                let Some(data) = options.pages.get(row.value) else {
                    let count = options.pages.0.len() as u64 / PAGE_SIZE;
                    return Err(format!("page {} is not among the {count} pages of the recording", row.value));
                };
                if !row.addr.is_multiple_of(PAGE_SIZE) {
                    return Err(format!("PAGE: gpa {:#x} is not page-aligned", row.addr));
                }
                self.write_table_page(Gpa(row.addr), data).map_err(|e| e.to_string())?;
            }
            OpCode::HostWrite => {
                if !(1..=8).contains(&row.size) {
                    return Err(format!("HOST_WRITE: size {} must be 1 to 8", row.size));
                }
                let bytes = &row.value.to_le_bytes()[..usize::from(row.size)];
                self.write_memory(Gpa(row.addr), bytes).map_err(|e| e.to_string())?;
            }
            OpCode::GetDirtyLog => {
                value = self.get_dirty_log(slot(row.value)?).map_err(|e| e.0)?.len() as u64;
            }
            OpCode::SetDirtyLog => {
                self.set_dirty_log(slot(row.addr)?, row.value != 0).map_err(|e| e.0)?;
            }
            OpCode::Unmap => self.notifier_unmap(Gpa(row.addr), row.value).map_err(|e| e.0)?,
            OpCode::Quota => self.set_page_quota(row.value).map_err(|e| e.0)?,
            OpCode::SlotAdd => {
                let (readonly, log) = (row.flags & 1 != 0, row.flags & 2 != 0);
                self.add_slot(u16::from(row.size), Gpa(row.addr), row.value, readonly, log).map_err(|e| e.0)?;
            }
            OpCode::SlotDel => self.delete_slot(u16::from(row.size)).map_err(|e| e.0)?,
            _ => {}
        }
        Ok(Outcome::done(value))
    }

    /// Runs rows in order, each as [`Vm::step`] does, or together where that comes to the same; `each` sees every outcome.
    ///
    /// # Errors
    /// The first row that cannot be run, by its number; the rows before it were run.
    pub fn run(
        &mut self,
        rows: &[u8],
        options: &RunOptions<'_>,
        each: impl FnMut(&Outcome),
    ) -> Result<RunTotals, TraceError> {
        let (whole, rest) = rows.as_chunks::<ROW_BYTES>();
        let mut rows = Rows { all: whole, done: 0, counted: 0, options: *options, totals: RunTotals::default(), each };
        loop {
            let rest = self.run_plain_rows(&mut rows);
            // A row that is half done is finished first, as `step` does.
            if matches!(rest, Rest::All) && self.shadow.policy.failed() {
                return Err(TraceError { index: rows.index().saturating_sub(1), reason: "the policy failed".into() });
            }
            let (Some(bytes), index) = (whole.get(rows.done), rows.index()) else { break };
            let row = Row::decode(bytes, index)?;
            let outcome = match rest {
                Rest::All => self.step(&row, options, index)?,
                rest => self.step_rest(&row, options, index, rest)?,
            };
            rows.totals.note(&row, &outcome, index);
            rows.end(&outcome);
        }
        if rest.is_empty() {
            return Ok(rows.totals);
        }
        let index = rows.index();
        Err(TraceError { index, reason: format!("the trace ends inside a row: {} of {ROW_BYTES} bytes", rest.len()) })
    }
}

impl RunTotals {
    /// Adds what followed.
    pub fn add(&mut self, other: &Self) {
        for (sum, n) in self.by_status.iter_mut().zip(other.by_status) {
            *sum += n;
        }
        self.faults_matched += other.faults_matched;
        self.faults_missed += other.faults_missed;
        self.faults_unexpected += other.faults_unexpected;
        self.first_mismatch = self.first_mismatch.or(other.first_mismatch);
    }

    #[inline]
    pub(crate) fn note(&mut self, row: &Row, outcome: &Outcome, index: u64) {
        if action_of(row.op).is_none() {
            self.by_status[outcome.status as usize] += 1;
        } else if row.flags & FLAG_FAULTS == 0 {
            self.note_access(outcome, index);
        } else {
            self.by_status[outcome.status as usize] += 1;
            if outcome.status == Status::PageFault && u64::from(outcome.error_code) == row.value {
                self.faults_matched += 1;
                return;
            }
            self.faults_missed += 1;
            self.first_mismatch.get_or_insert(index);
        }
    }

    /// The same for an access of which no fault was recorded.
    #[inline]
    pub(super) fn note_access(&mut self, outcome: &Outcome, index: u64) {
        self.by_status[outcome.status as usize] += 1;
        if outcome.status == Status::PageFault {
            self.faults_unexpected += 1;
            self.first_mismatch.get_or_insert(index);
        }
    }
}

/// The row as an access that may need no exit: a load, store or fetch of at most 8 bytes with no other flag than CPL
/// and AC.
#[inline]
fn plain_of(row: &Row, options: &RunOptions<'_>) -> Option<Plain> {
    let kind = match row.op {
        OpCode::Read => AccessKind::Read,
        OpCode::Write => AccessKind::Write,
        OpCode::Fetch => AccessKind::Fetch,
        _ => return None,
    };
    let usual = FLAG_USER | FLAG_AC | FLAG_KEEP | FLAG_FAULTS | FLAG_MMIO;
    if row.site != 0 || row.flags & !usual != 0 || !matches!(row.size, 1..=8) {
        return None;
    }
    let wanted = if kind == AccessKind::Read { !options.no_values } else { row.flags & FLAG_KEEP == 0 };
    Some(Plain {
        gva: Gva(row.addr),
        size: row.size,
        row: AccessRow::of_kind(kind, row.flags & FLAG_USER != 0, row.flags & FLAG_AC != 0),
        writes_tables: writes_tables(row.op),
        value: wanted.then_some(row.value),
    })
}

/// Every flag of an access.
const FLAGS: u8 = FLAG_USER | FLAG_AC | FLAG_MMIO | FLAG_IMPLICIT | FLAG_DELIVERY | FLAG_KEEP | FLAG_FAULTS;

pub(crate) const fn action_of(op: OpCode) -> Option<Action> {
    Some(match op {
        OpCode::Read => Action::Load,
        OpCode::Write | OpCode::Store => Action::Store,
        OpCode::Fetch => Action::Fetch,
        OpCode::Or => Action::Rmw(RmwKind::Or),
        OpCode::And => Action::Rmw(RmwKind::And),
        OpCode::Xor => Action::Rmw(RmwKind::Xor),
        OpCode::Add => Action::Rmw(RmwKind::Add),
        OpCode::Xchg => Action::Rmw(RmwKind::Xchg),
        OpCode::Cmpxchg => Action::Rmw(RmwKind::Cmpxchg),
        _ => return None,
    })
}

pub(crate) fn insn_of(row: &Row, action: Action, rip: Option<u64>) -> Result<Insn, String> {
    if row.flags & !FLAGS != 0 {
        return Err(format!("flags {:#x}: the bits {:#x} do not exist", row.flags, row.flags & !FLAGS));
    }
    let wide = row.op == OpCode::Store && row.size == 16;
    if !matches!(row.size, 1..=8) && !wide {
        return Err(format!("size {} must be 1 to 8 (16 for STORE)", row.size));
    }
    Ok(Insn {
        value: row.value,
        writes_tables: writes_tables(row.op),
        user: row.flags & FLAG_USER != 0,
        ac: row.flags & FLAG_AC != 0,
        system: row.flags & FLAG_IMPLICIT != 0,
        delivery: row.flags & FLAG_DELIVERY != 0,
        soft: false,
        keep: row.flags & FLAG_KEEP != 0,
        rip,
        ..Insn::new(action, row.addr, row.size)
    })
}

/// The instructions that KVM takes for writes to page tables (`page_table_writing_insn`, 6.1): MOV, XCHG, OR, AND,
/// CMPXCHG (and BTS, BTC, CMPXCHG8B). All others are first tried with the page no longer shadowed.
#[must_use]
pub const fn writes_tables(op: OpCode) -> bool {
    matches!(op, OpCode::Write | OpCode::Or | OpCode::And | OpCode::Xchg | OpCode::Cmpxchg)
}
