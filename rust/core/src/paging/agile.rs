//! Agile paging (Gandhi, Hill and Swift, ISCA 2016): a walk begins in the shadow and changes over to nested paging at the
//! first guest table that changes often.
//!
//! A model of that paper's proposal, for which there is no hardware: guest tables in *shadow mode* are write-protected
//! and translated by a shadow whose entries the hypervisor fills on demand; tables in *nested mode* are read by the CPU
//! itself, each through the second stage. The paper's optional hardware is there: A and D bits are set in all tables
//! without an exit, and the CPU keeps pairs of a guest's root and its shadow, so that a CR3 load it knows does not exit.

use crate::config::PREFETCH;
use crate::cpu::CpuRole;
use crate::guest::gpte::Gpte;
use crate::guest::walk::GuestWalk;
use crate::memory::Host;
use crate::mode::Mode;
use crate::paging::cache::Cache;
use crate::paging::saved::set_in_order;
use crate::paging::stage::HostAct;
use crate::types::{Gfn, Gpa, Gva, Level};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Stores to one table within an interval that move it to nested mode (ISCA 2016, section on policies: the second).
const STORES_TO_NESTED: u32 = 2;
/// Looks without a walk after which a table that is stored to counts as something else: its frame is used again.
const FORGOTTEN: u8 = 16;
/// The parent of a root.
const NO_TABLE: u64 = u64::MAX;

/// How agile paging is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AgileSetup {
    /// Rows from one look at the tables to the next.
    pub interval: u64,
    /// Pairs of a guest's root and its shadow that each CPU keeps.
    pub roots: usize,
}

/// What agile paging came to, beside what nested paging counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AgileCounts {
    /// Entries of shadow tables that walks read.
    pub shadow_references: u64,
    /// Exits because a shadow entry was not filled yet.
    pub fills: u64,
    /// Shadow entries that were filled beside another.
    pub prefetched: u64,
    /// Exits for stores to guest tables in shadow mode.
    pub table_stores: u64,
    /// Exits for the guest's own #PF that a walk in the shadow came to.
    pub reflected: u64,
    /// Exits for CR3 loads of roots that the CPU does not keep.
    pub cr3_exits: u64,
    /// Tables that went from shadow to nested mode.
    pub to_nested: u64,
    /// Tables that came back.
    pub to_shadow: u64,
    /// Looks at the tables, one an interval.
    pub intervals: u64,
}

/// A guest table that a walk has come to.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Table {
    level: Level,
    /// The table whose entry led here last.
    parent: u64,
    nested: bool,
    /// Shadow mode: which entries of its shadow are filled, as [`key`] numbers them.
    #[serde(serialize_with = "set_in_order")]
    filled: FxHashSet<u64>,
    /// Stores since the last look.
    stores: u32,
    /// A walk came by since the last look.
    walked: bool,
    /// Looks since then.
    idle: u8,
}

/// Frames of the entries that a fill brought beside its own.
pub(super) type Neighbours = [Option<Gfn>; PREFETCH];

/// A shadow entry: which of its table, and which part of it where the shadow maps smaller pages than the guest.
const fn key(index: usize, part: u64) -> u64 {
    (index as u64) << 32 | part
}

/// The guest tables of all vCPUs' walks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Agile {
    tables: BTreeMap<u64, Table>,
    /// For each CPU, the roots whose shadow it keeps.
    roots: Vec<Cache>,
    interval: u64,
    rows: u64,
    /// The instruction under way is emulated: whatever comes of it is no further exit.
    exited: bool,
    counts: AgileCounts,
}

impl Agile {
    pub(super) fn new(vcpus: usize, setup: AgileSetup) -> Self {
        let AgileSetup { interval, roots } = setup;
        let roots = vec![Cache::new(roots, roots); vcpus];
        Self { tables: BTreeMap::new(), roots, interval, rows: 0, exited: false, counts: AgileCounts::default() }
    }

    pub(super) const fn counts(&self) -> AgileCounts {
        self.counts
    }

    /// An exit filled the shadow.
    pub(super) const fn note_fill(&mut self) {
        self.counts.fills += 1;
    }

    /// An instruction begins.
    pub(super) const fn begin(&mut self) {
        self.exited = false;
    }

    /// A walk read that many entries of shadow tables.
    pub(super) const fn note_references(&mut self, count: u64) {
        self.counts.shadow_references += count;
    }

    /// Whether it can be that of a VM with so many vCPUs; of one that was read.
    pub(super) fn is_whole(&self, vcpus: usize) -> bool {
        self.roots.len() == vcpus && self.interval > 0 && self.roots.iter().all(Cache::is_whole)
    }

    /// A walk went from the root down to a leaf of `leaf`: where it changed over to nested mode, 0 for nowhere. What it
    /// went through is known from now on; a new table is in the mode of the one above it. One that several tables lead to
    /// stays in shadow mode as long as one of those does whose walk came by last.
    pub(super) fn changeover(&mut self, walk: &GuestWalk, top: Level, leaf: Level) -> Level {
        let (mut parent, mut at) = (NO_TABLE, Level(0));
        for level in (leaf.0..=top.0).rev() {
            let gfn = walk.steps[usize::from(level) - 1].table.0;
            let table = self.tables.entry(gfn).or_insert_with(|| Table {
                level: Level(level),
                parent,
                nested: at.0 > 0,
                filled: FxHashSet::default(),
                stores: 0,
                walked: true,
                idle: 0,
            });
            // A table that maps itself is met at several levels: the highest counts.
            let counts = !table.walked || level >= table.level.0;
            (table.walked, table.idle) = (true, 0);
            if at.0 == 0 && counts {
                (table.level, table.parent) = (Level(level), parent);
            }
            if at.0 == 0 && table.nested {
                at = Level(level);
            }
            parent = gfn;
        }
        at
    }

    /// The shadow entries above the changeover are needed, the leaf's for a page that is mapped at level `mapped`. One
    /// exit fills all that are missing, and the neighbours of the leaf. Whether any were, and the neighbours' frames.
    pub(super) fn fill(
        &mut self,
        host: &Host,
        walk: &GuestWalk,
        mode: &Mode,
        (gva, at, mapped): (Gva, Level, Level),
    ) -> (bool, Neighbours) {
        let mut missing = false;
        for level in (walk.level.0.max(at.0 + 1)..=mode.top.0).rev() {
            let part = if level == walk.level.0 { part(mode, gva, walk.level, mapped) } else { 0 };
            let gfn = walk.steps[usize::from(level) - 1].table.0;
            let key = key(mode.index(gva, Level(level)), part);
            missing |= self.tables.get_mut(&gfn).is_some_and(|table| table.filled.insert(key));
        }
        let mut neighbours = Neighbours::default();
        if missing && walk.level == Level::PT && at.0 == 0 {
            self.prefetch(host, (walk.steps[0].table, mode.index(gva, Level::PT)), mode, &mut neighbours);
        }
        (missing, neighbours)
    }

    /// The neighbours of an entry that was filled, as KVM does it: eight entries, up to the first whose guest entry is
    /// not ready (`FNAME(pte_prefetch)`, 6.1).
    fn prefetch(&mut self, host: &Host, (gfn, index): (Gfn, usize), mode: &Mode, neighbours: &mut Neighbours) {
        let Some(table) = self.tables.get_mut(&gfn.0) else { return };
        let first = index & !(PREFETCH - 1);
        for (near, neighbour) in (first..first + PREFETCH).zip(neighbours) {
            let key = key(near, 0);
            if table.filled.contains(&key) {
                continue;
            }
            let entry = Gpte(host.entry(gfn, near, mode.entry_bytes));
            if !entry.present() || !entry.accessed() {
                return;
            }
            table.filled.insert(key);
            *neighbour = Some(entry.gfn());
            self.counts.prefetched += 1;
        }
    }

    /// A walk ended in a fault of the guest's. It exits if the walk was in the shadow up to there.
    pub(super) fn fault(&mut self, walk: &GuestWalk, role: &CpuRole) {
        let top = role.mode.top;
        let mut gfn = walk.steps[usize::from(top.0) - 1].table;
        for level in (1..=top.0).rev() {
            if self.tables.get(&gfn.0).is_some_and(|table| table.nested) {
                return;
            }
            let entry = walk.steps[usize::from(level) - 1].pte;
            if !entry.present() || entry.is_leaf(role, Level(level)) {
                break;
            }
            gfn = entry.gfn();
        }
        self.counts.reflected += u64::from(!self.exited);
    }

    /// The guest stores to a frame. A table in shadow mode exits, and the entries that are written must be filled anew.
    /// `None`: no exit; else whether a filled entry went, so that TLBs must be flushed.
    pub(super) fn store(&mut self, gfn: Gfn, (offset, size): (u64, u8), entry_bytes: u8) -> Option<bool> {
        let table = self.tables.get_mut(&gfn.0)?;
        table.stores += 1;
        if table.nested {
            return None;
        }
        self.counts.table_stores += u64::from(!self.exited);
        self.exited = true;
        let bytes = u64::from(entry_bytes);
        let (first, last) = (offset / bytes, (offset + u64::from(size).max(1) - 1) / bytes);
        let before = table.filled.len();
        table.filled.retain(|key| !(first..=last).contains(&(key >> 32)));
        let dropped = table.filled.len() < before;
        if table.stores >= STORES_TO_NESTED {
            self.move_to_nested(gfn.0);
        }
        Some(dropped)
    }

    /// The host did something. With a slot all shadow tables go (`kvm_mmu_zap_all_fast`, 6.1); of a page that went the
    /// second stage says that it must come again, which is one exit for it and its shadow entry.
    pub(super) fn host_did(&mut self, act: HostAct<'_>) {
        if matches!(act, HostAct::AllGone) {
            self.tables.clear();
            self.roots.iter_mut().for_each(Cache::clear);
        }
    }

    /// A table goes over to nested mode with all that hangs under it, since a walk never comes back to the shadow.
    fn move_to_nested(&mut self, gfn: u64) {
        let Some(level) = self.tables.get(&gfn).map(|table| table.level.0) else { return };
        self.switch(gfn, true);
        for below in (1..level).rev() {
            let hangs = |table: &Table| {
                table.level.0 == below && !table.nested && self.tables.get(&table.parent).is_some_and(|p| p.nested)
            };
            let found: Vec<_> = self.tables.iter().filter(|(_, table)| hangs(table)).map(|(gfn, _)| *gfn).collect();
            for gfn in found {
                self.switch(gfn, true);
            }
        }
    }

    fn switch(&mut self, gfn: u64, nested: bool) {
        let Some(table) = self.tables.get_mut(&gfn) else { return };
        (table.nested, table.filled) = (nested, FxHashSet::default());
        *if nested { &mut self.counts.to_nested } else { &mut self.counts.to_shadow } += 1;
        if table.parent == NO_TABLE {
            // The CPU's pair of this root names the mode, too.
            self.roots.iter_mut().for_each(|kept| kept.drop_line(gfn, 0));
        }
    }

    /// A CR3 load, which exits unless the CPU keeps the root.
    pub(super) fn load_root(&mut self, vcpu: usize, root: Gpa) {
        let (kept, gfn) = (&mut self.roots[vcpu], root.gfn().0);
        if kept.get(gfn, 0).is_none() {
            kept.put(gfn, 0, 0);
            self.counts.cr3_exits += 1;
        }
    }

    /// A row passed. At the end of an interval tables in nested mode that were not stored to come back, from the root
    /// down; those that were stored to while no walk came by for long are forgotten. Returns whether any came back: it is write-protected again, so TLBs must be flushed.
    pub(super) fn tick(&mut self) -> bool {
        self.rows += 1;
        if self.rows < self.interval {
            return false;
        }
        (self.rows, self.counts.intervals) = (0, self.counts.intervals + 1);
        self.tables.retain(|_, table| table.idle < FORGOTTEN || !table.nested || table.stores == 0);
        let before = self.counts.to_shadow;
        for level in (1..=5).rev() {
            let rests = |table: &Table| {
                let under = self.tables.get(&table.parent).is_none_or(|parent| !parent.nested);
                table.level.0 == level && table.nested && table.stores == 0 && under
            };
            let found: Vec<_> = self.tables.iter().filter(|(_, table)| rests(table)).map(|(gfn, _)| *gfn).collect();
            for gfn in found {
                self.switch(gfn, false);
            }
        }
        for table in self.tables.values_mut() {
            (table.stores, table.walked, table.idle) = (0, false, table.idle.saturating_add(1));
        }
        self.counts.to_shadow > before
    }
}

/// The part of a guest's page that a shadow entry of a smaller page maps; 0 where they are of one size.
const fn part(mode: &Mode, gva: Gva, page: Level, mapped: Level) -> u64 {
    let size = 12 + mode.index_bits * (page.0 as u32 - 1);
    (gva.0 & ((1 << size) - 1)) >> (12 + 9 * (mapped.0 as u32 - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{RunOptions, Vm};
    use crate::ops::{OpCode, Row};
    use crate::outcome::Status;
    use crate::paging::testing::{guest, row};
    use crate::paging::{Nested, NestedCounts, NestedSetup, USUAL};

    const SETUP: AgileSetup = AgileSetup { interval: 1000, roots: 2 };

    /// The guest, with its tables of level 1 to 4 mapped as pages 8 to 11.
    fn with_tables() -> Vm {
        let mut vm = guest();
        for page in 0..4_u64 {
            vm.write_memory(Gpa(0x4000 + 8 * (8 + page)), &((4 - page) << 12 | 7).to_le_bytes()).unwrap();
        }
        vm
    }

    struct Run(Vm, Nested);

    impl Run {
        fn new(agile: AgileSetup) -> Self {
            Self::over(agile, true)
        }

        /// Over a second stage that is warm or not.
        fn over(agile: AgileSetup, warm: bool) -> Self {
            let sizes = USUAL.without_walk_caches();
            let setup = NestedSetup { sizes, nested_tlb: 0, warm, level: Level::PT, agile: Some(agile) };
            Self(with_tables(), Nested::new(1, setup).unwrap())
        }

        /// Runs rows, and gives what they changed: (nested paging, agile paging).
        fn rows(&mut self, rows: &[Row]) -> (NestedCounts, AgileCounts, Vec<Status>) {
            let (before, agile) = (self.1.counts(), self.1.agile_counts().unwrap());
            let (bytes, mut said) = (rows.iter().flat_map(Row::encode).collect::<Vec<_>>(), Vec::new());
            self.1.run(&mut self.0, &bytes, &RunOptions::default(), |outcome| said.push(outcome.status)).unwrap();
            let (now, after) = (self.1.counts(), self.1.agile_counts().unwrap());
            let counts = NestedCounts {
                guest_references: now.guest_references - before.guest_references,
                host_references: now.host_references - before.host_references,
                guest_faults: now.guest_faults - before.guest_faults,
                stage_faults: now.stage_faults - before.stage_faults,
                ..now
            };
            let change = AgileCounts {
                shadow_references: after.shadow_references - agile.shadow_references,
                fills: after.fills - agile.fills,
                table_stores: after.table_stores - agile.table_stores,
                reflected: after.reflected - agile.reflected,
                ..after
            };
            (counts, change, said)
        }

        /// Entries that a walk for a page reads: shadow, guest, second stage.
        fn walk(&mut self, page: u64) -> (u64, u64, u64) {
            let flush = row(OpCode::Invlpg, page << 12, 0);
            let (counts, agile, _) = self.rows(&[row(OpCode::Read, page << 12, 0), flush]);
            (agile.shadow_references, counts.guest_references, counts.host_references)
        }
    }

    /// Two stores to what stands at an index of the table that a page maps.
    fn two_stores(page: u64, index: u64) -> [Row; 2] {
        [row(OpCode::Write, (page << 12) + 8 * index, 0), row(OpCode::Write, (page << 12) + 8 * index, 0)]
    }

    #[test]
    fn walks_read_4_to_20_entries_by_where_they_change_over() {
        let mut run = Run::new(SETUP);
        assert_eq!(run.walk(0), (4, 0, 0));
        for (page, walk) in [(8, (3, 1, 4)), (9, (2, 2, 8)), (10, (1, 3, 12)), (11, (0, 4, 16))] {
            let (_, agile, _) = run.rows(&two_stores(page, 300));
            assert_eq!(agile.table_stores, 2);
            assert_eq!(run.walk(0), walk, "4, 8, 12, 16, 20 entries (ISCA 2016, table 2)");
        }
        let (_, agile, _) = run.rows(&two_stores(8, 300));
        assert_eq!((agile.table_stores, agile.to_nested), (0, 4));
    }

    #[test]
    fn what_hangs_under_a_table_goes_with_it_and_comes_back_after_an_interval() {
        let mut run = Run::new(AgileSetup { interval: 20, ..SETUP });
        run.walk(0);
        run.rows(&two_stores(11, 300));
        let (_, agile, _) = run.rows(&two_stores(8, 300));
        assert_eq!((agile.to_nested, agile.table_stores), (4, 0), "all four, for the top moved");
        let rest: Vec<_> = (0..40).map(|_| row(OpCode::Read, 0, 0)).collect();
        let (_, agile, _) = run.rows(&rest);
        assert_eq!((agile.intervals, agile.to_shadow), (2, 4), "stored to in the first, at rest in the second");
        run.rows(&[row(OpCode::Invlpg, 0, 0)]);
        assert_eq!(run.walk(0), (4, 0, 0));
    }

    #[test]
    fn a_store_to_an_entry_empties_its_shadow() {
        let mut run = Run::new(SETUP);
        run.walk(0);
        let (_, agile, _) = run.rows(&[row(OpCode::Write, 8 << 12, 0x11007), row(OpCode::Read, 0, 0)]);
        assert_eq!((agile.table_stores, agile.fills), (1, 1), "one exit for the store, then the page itself");
        let (_, agile, _) = run.rows(&[row(OpCode::Write, (8 << 12) + 8 * 300, 0), row(OpCode::Read, 0, 0)]);
        assert_eq!((agile.table_stores, agile.fills), (1, 0), "another entry");
    }

    #[test]
    fn a_fill_brings_the_page_only_if_the_whole_walk_is_in_the_shadow() {
        let mut run = Run::over(SETUP, false);
        let (counts, agile, _) = run.rows(&[row(OpCode::Read, 0, 0)]);
        assert_eq!((agile.fills, counts.stage_faults), (1, 0), "one exit for both");
        run.rows(&two_stores(8, 300));
        let (counts, agile, _) =
            run.rows(&[row(OpCode::Write, (9 << 12) + 8, 0x4007), row(OpCode::Read, 0x20_1000, 0)]);
        assert_eq!((agile.table_stores, agile.fills), (1, 1), "the directory's entry, above the changeover");
        assert_eq!(counts.stage_faults, 1, "the page, which the CPU comes to by itself");
    }

    #[test]
    fn faults_exit_in_the_shadow_only_and_cr3_loads_of_unknown_roots_only() {
        let mut run = Run::new(SETUP);
        let absent = row(OpCode::Read, 100 << 12, 0);
        let (counts, agile, said) = run.rows(&[row(OpCode::Read, 0, 0), absent]);
        assert_eq!((counts.guest_faults, agile.reflected, said[1]), (1, 1, Status::PageFault));
        run.rows(&two_stores(8, 300));
        let (counts, agile, _) = run.rows(&[absent]);
        assert_eq!((counts.guest_faults, agile.reflected), (1, 0), "the last table is in nested mode");
        let loads = [0x1000, 0x1000, 0x5000, 0x1000, 0x6000, 0x7000, 0x1000].map(|root| row(OpCode::Cr3, 0, root));
        assert_eq!(run.rows(&loads).1.cr3_exits, 5, "two roots are kept");
    }

    #[test]
    fn a_fill_brings_the_neighbours_that_were_used() {
        let mut run = Run::new(SETUP);
        for page in 1..4_u64 {
            run.0.write_memory(Gpa(0x4000 + 8 * page), &(0x10027 + (page << 12)).to_le_bytes()).unwrap();
        }
        let rows: Vec<_> = (0..6).map(|page| row(OpCode::Read, page << 12, 0)).collect();
        let (_, agile, _) = run.rows(&rows);
        assert_eq!((agile.fills, agile.prefetched), (3, 3), "page 4 was never used, so it ends the first fill's");
    }

    #[test]
    fn a_large_page_in_a_small_second_stage_is_filled_in_parts() {
        let mut run = Run::new(SETUP);
        run.0.write_memory(Gpa(0x3008), &0x80_0087_u64.to_le_bytes()).unwrap();
        let read = |offset: u64| row(OpCode::Read, 0x20_0000 + offset, 0);
        let (_, agile, _) = run.rows(&[read(0), read(8), read(0x1000), read(0x5000)]);
        assert_eq!((agile.fills, agile.shadow_references), (3, 12), "three pages of 4 KiB, four entries each");
    }
}
