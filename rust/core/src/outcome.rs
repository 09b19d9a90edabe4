//! What came of one operation.

use crate::types::ErrorCode;

/// KVM's result of the fault handler (`RET_PF_*`, Linux 6.1), with its numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RetPf {
    /// Not decided yet; the next step of the handler goes on.
    Continue = 0,
    /// Let the guest run the instruction again.
    Retry = 1,
    /// The instruction must be emulated.
    Emulate = 2,
    /// The MMIO entry is stale; the ordinary path must run.
    Invalid = 3,
    /// The shadow was repaired.
    Fixed = 4,
    /// The shadow was right already.
    Spurious = 5,
    /// The page is write-protected for shadow paging: unprotect it or emulate (6.1 has no name of its own for it).
    WriteProtected = 6,
}

/// How an operation ended, seen from the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Status {
    /// It was carried out.
    #[default]
    Done = 0,
    /// The guest gets #PF with `error_code`, CR2 = `address`.
    PageFault = 1,
    /// It was an access to memory without a slot (or a store to a read-only slot) at gpa `address`.
    Mmio = 2,
    /// The guest gets #GP.
    GeneralProtection = 3,
    /// The vCPU shut down (triple fault).
    Shutdown = 4,
    /// The guest gets #UD: the instruction could not be fetched for emulation.
    InvalidOpcode = 5,
    /// As `InvalidOpcode`, at CPL 0: `KVM_RUN` returns `KVM_EXIT_INTERNAL_ERROR`.
    InternalError = 6,
    /// The instruction faults again for ever; the engine gave up after [`crate::config::MAX_RESUMES`] rounds.
    Livelock = 7,
    /// The guest gets #DF: a #PF while a #PF was delivered, CR2 = `address`.
    DoubleFault = 8,
}

impl Status {
    /// Every status, in the order of its number.
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::PageFault,
        Self::Mmio,
        Self::GeneralProtection,
        Self::Shutdown,
        Self::InvalidOpcode,
        Self::InternalError,
        Self::Livelock,
        Self::DoubleFault,
    ];

    /// The name that the Python face shows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::PageFault => "page_fault",
            Self::Mmio => "mmio",
            Self::GeneralProtection => "general_protection",
            Self::Shutdown => "shutdown",
            Self::InvalidOpcode => "invalid_opcode",
            Self::InternalError => "internal_error",
            Self::Livelock => "livelock",
            Self::DoubleFault => "double_fault",
        }
    }
}

/// What came of one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// The value that was loaded (loads and read-modify-writes: the old value), else 0.
    pub value: u64,
    /// The error code of a fault that the guest gets.
    pub error_code: u32,
    /// CR2 of a page fault, gpa of an MMIO access, else 0.
    pub address: u64,
}

impl Outcome {
    /// Carried out, with the value that was loaded.
    #[must_use]
    pub const fn done(value: u64) -> Self {
        Self { status: Status::Done, value, error_code: 0, address: 0 }
    }

    /// Ended without a value.
    #[must_use]
    pub const fn of(status: Status) -> Self {
        Self { status, value: 0, error_code: 0, address: 0 }
    }

    /// A guest page fault.
    #[must_use]
    pub const fn page_fault(address: u64, code: ErrorCode) -> Self {
        Self { status: Status::PageFault, value: 0, error_code: code.0 as u32, address }
    }
}
