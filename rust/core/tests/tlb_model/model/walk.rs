//! A plain walk of the guest's tables: as they are, and as they have been.

use super::memory::{At, Memory, Version};
use super::rules::{Access, G, Mode, P, Page, Seen, Step};
use crate::world::Paging;

/// Where walks begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// Addresses are physical.
    Flat,
    /// The top table.
    Table(u64),
    /// PAE paging: the four PDPTE registers.
    Pdptes([u64; 4]),
}

impl Base {
    /// The top table for an address, if there is one.
    fn table(self, gva: u64) -> Option<u64> {
        match self {
            Self::Flat => None,
            Self::Table(gfn) => Some(gfn),
            Self::Pdptes(entries) => {
                let entry = entries[(gva >> 30) as usize & 3];
                (entry & P != 0).then_some((entry & 0x000f_ffff_ffff_f000) >> 12)
            }
        }
    }

    /// All top tables.
    pub(crate) fn tables(self) -> impl Iterator<Item = u64> {
        (0..4u64).filter_map(move |i| self.table(i << 30))
    }
}

/// What the tables say now: the page, or P and RSVD of the error code. `seen` is told each entry that is read, top first.
pub(crate) fn walk_now(
    memory: &Memory,
    base: Base,
    gva: u64,
    mode: Mode,
    mut seen: impl FnMut(At),
) -> Result<Page, u32> {
    if mode.paging == Paging::Off {
        return Ok(Page::ALL.at(gva >> 12));
    }
    let mut table = base.table(gva).ok_or(0u32)?;
    let mut page = Page::ALL;
    for level in (1..=mode.levels()).rev() {
        let at = At::entry(table, mode.index(gva, level), mode.four_bytes());
        let value = memory.readable(at).ok_or(0u32)?;
        seen(at);
        page = page.through(memory.marked(table, value));
        match mode.step(value, level, gva) {
            Step::Absent => return Err(0),
            Step::Reserved => return Err(9),
            Step::Table(gfn) => table = gfn,
            Step::Leaf(gfn) => return Ok(page.at(gfn)),
        }
    }
    unreachable!("level 1 is a leaf")
}

/// The error code of the fault that the tables of now give, if any.
pub(crate) fn fault_now(memory: &Memory, base: Base, access: &Access, mode: Mode) -> Option<u32> {
    let code = match walk_now(memory, base, access.gva, mode, |_| ()) {
        Ok(page) => {
            let key = page.locked(access, mode);
            if page.permits(access, mode) && !key {
                return None;
            }
            1 | u32::from(key) << 5
        }
        Err(code) => code,
    };
    Some(code | mode.code(access))
}

/// A base, and from which operation to which it was in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root {
    pub(crate) base: Base,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// A stretch of time without a flush of upper entries, and the roots of it.
pub(crate) struct Window<'a> {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) roots: &'a [Root],
    /// When the page was last flushed under any PCID, which takes global translations along.
    pub(crate) global: u64,
    pub(crate) seen: Seen,
}

/// One entry's part in a walk of the past.
struct Place {
    level: u32,
    table: u64,
    since: u64,
    page: Page,
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
    let alive = |root: &&Root| root.to >= window.from && root.from <= window.to;
    window.roots.iter().filter(alive).any(|root| {
        if mode.paging == Paging::Off {
            return root.base == Base::Flat && good(Page::ALL.at(gva >> 12));
        }
        let since = window.from.max(root.from);
        let level = mode.levels();
        root.base.table(gva).is_some_and(|table| {
            below(memory, window, (gva, mode), &Place { level, table, since, page: Page::ALL }, good)
        })
    })
}

fn below(
    memory: &Memory,
    window: &Window<'_>,
    (gva, mode): (u64, Mode),
    place: &Place,
    good: &mut dyn FnMut(Page) -> bool,
) -> bool {
    let Place { level, table, since, page } = *place;
    let at = At::entry(table, mode.index(gva, level), mode.four_bytes());
    let mut by_version = |v: &Version| {
        let page = page.through(memory.marked(table, v.value));
        let now = mode.step(v.value, level, gva);
        let before = mode.before(window.seen).step(v.value, level, gva);
        let steps = [Some(now), (before != now).then_some(before)];
        steps.into_iter().flatten().any(|step| match step {
            Step::Absent | Step::Reserved => false,
            Step::Table(table) => {
                let place = Place { level: level - 1, table, since: since.max(v.from), page };
                below(memory, window, (gva, mode), &place, good)
            }
            Step::Leaf(gfn) => (v.value & G == 0 || v.to >= window.global) && good(page.at(gfn)),
        })
    };
    memory.versions(at, since).iter().filter(|v| v.from <= window.to).any(&mut by_version)
}
