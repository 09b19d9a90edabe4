//! The guest that every input begins with: small, with tables for all paging modes, all in reach of its own stores.

use shadowkvm_core::bits::{
    CR0_PG, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME,
};
use shadowkvm_core::config::{Config, CpuFeatures, QEMU_TCG, Vendor, ZEN};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::Vm;
use shadowkvm_core::memory::HostState;
use shadowkvm_core::policy::builtin;
use shadowkvm_core::types::Gpa;

/// Bytes of slot 0: the lower half holds tables and data, the upper half is one page of 2 MiB.
pub const MEMORY: u64 = 4 << 20;
/// The second slot: gpa and bytes. Its first frame holds a page table.
pub const SLOT1: (u64, u64) = (0x1000_0000, 0x1_0000);
/// Frames 1 to 44 hold tables: 1 to 5 the identity map, 6 to 8 roots, 9 and 10 PDPTs, 11 and 12 directories, then page
/// tables.
pub const TABLES: u64 = 44;
/// The first frame with data.
pub const DATA: u64 = 0x30;
/// Tables of the other modes: two PML5s, a frame with four PDPTs of 32 bytes, two directories and nine page tables with
/// entries of 4 bytes, of which the first is the identity map.
pub const PML5: u64 = 64;
/// The frame with the PDPTs of PAE paging.
pub const PDPT: u64 = 66;
/// The first of two page directories with entries of 4 bytes.
pub const DIRECTORY32: u64 = 67;
/// The first of the page tables with entries of 4 bytes.
pub const TABLE32: u64 = 69;
/// The frame after the last of those tables, with INVPCID's descriptors.
pub const DESCRIPTORS: u64 = 78;
/// Addresses of instructions: none, in the identity map (supervisor, at a page end, user), in another address space,
/// nowhere, in a device, not canonical.
pub const SITES: [u64; 8] =
    [0, DATA << 12, ((DATA + 1) << 12) - 1, (DATA + 2) << 12, 1 << 39, 0x7f00_0000_0000, 1 << 39 | 15 << 12, 1 << 60];

const POLICIES: [&str; 8] =
    ["kvm", "kvm", "kvm", "no_unsync", "prefetch:64", "zap_on_write", "dirty_tables", "invlpg_protects"];

/// A paging mode by its tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paging {
    /// CR0.PG is off.
    Off,
    /// Two levels of 4-byte entries.
    Two,
    /// PDPTE registers and two levels of 8-byte entries.
    Pae,
    /// Four levels.
    Four,
    /// Five levels.
    Five,
}

impl Paging {
    /// What the registers select (SDM vol. 3, 4.1.1).
    #[must_use]
    pub const fn of(regs: &Registers) -> Self {
        if regs.cr0 & CR0_PG == 0 {
            Self::Off
        } else if regs.cr4 & CR4_PAE == 0 {
            Self::Two
        } else if regs.efer & EFER_LME == 0 {
            Self::Pae
        } else if regs.cr4 & CR4_LA57 == 0 {
            Self::Four
        } else {
            Self::Five
        }
    }

    /// The mode of three bits; those with most in them come more often.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Four,
            1 | 2 => Self::Five,
            3 | 4 => Self::Pae,
            5 | 6 => Self::Two,
            _ => Self::Off,
        }
    }

    /// Address space number `i` (0 to 3) of this mode: CR3.
    #[must_use]
    pub const fn root(self, i: u64) -> u64 {
        match self {
            Self::Off | Self::Four => [1 << 12, 6 << 12, 7 << 12, 8 << 12][(i & 3) as usize],
            Self::Five => (PML5 + (i & 1)) << 12,
            Self::Pae => PDPT << 12 | (i & 3) << 5,
            Self::Two => (DIRECTORY32 + (i & 1)) << 12,
        }
    }

    /// Registers of a guest in this mode, with other bits of CR4, in address space `i`.
    #[must_use]
    pub const fn registers(self, i: u64, cr4: u64) -> Registers {
        let cr4 = cr4 & !(CR4_PAE | CR4_LA57);
        let (paged, long) = (0x8001_0033, EFER_LME | EFER_LMA | 0x800);
        let (cr0, cr4, efer) = match self {
            Self::Off => (0x1_0033, cr4 & !CR4_PCIDE, 0x800),
            Self::Two => (paged, cr4 & !CR4_PCIDE, 0x800),
            Self::Pae => (paged, cr4 & !CR4_PCIDE | CR4_PAE, 0x800),
            Self::Four => (paged, cr4 | CR4_PAE, long),
            Self::Five => (paged, cr4 | CR4_PAE | CR4_LA57, long),
        };
        Registers { cr0, cr3: self.root(i), cr4, efer, cs_l: efer & EFER_LMA != 0 }
    }
}

/// What the first bytes of an input choose: the part of the machine that cannot change later, and where it begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Machine {
    /// CPU profile, number of vCPUs, policy, nx_huge_pages, quota.
    pub kind: u8,
    /// Host pages, the second slot; bit 7: `more` follows.
    pub host: u8,
    /// The modes of the first vCPU and of the others; CPU features; bits of CR4, CR0.WP, EFER.NX; PKRU.
    pub more: [u8; 4],
}

impl Machine {
    /// Reads the machine, and gives what follows.
    #[must_use]
    pub fn read(data: &[u8]) -> Option<(Self, &[u8])> {
        let [kind, host, rest @ ..] = data else { return None };
        let (more, rest) = match rest.split_first_chunk::<4>() {
            Some((more, rest)) if host & 0x80 != 0 => (*more, rest),
            _ => ([0; 4], rest),
        };
        Some((Self { kind: *kind, host: *host, more }, rest))
    }

    /// How many vCPUs.
    #[must_use]
    pub const fn vcpus(self) -> usize {
        1 + (self.kind >> 1 & 3) as usize % 3
    }

    /// The CPU.
    #[must_use]
    pub const fn cpu(self) -> CpuFeatures {
        let mut cpu = if self.kind & 1 == 0 { ZEN } else { QEMU_TCG };
        let bits = self.more[1];
        // MMIO entries of the shadow are marked by bit 51, so KVM has none where addresses are longer.
        cpu.maxphyaddr = [cpu.maxphyaddr, 36, 39, 40, 46, 51, 43, 37][(bits & 7) as usize];
        cpu.vendor = if bits & 8 == 0 { Vendor::Amd } else { Vendor::Intel };
        cpu.gbpages = bits & 0x10 == 0;
        cpu.pcid ^= bits & 0x20 != 0;
        cpu.invpcid = cpu.pcid;
        cpu.pku = bits & 0x40 != 0;
        cpu.la57 ^= bits & 0x80 != 0;
        cpu
    }

    /// Whether a frame does not begin as zeros.
    #[must_use]
    pub const fn writes(self, gfn: u64) -> bool {
        gfn >= 1 && gfn <= TABLES
            || self.host & 0x80 != 0 && gfn >= PML5 && gfn <= DESCRIPTORS
            || self.host & 0x10 != 0 && gfn == SLOT1.0 >> 12
    }

    fn registers(self, vcpu: usize) -> Registers {
        let cpu = self.cpu();
        let mode = if vcpu == 0 { self.more[0] } else { self.more[0] >> 3 };
        let mode = match Paging::from_bits(mode) {
            Paging::Five if !cpu.la57 => Paging::Four,
            mode => mode,
        };
        let bits = self.more[2];
        let pcide = if cpu.pcid { CR4_PCIDE } else { 0 };
        let cr4 = [
            0,
            CR4_PGE,
            CR4_SMEP,
            CR4_SMAP,
            CR4_SMEP | CR4_SMAP,
            pcide | CR4_PGE,
            CR4_PSE,
            CR4_PGE | CR4_PSE | CR4_SMEP,
        ];
        let mut regs = mode.registers(0, cr4[usize::from(bits & 7)]);
        if bits & 8 != 0 {
            regs.cr0 &= !0x1_0000;
        }
        if bits & 0x10 != 0 {
            regs.efer &= !0x800;
        }
        if bits & 0x20 != 0 && cpu.pku {
            regs.cr4 |= CR4_PKE;
        }
        if bits & 0x40 != 0 {
            regs.cr4 |= CR4_PSE;
        }
        // What begins in a 32-bit code segment can leave long mode.
        regs.cs_l &= self.more[0] >> (6 + vcpu.min(1)) & 1 == 0;
        regs
    }

    /// The VM.
    #[must_use]
    pub fn build(self) -> Vm {
        let (kind, host) = (self.kind, self.host);
        let policy = builtin(POLICIES[usize::from(kind >> 3 & 7)]).expect("a policy that exists");
        let config = Config { cpu: self.cpu(), nx_huge_pages: kind & 0x40 != 0, ..Config::default() };
        let mut vm = Vm::new(MEMORY, self.vcpus(), config, policy, 0).expect("a good configuration");
        let states = [HostState::Writable, HostState::Huge2m, HostState::Absent, HostState::Zero];
        vm.set_host_pages(Gpa(0), MEMORY / 2, states[usize::from(host & 3)]).expect("slot 0");
        vm.set_host_pages(Gpa(MEMORY / 2), MEMORY / 2, states[usize::from(host >> 2 & 3)]).expect("slot 0");
        if host & 0x10 != 0 {
            vm.add_slot(1, Gpa(SLOT1.0), SLOT1.1, host & 0x20 != 0, host & 0x40 != 0).expect("beside slot 0");
        }
        let mut set = |frame: u64, first: usize, entries: &[u64]| {
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            vm.write_memory(Gpa(frame << 12 | (first as u64) << 3), &bytes).expect("inside a slot");
        };
        fill(&mut set, host & 0x10 != 0);
        if host & 0x80 != 0 {
            fill_other_modes(&mut set);
        }
        for vcpu in 0..self.vcpus() {
            vm.set_sregs(vcpu, self.registers(vcpu)).expect("a mode that the CPU has");
            if self.cpu().pku {
                // Key 0 stays open: it is the key of every shadow entry.
                vm.set_pkru(vcpu, u32::from(self.more[3]) << 2).expect("a CPU with keys");
            }
        }
        if kind & 0x80 != 0 {
            vm.set_page_quota(64).expect("a legal quota");
        }
        vm.set_sites(SITES.to_vec());
        vm
    }
}

/// Every third page of the identity map is the user's.
const fn identity(gfn: u64) -> u64 {
    gfn << 12 | if gfn % 3 == 2 { 0x67 } else { 0x63 }
}

fn fill(set: &mut impl FnMut(u64, usize, &[u64]), slot1: bool) {
    set(1, 0, &[0x2067, 9 << 12 | 0x67, 10 << 12 | 0x67]);
    set(2, 0, &[0x3067]);
    set(3, 0, &[0x4067, 0x5067]);
    set(4, 0, &(0..512).map(identity).collect::<Vec<_>>());
    set(5, 0, &(512..1024).map(identity).collect::<Vec<_>>());
    // Roots that share the identity map and, in different places, the rest.
    for root in 6..9 {
        set(root, 0, &[0x2067, (9 + root % 2) << 12 | 0x67, (9 + (root + 1) % 2) << 12 | 0x67]);
    }
    set(9, 0, &[11 << 12 | 0x67, 12 << 12 | 0x63, 0x8000_0000_0000_0067 | 11 << 12]);
    set(10, 0, &[12 << 12 | 0x67, 11 << 12 | 0x65]);
    for directory in 11..13 {
        let tables = (0..14).map(|i| (13 + (i * 5 + directory % 2 * 16) % 32) << 12 | 0x67);
        let rest = [512 << 12 | 0xe7, if slot1 { SLOT1.0 | 0x67 } else { 512 << 12 | 0xa5 }];
        set(directory, 0, &tables.chain(rest).collect::<Vec<_>>());
    }
    for table in 13..=TABLES {
        let flags = [0x67, 0x67, 0x63, 0x67, 0x65, 0x27, 0x07, 0x8000_0000_0000_0067];
        let data = (0..14).map(|i| (DATA + (table * 3 + i) % 16) << 12 | flags[i as usize % 8]);
        set(table, 0, &data.chain([table << 12 | 0x67, 0xfe00_0067]).collect::<Vec<_>>());
    }
    if slot1 {
        set(SLOT1.0 >> 12, 0, &(0..8).map(|i| (DATA + i) << 12 | 0x07).collect::<Vec<_>>());
    }
}

fn fill_other_modes(set: &mut impl FnMut(u64, usize, &[u64])) {
    // A page of 1 GiB, which shows the lower 4 MiB, the second slot, and devices between.
    set(10, 2, &[0xe7]);
    set(PML5, 0, &[0x1067, 7 << 12 | 0x67, 8 << 12 | 0x65]);
    set(PML5, 511, &[6 << 12 | 0x67]);
    set(PML5 + 1, 0, &[6 << 12 | 0x67, 8 << 12 | 0x67, 0x8000_0000_0000_0067 | 7 << 12]);
    set(PML5 + 1, 511, &[PML5 << 12 | 0x67]);
    let pdpts = [3, 11, 12, 0, 3, 12, 11, 10, 3, 11, SLOT1.0 >> 12, 3, 3, 12, 9, 11];
    set(PDPT, 0, &pdpts.map(|gfn| if gfn == 0 { 6 } else { gfn << 12 | 1 }));
    fill_32_bit(set);
    let descriptors = (0..64u64).flat_map(|i| {
        let page = (1 + (i >> 2 & 1)) << 39 | (i >> 3 & 7) << 12;
        [[0, 1, 2, 0x1000][(i & 3) as usize], if i == 63 { 1 << 60 } else { page }]
    });
    set(DESCRIPTORS, 0, &descriptors.collect::<Vec<_>>());
}

/// The identity map of 4 MiB in one table; in each quarter of a directory six tables, of which each has 16 pages in each
/// half; a page of 4 MiB, and one beyond 4 GiB.
fn fill_32_bit(set: &mut impl FnMut(u64, usize, &[u64])) {
    let pairs = |entries: &[u64]| entries.chunks(2).map(|pair| pair[0] | pair[1] << 32).collect::<Vec<_>>();
    for directory in 0..2 {
        for quarter in 0..4 {
            let mut entries: Vec<u64> =
                (0..6).map(|i| (TABLE32 + 1 + (quarter * 3 + i + directory) % 8) << 12 | 0x67).collect();
            entries.extend([if quarter % 2 == 0 { 0xe7 } else { 0xa5 }, 1 << 13 | 0xe7]);
            if quarter == 0 {
                entries[0] = TABLE32 << 12 | 0x67;
            }
            set(DIRECTORY32 + directory, quarter as usize * 128, &pairs(&entries));
        }
    }
    set(TABLE32, 0, &pairs(&(0..1024).map(identity).collect::<Vec<_>>()));
    for table in TABLE32 + 1..DESCRIPTORS {
        let flags = [0x67, 0x67, 0x63, 0x67, 0x65, 0x27, 0x07, 0x47];
        for half in 0..2 {
            let data = (0..14).map(|i| (DATA + (table * 3 + i + half * 5) % 16) << 12 | flags[i as usize % 8]);
            set(table, half as usize * 256, &pairs(&data.chain([table << 12 | 0x67, 0xfe00_0067]).collect::<Vec<_>>()));
        }
    }
}
