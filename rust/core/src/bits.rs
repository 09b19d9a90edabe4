//! Bits of page-table entries and control registers, under their usual names (SDM vol. 3 chapters 2 and 4).

/// Entry bit: present.
pub const PT_P: u64 = 1;
/// Entry bit: writable.
pub const PT_W: u64 = 1 << 1;
/// Entry bit: usable by user mode.
pub const PT_U: u64 = 1 << 2;
/// Entry bit: accessed.
pub const PT_A: u64 = 1 << 5;
/// Entry bit: dirty.
pub const PT_D: u64 = 1 << 6;
/// Entry bit: large page.
pub const PT_PS: u64 = 1 << 7;
/// Entry bit: global.
pub const PT_G: u64 = 1 << 8;
/// Entry bit: not executable.
pub const PT_NX: u64 = 1 << 63;
/// The address bits of an entry, 12 to 51.
pub const PT_ADDR: u64 = 0x000f_ffff_ffff_f000;

/// CR0: protection enabled.
pub const CR0_PE: u64 = 1;
/// CR0: extension type, always one on the CPUs modelled.
pub const CR0_ET: u64 = 1 << 4;
/// CR0: monitor coprocessor.
pub const CR0_MP: u64 = 1 << 1;
/// CR0: task switched.
pub const CR0_TS: u64 = 1 << 3;
/// CR0: supervisor writes obey W.
pub const CR0_WP: u64 = 1 << 16;
/// CR0: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0: cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;

/// CR3: with CR4.PCIDE, a load keeps the TLB's entries.
pub const CR3_NOFLUSH: u64 = 1 << 63;

/// CR4: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4: 8-byte entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4: 57-bit addresses.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4: supervisor may not execute user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4: supervisor may not touch user pages.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4: protection keys.
pub const CR4_PKE: u64 = 1 << 22;

/// EFER: SYSCALL enabled.
pub const EFER_SCE: u64 = 1;
/// EFER: long mode enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER: NX enabled.
pub const EFER_NX: u64 = 1 << 11;
/// EFER: fast FXSAVE.
pub const EFER_FFXSR: u64 = 1 << 14;
/// EFER bits that a guest may set.
pub const EFER_ALLOWED: u64 = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX | EFER_FFXSR;

/// CR4 bits that every guest here may set: 0 to 10, UMIP, FSGSBASE, OSXSAVE, SMEP, SMAP.
pub const CR4_ALWAYS: u64 = 0x7ff | 1 << 11 | 1 << 16 | 1 << 18 | CR4_SMEP | CR4_SMAP;
/// CR0 bits that exist; the others are dropped when CR0 is written.
pub const CR0_KNOWN: u64 =
    CR0_PE | CR0_MP | 1 << 2 | CR0_TS | CR0_ET | 1 << 5 | CR0_WP | 1 << 18 | CR0_NW | CR0_CD | CR0_PG;

/// The bits `low` to `high`, none if `low` is above `high`.
#[must_use]
pub const fn bit_range(low: u32, high: u32) -> u64 {
    if low > high { 0 } else { (!0 >> (63 - high)) & (!0 << low) }
}
