//! KVM's constants, the CPU profiles and the limits of the engine.

use crate::error::{ConfigError, refuse};
use crate::kernel::{Kernel, LINUX_6_1, Name};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

/// Entries around a faulting one that are prefetched with it (`PTE_PREFETCH_NUM`).
pub const PREFETCH: usize = 8;
/// Writes to an upper table without a fault through it that zap its page (`detect_write_flooding`).
pub const FLOOD_THRESHOLD: u32 = 3;
/// Entries of one rmap list past which all are zapped (`RMAP_RECYCLE_THRESHOLD`).
pub const RMAP_RECYCLE: u32 = 1000;
/// Slots of one unsync walk, the parent's own included (`KVM_PAGE_ARRAY_NR`).
pub const UNSYNC_BATCH: usize = 16;
/// Shadow pages that must be free before a fault (`KVM_MIN_FREE_MMU_PAGES`).
pub const MIN_FREE_PAGES: u64 = 5;
/// Shadow pages that recycling makes free (`KVM_REFILL_PAGES`).
pub const REFILL_PAGES: u64 = 25;
/// The least page quota (`KVM_MIN_ALLOC_MMU_PAGES`).
pub const MIN_QUOTA: u64 = 64;
/// Previous roots that a vCPU keeps (`KVM_MMU_NUM_PREV_ROOTS`).
pub const PREV_ROOTS: usize = 3;
/// Bits of the memslot generation that an MMIO entry holds.
pub const MMIO_GEN_BITS: u32 = 19;
/// Address spaces of a VM: normal and SMM. A memslot generation moves by this number.
pub const ADDRESS_SPACES: u64 = 2;
/// Times an instruction is resumed at one place before the engine says that it never ends. KVM would go on; the
/// longest chain of useful resumptions is a few faults a page that the instruction touches.
pub const MAX_RESUMES: u32 = 64;
/// Shadow pages that a list head can address; far above the default quota of a 64 GiB guest (335,544).
pub const MAX_QUOTA: u64 = 1 << 22;
/// The number of memslots (`KVM_USER_MEM_SLOTS`).
pub const MAX_SLOTS: usize = 509;
/// vCPUs of one VM.
pub const MAX_VCPUS: usize = 255;
/// Physical address bits below which memslots lie: bits above are the engine's own in host frame numbers.
pub const MAX_GPA_BITS: u32 = 48;
/// Guest physical address bits that a CPU can have.
pub const MAXPHYADDR: std::ops::RangeInclusive<u32> = 36..=52;
/// Bytes of guest memory of one VM.
pub const MAX_MEMORY: u64 = 1 << 42;

/// Who makes the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Vendor {
    /// AMD: bit 8 of entries of the two uppermost levels is reserved.
    Amd,
    /// Intel: it is ignored.
    Intel,
}

/// What the CPU and the guest's CPUID offer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// The profile's name.
    #[serde(deserialize_with = "profile_name")]
    pub name: Name,
    /// The CPU tells the next RIP, so that skipping an instruction needs no decoding.
    pub nrips: bool,
    /// The CPU hands over instruction bytes and decoded CR and INVLPG operands.
    pub decode_assists: bool,
    /// A reserved-bit fault has P set, as on every real CPU.
    pub rsvd_sets_p: bool,
    /// A read-modify-write faults first as a read (QEMU TCG), then as a write.
    pub rmw_reads_first: bool,
    /// 1 GiB pages in CPUID.
    pub gbpages: bool,
    /// PCID in CPUID.
    pub pcid: bool,
    /// INVPCID in CPUID.
    pub invpcid: bool,
    /// 5-level paging in CPUID.
    pub la57: bool,
    /// Protection keys in CPUID. KVM offers them only with nested paging, so no profile has them
    /// (`kvm_set_cpu_caps`, 6.1); the rules are there to look at.
    pub pku: bool,
    /// Whose reserved bits hold.
    pub vendor: Vendor,
    /// Guest physical address bits.
    pub maxphyaddr: u32,
}

/// The name of a profile, read by its bytes.
fn profile_name<'de, D: Deserializer<'de>>(from: D) -> Result<Name, D::Error> {
    let name = <&str>::deserialize(from)?;
    CpuFeatures::named(name).map(|cpu| cpu.name).map_err(D::Error::custom)
}

/// AMD Zen and later: all that hardware does.
pub const ZEN: CpuFeatures = CpuFeatures {
    name: "zen",
    nrips: true,
    decode_assists: true,
    rsvd_sets_p: true,
    rmw_reads_first: false,
    gbpages: true,
    pcid: true,
    invpcid: true,
    la57: true,
    pku: false,
    vendor: Vendor::Amd,
    maxphyaddr: 48,
};

/// QEMU's EPYC model under TCG, on which real KVM was recorded (section 19 of the specification).
pub const QEMU_TCG: CpuFeatures = CpuFeatures {
    name: "qemu-tcg",
    nrips: false,
    decode_assists: false,
    rsvd_sets_p: false,
    rmw_reads_first: true,
    gbpages: true,
    pcid: false,
    invpcid: false,
    la57: false,
    pku: false,
    vendor: Vendor::Amd,
    maxphyaddr: 40,
};

/// Every profile.
pub const PROFILES: [&CpuFeatures; 2] = [&ZEN, &QEMU_TCG];

impl CpuFeatures {
    /// The profile of that name.
    ///
    /// # Errors
    /// A name that is none of [`PROFILES`].
    pub fn named(name: &str) -> Result<Self, ConfigError> {
        PROFILES.iter().find(|p| p.name == name).map_or_else(
            || refuse!("profile {name:?} is not known; choose one of {}", PROFILES.map(|p| p.name).join(", ")),
            |p| Ok(**p),
        )
    }
}

impl CpuFeatures {
    /// The same CPU with one feature changed, by the name of its field and a value in words: true or false, a number of
    /// bits (maxphyaddr), a maker (vendor).
    ///
    /// # Errors
    /// An unknown name, or a value that the feature cannot have.
    pub fn with(mut self, name: &str, value: &str) -> Result<Self, ConfigError> {
        let flag = match name {
            "nrips" => &mut self.nrips,
            "decode_assists" => &mut self.decode_assists,
            "rsvd_sets_p" => &mut self.rsvd_sets_p,
            "rmw_reads_first" => &mut self.rmw_reads_first,
            "gbpages" => &mut self.gbpages,
            "pcid" => &mut self.pcid,
            "invpcid" => &mut self.invpcid,
            "la57" => &mut self.la57,
            "pku" => &mut self.pku,
            "maxphyaddr" => return self.with_maxphyaddr(value),
            "vendor" => {
                self.vendor = match value {
                    "amd" => Vendor::Amd,
                    "intel" => Vendor::Intel,
                    _ => return refuse!("feature vendor: {value:?} must be amd or intel"),
                };
                return Ok(self);
            }
            _ => {
                return refuse!(
                    "feature {name:?} is not known; choose nrips, decode_assists, rsvd_sets_p, rmw_reads_first, gbpages, \
                     pcid, invpcid, la57, pku, maxphyaddr or vendor"
                );
            }
        };
        *flag = match value {
            "true" => true,
            "false" => false,
            _ => return refuse!("feature {name}: {value:?} must be true or false"),
        };
        Ok(self)
    }

    fn with_maxphyaddr(self, value: &str) -> Result<Self, ConfigError> {
        match value.parse() {
            Ok(maxphyaddr) if MAXPHYADDR.contains(&maxphyaddr) => Ok(Self { maxphyaddr, ..self }),
            _ => refuse!("feature maxphyaddr: {value:?} must be {} to {} bits", MAXPHYADDR.start(), MAXPHYADDR.end()),
        }
    }
}

/// All settings of a VM that do not change while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Config {
    /// What the CPU offers.
    pub cpu: CpuFeatures,
    /// Which kernel's rules hold.
    pub kernel: Kernel,
    /// Guest huge pages are split when the guest executes from them (`nx_huge_pages`).
    pub nx_huge_pages: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { cpu: ZEN, kernel: LINUX_6_1, nx_huge_pages: false }
    }
}
