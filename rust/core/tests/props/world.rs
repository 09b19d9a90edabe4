//! A small guest in which much can go wrong, and random things to do in it.
//!
//! Frames 1 to 7 hold tables that map the first 8 MiB one to one. The frames of the pool hold address spaces beside it:
//! roots, PDPTs, directories and page tables that mostly point to the next level, but any of them may also point to
//! itself, to a table of another level, to data, to a device, to nowhere. All lie in the mapped 8 MiB, so the guest edits
//! tables of every level by plain stores.

use proptest::prelude::*;
use proptest::sample::select;
use shadowkvm_core::config::{Config, CpuFeatures, QEMU_TCG, ZEN};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{RunOptions, Vm};
use shadowkvm_core::kernel::{KERNELS, Kernel};
use shadowkvm_core::memory::HostState;
use shadowkvm_core::ops::Row;
use shadowkvm_core::policy::builtin;
use shadowkvm_core::types::Gpa;
use std::fmt;
use std::ops::Range;

/// Where the second slot comes and goes: gpa and bytes.
pub(crate) const SLOT1: (u64, u64) = (0x1_0000_0000, 0x10_0000);
/// The first frame of the second slot; it may hold a page table.
pub(crate) const TABLE_IN_SLOT1: u64 = SLOT1.0 >> 12;
/// The pool: frames of tables by level, 1 to 4.
pub(crate) const POOL: [Range<u64>; 4] = [0x24..0x44, 0x1c..0x24, 0x18..0x1c, 0x10..0x18];
/// Frames that never have a slot; the second is the default page of the local APIC.
const DEVICES: [u64; 3] = [0xfe000, 0xfee00, 1 << 26];
const NX: u64 = 1 << 63;
/// Addresses of instructions: in pages of the identity map (supervisor, user, over a page end), nowhere, not canonical.
pub(crate) const SITES: [u64; 6] = [0, 0x18_0000, 0x18_3000, 0x18_0fff, 0x7f00_0000_0000, 1 << 60];
/// 2 MiB of the host behind slot 0 that may be one page.
pub(crate) const HUGE: [u64; 4] = [0x40_0000, 0x60_0000, 0x80_0000, 0xe0_0000];

/// Where slot 0 is cut into several: nowhere; through the data of the guest; through its tables, with a hole in the data. The
/// pieces share regions of 2 MiB.
const CUTS: [&[(u64, u8)]; 3] = [
    &[(0, 0)],
    &[(0, 0), (0x103, 0), (0x105, LOGGED), (0x10b, 0), (0x5ff, 0)],
    &[(0, 0), (0x1a, 0), (0x26, 0), (0x104, READONLY), (0x106, HOLE), (0x107, 0), (0x200, 0)],
];
/// Flags of SLOT_ADD, and one that leaves a piece out.
const READONLY: u8 = 1;
const LOGGED: u8 = 2;
const HOLE: u8 = 4;

/// Which accidents may happen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Guest entries may point outside the memslots.
    pub(crate) devices: bool,
    /// The host writes memory, drops pages, changes slots.
    pub(crate) host: bool,
}

/// An entry at a place in the pool: frame, index, value.
pub(crate) type Edit = (u64, u64, u64);

/// How a VM begins.
#[derive(Clone)]
pub(crate) struct Start {
    pub(crate) cpu: CpuFeatures,
    pub(crate) kernel: &'static Kernel,
    pub(crate) nx_huge_pages: bool,
    pub(crate) policy: &'static str,
    pub(crate) host_pages: HostState,
    /// The pieces of slot 0: first frame, flags.
    pub(crate) cuts: &'static [(u64, u8)],
    /// The second slot is there, with these flags of SLOT_ADD.
    pub(crate) slot1: Option<u8>,
    pub(crate) quota: Option<u64>,
    /// The usual entries may point to devices.
    pub(crate) devices: bool,
    /// Entries that are not the usual ones.
    pub(crate) flaws: Vec<Edit>,
}

/// One thing that happens.
#[derive(Clone)]
pub(crate) enum Op {
    /// A row of a trace.
    Row(Row),
    /// The host's pages change: gpa, bytes, state.
    HostPages(u64, u64, HostState),
}

impl fmt::Debug for Start {
    /// A line; failures print hundreds of values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} nx_huge_pages {} policy {} ", self.cpu.name, self.nx_huge_pages, self.policy)?;
        write!(f, "{:x?} ", self.cuts)?;
        write!(f, "{:?} slot1 {:?} quota {:?} devices {} [", self.host_pages, self.slot1, self.quota, self.devices)?;
        self.flaws.iter().try_for_each(|(frame, index, entry)| write!(f, " {frame:x}[{index}]={entry:x}"))?;
        write!(f, " ]")
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row(r) => {
                write!(
                    f,
                    "{:?} {:x}={:x}/{} flags {:x} vcpu {} site {}",
                    r.op, r.addr, r.value, r.size, r.flags, r.vcpu, r.site
                )
            }
            Self::HostPages(gpa, bytes, state) => write!(f, "HostPages {gpa:x} {bytes:x} {state:?}"),
        }
    }
}

impl Start {
    /// Nothing out of the ordinary.
    pub(crate) const fn plain() -> Self {
        Self {
            kernel: KERNELS[0],
            cpu: ZEN,
            nx_huge_pages: false,
            policy: "kvm",
            host_pages: HostState::Writable,
            cuts: CUTS[0],
            slot1: None,
            quota: None,
            devices: false,
            flaws: Vec::new(),
        }
    }

    /// The VM, with both vCPUs in the identity map.
    pub(crate) fn build(&self, events: u32) -> Vm {
        let config = Config { cpu: self.cpu, kernel: *self.kernel, nx_huge_pages: self.nx_huge_pages };
        let policy = builtin(self.policy).expect("a policy that exists");
        let mut vm = Vm::new(self.memory(), 2, config, policy, events).expect("a good configuration");
        self.set_host_pages(&mut vm);
        self.fill(&mut vm);
        self.cut(&mut vm);
        for vcpu in 0..2 {
            vm.set_sregs(vcpu, Registers { cr3: 0x1000, ..Registers::default() }).expect("long mode");
        }
        if let Some(quota) = self.quota {
            vm.set_page_quota(quota).expect("a legal quota");
        }
        vm.set_sites(SITES.to_vec());
        vm
    }

    /// Bytes of slot 0: as much as it takes for a page of 1 GiB.
    fn memory(&self) -> u64 {
        if self.host_pages == HostState::Huge1g { 2 << 30 } else { 16 << 20 }
    }

    fn set_host_pages(&self, vm: &mut Vm) {
        let (gpa, bytes) = if self.host_pages == HostState::Huge1g { (1 << 30, 1 << 30) } else { (0, self.memory()) };
        if self.host_pages != HostState::Writable {
            vm.set_host_pages(Gpa(gpa), bytes, self.host_pages).expect("a range of slot 0");
        }
    }

    /// The first piece keeps the number of the slot; the others have those from 2 on.
    fn cut(&self, vm: &mut Vm) {
        if self.cuts.len() == 1 {
            return;
        }
        vm.delete_slot(0).expect("it was there");
        let ends = self.cuts.iter().skip(1).map(|(first, _)| *first).chain([self.memory() >> 12]);
        for (number, ((first, flags), end)) in [0].into_iter().chain(2..).zip(self.cuts.iter().zip(ends)) {
            if flags & HOLE == 0 {
                let (gpa, bytes) = (Gpa(first << 12), (end - first) << 12);
                vm.add_slot(number, gpa, bytes, flags & READONLY != 0, flags & LOGGED != 0).expect("beside the others");
            }
        }
    }

    fn fill(&self, vm: &mut Vm) {
        if let Some(flags) = self.slot1 {
            vm.add_slot(1, Gpa(SLOT1.0), SLOT1.1, flags & 1 != 0, flags & 2 != 0).expect("beside slot 0");
        }
        let mut set = |frame: u64, index: u64, entry: u64| {
            vm.write_memory(Gpa(frame << 12 | index << 3), &entry.to_le_bytes()).expect("inside a slot");
        };
        set(1, 0, 0x2067);
        set(2, 0, 0x3067);
        for table in 0..4 {
            set(3, table, (table + 4) << 12 | 0x67);
            for index in 0..512 {
                let gfn = table << 9 | index;
                set(table + 4, index, gfn << 12 | if gfn % 3 == 0 { 0x67 } else { 0x63 });
            }
        }
        if self.slot1.is_some() {
            // A page table, whose A and D bits KVM cannot set if the slot is read-only.
            (0..8).for_each(|index| set(TABLE_IN_SLOT1, index, (0x100 + index) << 12 | 0x07));
        }
        if self.host_pages == HostState::Huge1g {
            POOL[2].clone().for_each(|table| set(table, 4, 1 << 30 | 0xe7));
        }
        for (frame, index, entry) in address_spaces(self.devices).iter().chain(&self.flaws) {
            set(*frame, *index, *entry);
        }
    }
}

/// Applies an op; `false` if it was refused.
pub(crate) fn apply(vm: &mut Vm, op: &Op) -> bool {
    match op {
        Op::Row(row) => vm.step(row, &RunOptions::default(), 0).is_ok(),
        Op::HostPages(gpa, bytes, state) => vm.set_host_pages(Gpa(*gpa), *bytes, *state).is_ok(),
    }
}

/// An index that is used often, so that things meet.
pub(crate) fn index() -> BoxedStrategy<u64> {
    prop_oneof![12 => 0u64..8, 3 => 8u64..17, 1 => select(vec![255, 256, 510, 511])].boxed()
}

/// A frame of the pool, of any level.
pub(crate) fn pool_frame() -> BoxedStrategy<u64> {
    prop_oneof![4 => POOL[0].clone(), 3 => POOL[1].clone(), 2 => POOL[2].clone(), 2 => POOL[3].clone()].boxed()
}

fn flags() -> BoxedStrategy<u64> {
    let odd = select(vec![0x27, 0x23, 0x65, 0x61, 0x07, 0x03, 0x47, 0x45, NX | 0x67, NX | 0x63, NX | 0x61]);
    prop_oneof![5 => Just(0x67u64), 3 => Just(0x63u64), 3 => odd].boxed()
}

fn at(frame: BoxedStrategy<u64>, flags: BoxedStrategy<u64>) -> BoxedStrategy<u64> {
    (frame, flags).prop_map(|(gfn, flags)| gfn << 12 | flags).boxed()
}

/// A guest entry for a table of `level` (1 to 4); one in six is for no level in particular.
pub(crate) fn entry(level: usize, rules: Rules) -> BoxedStrategy<u64> {
    let large = || select(vec![0xe7u64, 0xe3, 0xa7, 0xa3, 0xe5, 0xe1, 0x83, NX | 0xe7]).boxed();
    let data = || at(prop_oneof![6 => 0x100u64..0x110, 2 => pool_frame(), 1 => 1u64..8].boxed(), flags());
    let usual = match level {
        1 => data(),
        2 => prop_oneof![
            4 => at(POOL[0].clone().boxed(), flags()),
            1 => at(select(HUGE.map(|gpa| gpa >> 12).to_vec()).boxed(), large()),
        ]
        .boxed(),
        3 if rules.devices => prop_oneof![
            6 => at(POOL[1].clone().boxed(), flags()),
            1 => at(select(vec![0u64, 0x40000]).boxed(), large()),
        ]
        .boxed(),
        _ => at(POOL[level - 2].clone().boxed(), flags()),
    };
    let garbage = select(vec![!0, 1 << 51 | 0x67, 0x10_2000 | 0xe7, NX | 0x67 | 1 << 50, 1, 0x8000_0000_0000_0066]);
    let odd = prop_oneof![3 => at(pool_frame(), flags()), 2 => data(), 3 => Just(0u64), 1 => garbage];
    let inside = prop_oneof![20 => usual, 4 => odd].boxed();
    if !rules.devices {
        return inside;
    }
    let device = prop_oneof![1 => select(DEVICES.to_vec()), 2 => (SLOT1.0 >> 12)..(SLOT1.0 >> 12) + 3];
    prop_oneof![20 => inside, if level == 1 { 5 } else { 1 } => at(device.boxed(), flags())].boxed()
}

/// The address spaces beside the identity map, before anything goes wrong with them, with tables shared among them:
/// in each root and the identity map's 3 PDPTs, in each of those 4 directories, in each of those 8 page tables and a
/// page of 2 MiB, in each of those 16 pages, or 15 and a device.
fn address_spaces(devices: bool) -> Vec<Edit> {
    let mut edits = Vec::new();
    let mut below = |level: usize, tables: Range<u64>, places: Range<u64>| {
        let next = &POOL[level - 2];
        for table in tables {
            // A directory's tables follow each other; other tables share theirs in all combinations.
            let entry =
                |i: u64| (next.start + (table * (2 * places.end / 5) + i) % (next.end - next.start)) << 12 | 0x67;
            edits.extend(places.clone().map(|i| (table, i, entry(i))));
        }
    };
    below(4, POOL[3].clone(), 1..4);
    below(4, 1..2, 1..4);
    below(3, POOL[2].clone(), 0..4);
    below(2, POOL[1].clone(), 0..8);
    for (directory, huge) in POOL[1].clone().zip(HUGE.iter().cycle()) {
        edits.push((directory, 8, huge | if directory % 2 == 0 { 0xe7 } else { 0xa3 }));
    }
    for table in POOL[0].clone() {
        let entry = |i: u64| (0x100 + (table * 5 + i) % 0x10) << 12 | if i % 4 == 3 { 0x63 } else { 0x67 };
        edits.extend((0..16).map(|i| (table, i, entry(i))));
        if devices {
            edits.push((table, 7, (if table % 2 == 0 { DEVICES[0] } else { TABLE_IN_SLOT1 + 1 }) << 12 | 0x67));
        }
    }
    // Roots share the lower half of the identity map, as address spaces of one kernel do.
    edits.extend(POOL[3].clone().map(|root| (root, 0, 0x2067)));
    edits
}

/// What is not as it should be in them.
fn flaws(rules: Rules) -> BoxedStrategy<Vec<Edit>> {
    let level = |level: usize, share: Range<usize>| {
        let one = (POOL[level - 1].clone(), index(), entry(level, rules));
        prop::collection::vec(one, share)
    };
    (level(4, 0..3), level(3, 0..5), level(2, 0..12), level(1, 0..40))
        .prop_map(|(l4, l3, l2, l1)| l4.into_iter().chain(l3).chain(l2).chain(l1).collect())
        .boxed()
}

/// A start.
pub(crate) fn start(rules: Rules) -> BoxedStrategy<Start> {
    let policy = prop_oneof![
        3 => Just("kvm"),
        2 => select(vec![
            "no_unsync", "no_prefetch", "zap_on_write", "update_on_write", "xen_oos", "unsync_limit:1", "dirty_tables",
            "eager_sync", "invlpg_protects", "flood:0", "flood:2", "prefetch:4", "prefetch:64", "prefetch:512",
            "small_pages", "recycle_newest", "recycle_emptiest",
        ]),
    ];
    let host = prop_oneof![
        6 => Just(HostState::Writable),
        3 => Just(HostState::Huge2m),
        2 => Just(HostState::Absent),
        1 => Just(HostState::Zero),
        1 => Just(HostState::Shared),
        1 => Just(HostState::Huge1g),
    ];
    // The last have devices in them.
    let cuts = prop_oneof![4 => Just(CUTS[0]), 1 => Just(CUTS[1]), 1 => Just(CUTS[1 + usize::from(rules.devices)])];
    let slot1 = prop_oneof![3 => Just(None), 1 => (0u8..4).prop_map(Some)];
    let quota = prop::option::of(Just(64u64));
    let cpu = (select(vec![ZEN, QEMU_TCG]), select(KERNELS.to_vec()));
    (cpu, prop::bool::weighted(0.3), policy, host, (cuts, slot1), quota, flaws(rules))
        .prop_map(move |((cpu, kernel), nx_huge_pages, policy, host_pages, (cuts, slot1), quota, flaws)| Start {
            cpu,
            kernel,
            nx_huge_pages,
            policy,
            host_pages,
            cuts,
            slot1,
            quota,
            devices: rules.devices,
            flaws,
        })
        .boxed()
}
