//! The text form of the kernel's lines.

use super::{EXIT_REASONS, Event, EventKind};
use crate::bits::PT_W;
use crate::role::Role;
use crate::types::ErrorCode;
use std::fmt;

impl fmt::Display for Event {
    /// The kernel's line: tracepoint name, colon, text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.kind.name())?;
        match self.kind {
            EventKind::Exit | EventKind::PageFault | EventKind::EmulateInsn | EventKind::InjException => {
                self.exit_text(f)
            }
            EventKind::PagetableWalk
            | EventKind::PagingElement
            | EventKind::SetAccessedBit
            | EventKind::SetDirtyBit
            | EventKind::WalkerError => self.walk_text(f),
            EventKind::GetPage => {
                self.page_text(f)?;
                f.write_str(if self.flag & 2 != 0 { " new" } else { " existing" })
            }
            EventKind::SyncPage | EventKind::UnsyncPage | EventKind::PrepareZapPage => self.page_text(f),
            EventKind::SpteRequested
            | EventKind::SetSpte
            | EventKind::FastPageFault
            | EventKind::ZapAllFast
            | EventKind::UnmapHvaRange
            | EventKind::SetSpteHva => self.spte_text(f),
            EventKind::MarkMmioSpte
            | EventKind::HandleMmioPageFault
            | EventKind::CheckMmioSpte
            | EventKind::MatchMmio
            | EventKind::Mmio => self.mmio_text(f),
        }
    }
}

impl Event {
    const fn error_code(&self) -> ErrorCode {
        ErrorCode(self.code as u64)
    }

    fn exit_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::Exit => {
                let reason = EXIT_REASONS.get(self.code as usize).copied().unwrap_or("unknown");
                write!(f, "vcpu {} reason {reason} rip 0x{:x} info1 0x{:016x}", self.vcpu, self.a, self.b)
            }
            EventKind::PageFault => {
                write!(
                    f,
                    "vcpu {} rip 0x{:x} address 0x{:016x} error_code 0x{:x}",
                    self.vcpu, self.a, self.b, self.code
                )
            }
            EventKind::EmulateInsn => {
                write!(f, "0:{:x}: (prot64){}", self.a, if self.flag != 0 { " failed" } else { "" })
            }
            _ => self.exception_text(f),
        }
    }

    fn walk_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::PagetableWalk => write!(f, "addr {:x} pferr {:x} {}", self.a, self.code, self.error_code()),
            EventKind::PagingElement => write!(f, "pte {:x} level {}", self.a, self.level),
            EventKind::WalkerError => write!(f, "pferr {:x} {}", self.code, self.error_code()),
            _ => write!(f, "gpa {:x}", self.a),
        }
    }

    fn spte_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::SpteRequested => write!(f, "gfn {:x} pfn {:x} level {}", self.a, self.b, self.level),
            EventKind::SetSpte => {
                let flag = |there: bool, letter: &'static str| if there { letter } else { "-" };
                let (w, x, u) = (flag(self.b & 2 != 0, "w"), flag(self.b >> 63 == 0, "x"), flag(self.b & 4 != 0, "u"));
                write!(f, "gfn {:x} spte {:x} (r{w}{x}{u}) level {} at {:x}", self.a, self.b, self.level, self.c)
            }
            EventKind::FastPageFault => {
                let (spurious, fixed) = (self.flag & 1, self.flag >> 1);
                let new = if fixed == 1 { self.b | PT_W } else { self.b };
                write!(f, "vcpu {} gva {:x} error_code {} ", self.vcpu, self.a, self.error_code())?;
                write!(f, "sptep {:016x} old {:#x} new {new:x} spurious {spurious} fixed {fixed}", self.c, self.b)
            }
            EventKind::ZapAllFast => write!(f, "kvm-mmu-valid-gen {} used_pages {:x}", self.level, self.a),
            EventKind::UnmapHvaRange => write!(f, "mmu notifier unmap range: 0x{:014x} -- 0x{:014x}", self.a, self.b),
            _ => write!(f, "mmu notifier set pte hva: 0x{:014x}", self.a),
        }
    }

    fn mmio_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::MarkMmioSpte => {
                write!(f, "sptep:{:016x} gfn {:x} access {:x} gen {:x}", self.a, self.b, self.code, self.c)
            }
            EventKind::HandleMmioPageFault => write!(f, "addr:{:x} gfn {:x} access {:x}", self.a, self.b, self.code),
            EventKind::CheckMmioSpte => {
                let valid = u8::from(self.b == self.c);
                write!(f, "spte {:x} kvm_gen {:x} spte-gen {:x} valid {valid}", self.a, self.b, self.c)
            }
            EventKind::MatchMmio => {
                let how = if self.flag & 1 != 0 { "Write" } else { "Read" };
                let by = if self.flag & 2 != 0 { "GPA" } else { "GVA" };
                write!(f, "gva {:#x} gpa {:#x} {how} {by}", self.a, self.b)
            }
            _ => {
                let what = ["unsatisfied-read", "read", "write"][usize::from(self.flag) % 3];
                write!(f, "mmio {what} len {} gpa {:#x} val {:#x}", self.level, self.a, self.b)
            }
        }
    }

    fn page_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.flag & 1 != 0 { "unsync" } else { "sync" };
        write!(f, "sp gen {} gfn {:x} {} root {} {state}", self.level, self.a, Role(self.code), self.b)
    }

    fn exception_text(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            14 => write!(f, "#PF (0x{:x})", self.code)?,
            13 => write!(f, "#GP (0x{:x})", self.code)?,
            3 => f.write_str("#BP")?,
            6 => f.write_str("#UD")?,
            8 => f.write_str("#DF (0x0)")?,
            other => write!(f, "vector {other}")?,
        }
        f.write_str(if self.flag != 0 { " [reinjected]" } else { "" })
    }
}
