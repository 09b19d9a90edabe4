//! One virtual CPU: registers, what they mean for paging, roots, requests and the small caches that KVM keeps with it.

mod permission;

pub use permission::{AccessRow, CpuView, GuestTest, LeafTest, key_fault, permission_fault};

use crate::bits::{
    CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_ALWAYS, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PKE, CR4_PSE, CR4_SMAP,
    CR4_SMEP, EFER_ALLOWED, EFER_LMA, EFER_LME, EFER_NX, PT_NX, PT_PS, bit_range,
};
use crate::config::{CpuFeatures, PREV_ROOTS, Vendor, ZEN};
use crate::counters::VcpuCounters;
use crate::error::{ConfigError, refuse};
use crate::mode::Mode;
use crate::role::Role;
use crate::types::{Access, Gfn, Gva, Level, PageId};
use serde::{Deserialize, Serialize};

/// The control registers that decide paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Registers {
    /// CR0.
    pub cr0: u64,
    /// CR3, without bit 63.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// CS.L: the code segment is a 64-bit one, so paging cannot be left.
    pub cs_l: bool,
}

impl Default for Registers {
    /// A 64-bit guest with NX and write protection, and a page table at 0.
    fn default() -> Self {
        Self { cr0: CR0_PG | CR0_WP | 0x33, cr3: 0, cr4: CR4_PAE, efer: EFER_LME | EFER_LMA | EFER_NX, cs_l: true }
    }
}

impl Registers {
    /// Long mode is active.
    #[must_use]
    pub const fn lma(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// The paging mode that they select.
    #[must_use]
    pub const fn mode(&self) -> &'static Mode {
        Mode::of(self.cr0, self.cr4, self.efer)
    }

    /// Whether four PDPTE registers name the tables (`is_pae_paging`, 6.1).
    #[must_use]
    pub const fn pae_paging(&self) -> bool {
        self.mode().pdptes
    }

    /// Refuses what no CPU of these features can hold (`kvm_is_valid_sregs`, 6.1).
    ///
    /// # Errors
    /// An impossible or unsupported combination; the message names it.
    pub fn check(&self, cpu: &CpuFeatures) -> Result<(), ConfigError> {
        let (pg, lme) = (self.cr0 & CR0_PG != 0, self.efer & EFER_LME != 0);
        if pg && self.cr0 & CR0_PE == 0 {
            return refuse!("cr0 {:#x}: PG needs PE", self.cr0);
        }
        if self.cr0 & CR0_NW != 0 && self.cr0 & CR0_CD == 0 || self.cr0 >> 32 != 0 {
            return refuse!("cr0 {:#x}: NW needs CD, and bits 63:32 must be 0", self.cr0);
        }
        if self.efer & !EFER_ALLOWED != 0 {
            return refuse!("efer {:#x}: bits {:#x} are reserved", self.efer, self.efer & !EFER_ALLOWED);
        }
        if self.lma() != (lme && pg) {
            return refuse!("efer {:#x}: LMA must be set exactly if LME and CR0.PG are", self.efer);
        }
        if self.lma() && self.cr4 & CR4_PAE == 0 {
            return refuse!("cr4 {:#x}: long mode needs PAE", self.cr4);
        }
        if self.cs_l && !self.lma() {
            return refuse!("cs_l: a 64-bit code segment needs long mode (efer.LMA)");
        }
        self.check_cr4(cpu)?;
        if self.cr3 >> cpu.maxphyaddr != 0 {
            return refuse!("cr3 {:#x} is beyond the guest's {} physical address bits", self.cr3, cpu.maxphyaddr);
        }
        Ok(())
    }

    fn check_cr4(&self, cpu: &CpuFeatures) -> Result<(), ConfigError> {
        for (bit, name, there) in
            [(CR4_PCIDE, "PCIDE", cpu.pcid), (CR4_LA57, "LA57", cpu.la57), (CR4_PKE, "PKE", cpu.pku)]
        {
            if self.cr4 & bit != 0 && !there {
                return refuse!("cr4 {:#x}: profile {:?} has no {name}", self.cr4, cpu.name);
            }
        }
        let unknown = self.cr4 & !cr4_allowed(cpu);
        if unknown != 0 {
            return refuse!("cr4 {:#x}: bits {unknown:#x} are reserved", self.cr4);
        }
        if self.cr4 & CR4_PCIDE != 0 && !self.lma() {
            return refuse!("cr4 {:#x}: PCIDE needs long mode", self.cr4);
        }
        Ok(())
    }
}

/// The CR4 bits that a guest with these features may set (`kvm_is_valid_cr4`, 6.1).
#[must_use]
pub const fn cr4_allowed(cpu: &CpuFeatures) -> u64 {
    let mut bits = CR4_ALWAYS;
    if cpu.pcid {
        bits |= CR4_PCIDE;
    }
    if cpu.la57 {
        bits |= CR4_LA57;
    }
    if cpu.pku {
        bits |= CR4_PKE;
    }
    bits
}

/// What the guest walker obeys (`kvm_calc_cpu_role`, 6.1), computed when a context is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuRole {
    /// How the guest's tables are built.
    pub mode: &'static Mode,
    /// EFER.NX: bit 63 of an entry forbids execution, else it is reserved.
    pub nx: bool,
    /// CR0.WP: supervisor writes obey W.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE in long mode: PKRU holds for user pages.
    pub pke: bool,
    /// The greatest level at which PS makes an entry a leaf.
    pub largest: Level,
    /// Bits that are reserved in an entry, by level and by its PS bit.
    pub reserved: [[u64; 2]; 6],
    faults: permission::FaultTable,
    hardware_faults: permission::FaultTable,
    leaf_tests: [LeafTest; permission::ROWS],
    guest_tests: [GuestTest; permission::ROWS],
}

impl CpuRole {
    /// The role that the registers give. With paging off all bits are clear.
    #[must_use]
    pub fn of(regs: &Registers, cpu: &CpuFeatures) -> Self {
        let mode = regs.mode();
        let on = mode.has_tables();
        let nx = on && regs.efer & EFER_NX != 0;
        let pse = mode.entry_bytes == 8 || regs.cr4 & CR4_PSE != 0;
        let mut role = Self {
            mode,
            nx,
            wp: on && regs.cr0 & CR0_WP != 0,
            smep: on && regs.cr4 & CR4_SMEP != 0,
            smap: on && regs.cr4 & CR4_SMAP != 0,
            pke: regs.lma() && regs.cr4 & CR4_PKE != 0,
            largest: if pse { mode.largest } else { Level::PT },
            reserved: reserved_bits(mode, nx, pse, cpu),
            faults: [0; permission::ROWS],
            hardware_faults: [0; permission::ROWS],
            leaf_tests: [LeafTest::NONE; permission::ROWS],
            guest_tests: [GuestTest::NONE; permission::ROWS],
        };
        role.faults = permission::fault_table(&role);
        role.hardware_faults = permission::hardware_table(&role);
        role.leaf_tests = permission::leaf_tests(&role);
        role.guest_tests = permission::guest_tests(&role);
        role
    }

    /// Of a state that was just read, until its registers give another.
    fn unread() -> Self {
        Self::of(&Registers::default(), &ZEN)
    }

    /// The same with EFER.NX on.
    #[must_use]
    pub fn with_nx(self) -> Self {
        let reserved = self.reserved.map(|pair| pair.map(|bits| bits & !PT_NX));
        let mut role = Self { nx: true, reserved, ..self };
        role.faults = permission::fault_table(&role);
        role.guest_tests = permission::guest_tests(&role);
        role
    }

    /// The role that shadow pages are made with (`kvm_init_shadow_mmu`, 6.1).
    #[must_use]
    pub const fn root_role(&self) -> Role {
        if !self.mode.has_tables() {
            return Role::direct_root(self.mode.shadow_root);
        }
        Role::root(self.mode.shadow_root, self.wp, self.smep, self.smap).with_entry_bytes(self.mode.entry_bytes)
    }
}

/// The reserved bits of entries, by level and PS (`__reset_rsvds_bits_mask`, 6.1; section 2.4 of the specification).
const fn reserved_bits(mode: &Mode, nx: bool, pse: bool, cpu: &CpuFeatures) -> [[u64; 2]; 6] {
    let mut bits = [[0; 2]; 6];
    if mode.entry_bytes == 4 {
        // Large pages of 4-byte entries: bits 13 to 16 are address bits 32 to 35 (PSE36), 17 to 21 are reserved.
        if pse {
            bits[2][1] = bit_range(17, 21);
        }
        return bits;
    }
    // Long mode ignores bits 52 to 62, PAE reserves them.
    let beyond = bit_range(cpu.maxphyaddr, 63) & bit_range(0, if mode.pdptes { 62 } else { 51 });
    let high = beyond | if nx { 0 } else { PT_NX };
    // AMD reserves bit 8 (global) of the two uppermost levels, Intel ignores it.
    let no_leaf = PT_PS | if matches!(cpu.vendor, Vendor::Amd) { 1 << 8 } else { 0 };
    bits[1] = [high, high];
    bits[2] = [high, high | bit_range(13, 20)];
    bits[3] = [high, high | bit_range(13, 29) | if cpu.gbpages { 0 } else { PT_PS }];
    bits[4] = [high | no_leaf, high | no_leaf];
    bits[5] = bits[4];
    bits
}

/// The reserved bits of a PDPTE (the same function; bit 63 is reserved whatever EFER.NX says).
#[must_use]
pub const fn pdpte_reserved(cpu: &CpuFeatures) -> u64 {
    bit_range(cpu.maxphyaddr, 63) | bit_range(1, 2) | bit_range(5, 8)
}

/// The shadow's root tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Top {
    /// No root is loaded.
    #[default]
    None,
    /// A root page (long mode).
    Page(PageId),
    /// One page for each GiB of 4, `None` behind a PDPTE that is not present (`pae_root`, 6.1).
    Pae([Option<PageId>; 4]),
    /// Nothing is present, because CR3 points outside the slots (`kvm_mmu_get_dummy_root`, 6.12).
    Dummy,
}

/// One root of the shadow tables, and the CR3 value it was loaded for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Root {
    /// Its tables.
    pub top: Top,
    /// The CR3 value (with PCID and cache bits, without bit 63); 0 with paging off.
    pub pgd: u64,
}

impl Root {
    /// Whether a root is loaded.
    #[inline]
    #[must_use]
    pub const fn is_loaded(&self) -> bool {
        !matches!(self.top, Top::None)
    }

    /// The root page, if the root is one page.
    #[inline]
    #[must_use]
    pub const fn page(&self) -> Option<PageId> {
        match self.top {
            Top::Page(id) => Some(id),
            Top::None | Top::Pae(_) | Top::Dummy => None,
        }
    }

    /// Where the walk for an address begins; `None` without a root or behind a PDPTE that is not present.
    #[inline]
    #[must_use]
    pub const fn table(&self, gva: Gva) -> Option<PageId> {
        match self.top {
            Top::Page(id) => Some(id),
            Top::Pae(pages) => pages[(gva.0 >> 30) as usize & 3],
            Top::None | Top::Dummy => None,
        }
    }

    /// All its pages, in the order of the addresses.
    pub fn pages(&self) -> impl Iterator<Item = PageId> + use<> {
        let pages = match self.top {
            Top::None | Top::Dummy => [None; 4],
            Top::Page(id) => [Some(id), None, None, None],
            Top::Pae(pages) => pages,
        };
        pages.into_iter().flatten()
    }
}

/// The last MMIO access of a vCPU (`vcpu->arch.mmio_gva` and its neighbours, 6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MmioCache {
    /// The page's address, 0 = none.
    pub gva: u64,
    /// The frame.
    pub gfn: Gfn,
    /// W and U of the translation.
    pub access: Access,
    /// The memslot generation it belongs to.
    pub generation: u64,
}

macro_rules! requests {
    ($($name:ident $bit:literal $doc:literal;)*) => {
        impl Requests { $(#[doc = $doc] pub const $name: Self = Self($bit);)* }
    };
}

/// Requests that are served when the vCPU enters the guest (`KVM_REQ_*`, 6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Requests(pub u8);

requests! {
    FREE_OBSOLETE_ROOTS 1 "Free roots that were zapped.";
    MMU_SYNC 2 "Sync the current root.";
    LOAD_MMU_PGD 4 "Load the hardware CR3.";
    TLB_FLUSH 8 "Flush all TLB entries; takes the place of `TLB_FLUSH_CURRENT`.";
    TLB_FLUSH_CURRENT 16 "Flush the TLB entries of the current root.";
    TLB_FLUSH_GUEST 32 "As the guest asked: sync, forget unsync previous roots, flush.";
    TRIPLE_FAULT 64 "Shut down.";
    EVENT 128 "Inject an event.";
}

impl Requests {
    /// Adds requests.
    pub fn raise(&mut self, what: Self) {
        self.0 |= what.0;
    }

    /// Whether a request is there.
    #[must_use]
    pub const fn pending(self, what: Self) -> bool {
        self.0 & what.0 != 0
    }

    /// Takes a request if it is there.
    pub fn check(&mut self, what: Self) -> bool {
        let there = self.0 & what.0 != 0;
        self.0 &= !what.0;
        there
    }
}

/// One virtual CPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vcpu {
    /// Its number.
    pub id: u8,
    /// Control registers.
    pub regs: Registers,
    /// What they mean for guest walks; not part of the state, since the registers give it.
    #[serde(skip, default = "CpuRole::unread")]
    pub role: CpuRole,
    /// The PDPTE registers, as the last load of CR3 (or of paging) read them.
    pub pdptes: [u64; 4],
    /// PKRU: two bits for each protection key, access and write disable.
    pub pkru: u32,
    /// The current root.
    pub root: Root,
    /// Roots used before, the newest first.
    pub prev_roots: [Root; PREV_ROOTS],
    /// The MMIO cache.
    pub mmio: MmioCache,
    /// RIP and fault address of the last instruction that was resumed by the retry rule.
    pub last_retry: (u64, u64),
    /// Requests to serve at entry.
    pub requests: Requests,
    /// Statistics.
    pub counters: VcpuCounters,
    /// The event whose delivery is under way.
    pub delivering: Option<u8>,
    /// The exception being delivered: vector and error code, for `[reinjected]`.
    pub injected: Option<(u8, u32)>,
    /// CR2: where the guest's last #PF was.
    pub cr2: u64,
    /// RIP and privilege (CPL 3) of the INT instruction whose event goes in again with `Requests::EVENT`.
    pub soft_event: (Gva, bool),
}

impl Vcpu {
    /// A vCPU with the default registers and no root.
    #[must_use]
    pub fn new(id: u8, cpu: &CpuFeatures) -> Self {
        let regs = Registers::default();
        Self {
            id,
            role: CpuRole::of(&regs, cpu),
            regs,
            pdptes: [0; 4],
            pkru: 0,
            root: Root::default(),
            prev_roots: [Root::default(); PREV_ROOTS],
            mmio: MmioCache::default(),
            last_retry: (0, 0),
            requests: Requests::default(),
            counters: VcpuCounters::default(),
            delivering: None,
            injected: None,
            cr2: 0,
            soft_event: (Gva(0), false),
        }
    }

    /// Whether the MMIO cache answers for that address (`vcpu_match_mmio_gva` and `vcpu_match_mmio_gen`, 6.1).
    #[must_use]
    pub const fn mmio_matches(&self, gva: Gva, generation: u64) -> bool {
        self.mmio.generation == generation && self.mmio.gva != 0 && self.mmio.gva == gva.page().0
    }

    /// Whether the MMIO cache holds that frame (`vcpu_match_mmio_gpa`, 6.1).
    #[must_use]
    pub const fn mmio_gfn_matches(&self, gfn: Gfn, generation: u64) -> bool {
        self.mmio.generation == generation && self.mmio.gfn.0 != 0 && self.mmio.gfn.0 == gfn.0
    }

    /// Forgets the MMIO cache (`vcpu_clear_mmio_info` with `MMIO_GVA_ANY`, 6.1).
    pub fn clear_mmio(&mut self) {
        self.mmio.gva = 0;
    }

    /// Forgets the MMIO cache if it holds that page.
    pub fn clear_mmio_page(&mut self, gva: Gva) {
        if self.mmio.gva == gva.page().0 {
            self.mmio.gva = 0;
        }
    }

    /// The active process-context identifier, 0 without CR4.PCIDE.
    #[must_use]
    pub const fn pcid(&self) -> u64 {
        self.pcid_of(self.regs.cr3)
    }

    /// The process-context identifier of a CR3 value (`kvm_get_pcid`, 6.1).
    #[must_use]
    pub const fn pcid_of(&self, pgd: u64) -> u64 {
        if self.regs.cr4 & CR4_PCIDE != 0 { pgd & 0xfff } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{QEMU_TCG, ZEN};

    #[test]
    fn impossible_registers_are_refused_by_name() {
        let ok = Registers::default();
        assert_eq!(ok.check(&ZEN), Ok(()));
        let text = |r: Registers| r.check(&ZEN).unwrap_err().0;
        let long = Registers { cs_l: false, efer: 0, ..ok };
        assert_eq!(long.check(&ZEN), Ok(()), "PAE paging");
        assert_eq!(Registers { cr4: 0, ..long }.check(&ZEN), Ok(()), "32-bit paging");
        assert_eq!(Registers { cr0: 0x33, ..long }.check(&ZEN), Ok(()), "paging off");
        assert!(text(Registers { efer: 0, ..ok }).contains("64-bit code segment"));
        assert!(text(Registers { cr4: 0, ..ok }).contains("long mode needs PAE"));
        assert!(text(Registers { cr4: CR4_PAE | CR4_PCIDE, ..long }).contains("PCIDE needs long mode"));
        assert!(text(Registers { cr4: CR4_PAE | 1 << 30, ..ok }).contains("0x40000000 are reserved"));
        assert!(text(Registers { efer: ok.efer | 1 << 1, ..ok }).contains("0x2 are reserved"));
        let err = Registers { cr4: CR4_PAE | CR4_LA57, ..ok }.check(&QEMU_TCG).unwrap_err().0;
        assert!(err.contains("no LA57"), "{err}");
        assert!(Registers { cr4: CR4_PAE | CR4_PCIDE, ..ok }.check(&QEMU_TCG).is_err());
        assert!(Registers { cr3: 1 << 48, ..ok }.check(&ZEN).is_err());
    }

    #[test]
    fn reserved_bits_follow_mode_vendor_and_width() {
        let bits = |regs: Registers, cpu: &CpuFeatures| CpuRole::of(&regs, cpu).reserved;
        let ok = Registers::default();
        let pae = Registers { cs_l: false, efer: EFER_NX, ..ok };
        let small = Registers { cs_l: false, efer: 0, cr4: CR4_PSE, ..ok };
        assert_eq!(bits(ok, &ZEN)[1][0], bit_range(48, 51));
        assert_eq!(bits(pae, &ZEN)[1][0], bit_range(48, 62));
        assert_eq!(bits(Registers { efer: 0, ..pae }, &ZEN)[1][0], bit_range(48, 63));
        assert_eq!(bits(small, &ZEN)[2], [0, bit_range(17, 21)]);
        assert_eq!(bits(Registers { cr4: 0, ..small }, &ZEN)[2], [0, 0], "PS is ignored without PSE");
        let intel = CpuFeatures { vendor: Vendor::Intel, gbpages: false, maxphyaddr: 36, ..ZEN };
        assert_eq!(bits(ok, &intel)[4][0] & (1 << 8 | PT_PS), PT_PS);
        assert_eq!(bits(ok, &intel)[3][1] & PT_PS, PT_PS);
        assert_eq!(pdpte_reserved(&intel), bit_range(36, 63) | 0x1e6);
    }

    #[test]
    fn a_request_is_taken_once() {
        let mut requests = Requests::default();
        requests.raise(Requests::MMU_SYNC);
        assert!(requests.check(Requests::MMU_SYNC));
        assert!(!requests.check(Requests::MMU_SYNC));
    }
}
