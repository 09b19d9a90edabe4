//! A plain walk of the guest's tables with all values that each entry has had: x86's rules, no shadow.

use std::collections::BTreeMap;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const NX: u64 = 1 << 63;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;

/// A value of an entry, and from which operation to which it was there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Version {
    pub(crate) value: u64,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// The guest's memory as it is, and what was in the words that changed.
#[derive(Default)]
pub(crate) struct Memory {
    frames: Vec<Option<Box<[u64; 512]>>>,
    past: BTreeMap<(u64, usize), Past>,
    /// Tables from this frame on may be read-only to the guest: nobody can set A and D there, and KVM does without.
    pub(crate) unmarked: u64,
    /// Those frames are not there at present.
    pub(crate) gone: bool,
}

/// What a word was before, and since when it is what it is.
#[derive(Default)]
struct Past {
    versions: Vec<Version>,
    since: u64,
}

impl Memory {
    pub(crate) fn frame(&self, gfn: u64) -> Option<&[u64; 512]> {
        self.frames.get(usize::try_from(gfn).ok()?)?.as_deref()
    }

    pub(crate) fn load(&mut self, gfn: u64, words: Box<[u64; 512]>) {
        if self.frames.len() <= gfn as usize {
            self.frames.resize(gfn as usize + 1, None);
        }
        self.frames[gfn as usize] = Some(words);
    }

    pub(crate) fn word(&self, gfn: u64, index: usize) -> Option<u64> {
        self.frame(gfn).map(|words| words[index])
    }

    /// The word changes in operation `now`; both values count for it.
    pub(crate) fn change(&mut self, gfn: u64, index: usize, value: u64, now: u64) {
        let Some(Some(words)) = self.frames.get_mut(gfn as usize) else { return };
        let past = self.past.entry((gfn, index)).or_default();
        past.versions.push(Version { value: words[index], from: past.since, to: now });
        past.since = now;
        words[index] = value;
    }

    /// The word also had this value, for as long as operation `now` took.
    pub(crate) fn passed_through(&mut self, gfn: u64, index: usize, value: u64, now: u64) {
        let past = self.past.entry((gfn, index)).or_default();
        past.versions.push(Version { value, from: now, to: now });
    }

    fn marked(&self, table: u64, value: u64) -> u64 {
        if table >= self.unmarked { value | A | D } else { value }
    }

    /// All values of a word since operation `since`; the last is the present one.
    pub(crate) fn versions(&self, gfn: u64, index: usize, since: u64) -> Vec<Version> {
        let past = self.past.get(&(gfn, index));
        let from = past.map_or(0, |past| past.since);
        let present = self.word(gfn, index).map(|value| Version { value, from, to: u64::MAX });
        let before = past.map_or(&[][..], |past| &past.versions).iter();
        before.filter(|v| v.to >= since).copied().chain(present).collect()
    }
}

/// How a vCPU reads entries and checks rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) nx: bool,
    pub(crate) wp: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) maxphyaddr: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
}

/// An access to one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) gva: u64,
    pub(crate) kind: Kind,
    pub(crate) user: bool,
    /// EFLAGS.AC lets the supervisor touch the user's pages.
    pub(crate) ac: bool,
}

/// What the entries on the way together say of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) gfn: u64,
    pub(crate) w: bool,
    pub(crate) u: bool,
    pub(crate) x: bool,
    /// Every entry has A.
    pub(crate) a: bool,
    /// The leaf has D.
    pub(crate) d: bool,
}

impl Page {
    const ALL: Self = Self { gfn: 0, w: true, u: true, x: true, a: true, d: true };

    fn through(self, value: u64) -> Self {
        Self {
            gfn: (value & ADDRESS) >> 12,
            w: self.w && value & 2 != 0,
            u: self.u && value & 4 != 0,
            x: self.x && value & NX == 0,
            a: self.a && value & A != 0,
            d: value & D != 0,
        }
    }

    /// The rights alone: no A, no D.
    pub(crate) fn permits(self, access: &Access, mode: Mode) -> bool {
        let supervisor = !access.user;
        let by_kind = match access.kind {
            Kind::Read => true,
            Kind::Write => self.w || supervisor && !mode.wp,
            Kind::Fetch => self.x || !mode.nx,
        };
        let guarded = if access.kind == Kind::Fetch { mode.smep } else { mode.smap && !access.ac };
        by_kind && if access.user { self.u } else { !(self.u && guarded) }
    }
}

/// What one entry says in a walk.
enum Step {
    Absent,
    Reserved,
    Table(u64),
    Leaf(u64),
}

/// Reads an entry of `level`. `strict` takes bit 63 for reserved while EFER.NX is off.
fn step(value: u64, level: u32, gva: u64, mode: Mode, strict: bool) -> Step {
    if value & 1 == 0 {
        return Step::Absent;
    }
    let beyond = ADDRESS & !((1 << mode.maxphyaddr) - 1);
    let large = value & 0x80 != 0 && (level == 2 || level == 3);
    let span = 1u64 << (12 + 9 * (level - 1));
    let by_level = match (level, large) {
        (4, _) => 0x180,
        (2 | 3, true) => (span - 1) & !0x1fff,
        _ => 0,
    };
    let nx = if strict && !mode.nx { NX } else { 0 };
    if value & (beyond | by_level | nx) != 0 {
        return Step::Reserved;
    }
    if level > 1 && !large {
        return Step::Table((value & ADDRESS) >> 12);
    }
    Step::Leaf(((value & ADDRESS & !(span - 1)) | (gva & (span - 1))) >> 12)
}

pub(crate) fn index(gva: u64, level: u32) -> usize {
    (gva >> (12 + 9 * (level - 1))) as usize & 511
}

/// What the tables say now: the page, or P and RSVD of the error code. `seen` is told each entry that is read, top first.
pub(crate) fn walk_now(
    memory: &Memory,
    root: u64,
    gva: u64,
    mode: Mode,
    mut seen: impl FnMut((u64, usize)),
) -> Result<Page, u32> {
    let (mut page, mut table) = (Page::ALL, root);
    for level in (1..=4).rev() {
        let at = (table, index(gva, level));
        let there = memory.word(at.0, at.1).filter(|_| !(memory.gone && table >= memory.unmarked));
        let Some(value) = there else { return Err(0) };
        seen(at);
        page = page.through(memory.marked(table, value));
        match step(value, level, gva, mode, true) {
            Step::Absent => return Err(0),
            Step::Reserved => return Err(9),
            Step::Table(gfn) => table = gfn,
            Step::Leaf(gfn) => return Ok(Page { gfn, ..page }),
        }
    }
    unreachable!("level 1 is a leaf")
}

/// The error code of the fault that the tables of now give, if any.
pub(crate) fn fault_now(memory: &Memory, root: u64, access: &Access, mode: Mode) -> Option<u32> {
    let p = match walk_now(memory, root, access.gva, mode, |_| ()) {
        Ok(page) if page.permits(access, mode) => return None,
        Ok(_) => 1,
        Err(code) => code,
    };
    let kind = match access.kind {
        Kind::Read => 0,
        Kind::Write => 2,
        Kind::Fetch if mode.nx || mode.smep => 16,
        Kind::Fetch => 0,
    };
    Some(p | kind | if access.user { 4 } else { 0 })
}

/// A stretch of time without a flush of upper entries, and the roots of it.
pub(crate) struct Window<'a> {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) roots: &'a [Version],
}

/// Whether some walk within the window could have left a translation for which `good` holds in the TLB. The CPU reads
/// an entry of each level no earlier than the one above it, which it may hold since then.
pub(crate) fn any_walk(
    memory: &Memory,
    window: &Window<'_>,
    gva: u64,
    mode: Mode,
    good: &mut dyn FnMut(Page) -> bool,
) -> bool {
    let alive = |v: &&Version| v.to >= window.from && v.from <= window.to;
    window.roots.iter().filter(alive).any(|root| {
        let start = (root.value, window.from.max(root.from));
        below(memory, window, (gva, mode), (4, start, Page::ALL), good)
    })
}

fn below(
    memory: &Memory,
    window: &Window<'_>,
    (gva, mode): (u64, Mode),
    (level, (table, since), page): (u32, (u64, u64), Page),
    good: &mut dyn FnMut(Page) -> bool,
) -> bool {
    memory.versions(table, index(gva, level), since).iter().filter(|v| v.from <= window.to).any(|v| {
        let page = page.through(memory.marked(table, v.value));
        match step(v.value, level, gva, mode, false) {
            Step::Absent | Step::Reserved => false,
            Step::Table(gfn) => below(memory, window, (gva, mode), (level - 1, (gfn, since.max(v.from)), page), good),
            Step::Leaf(gfn) => good(Page { gfn, ..page }),
        }
    })
}
