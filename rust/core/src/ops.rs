//! The operations of a trace: code, name, meaning, and the row that carries them.

use crate::error::TraceError;

macro_rules! ops {
    ($($code:literal $name:ident $text:literal $doc:literal;)*) => {
        /// One kind of operation; the number is its code in a trace.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum OpCode {
            $(#[doc = $doc] $name = $code,)*
        }

        /// Code, name and meaning of every operation.
        pub const OPS: &[(u8, &str, &str)] = &[$(($code, $text, $doc),)*];

        impl OpCode {
            /// The operation with that code.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

ops! {
    0 Read "READ" "load of `size` bytes at gva `addr`";
    1 Write "WRITE" "store (MOV) of `value`, `size` bytes, at gva `addr`";
    2 Fetch "FETCH" "instruction fetch at gva `addr`";
    3 Or "OR" "locked OR of `value` at gva `addr`";
    4 And "AND" "locked AND of `value` at gva `addr`";
    5 Xor "XOR" "locked XOR of `value` at gva `addr`";
    6 Add "ADD" "locked ADD of `value` at gva `addr`";
    7 Xchg "XCHG" "XCHG of `value` at gva `addr`";
    8 Cmpxchg "CMPXCHG" "locked CMPXCHG that compares equal and stores `value` at gva `addr`";
    9 Store "STORE" "store by an instruction that does not count as writing page tables (PUSH, STOS, SSE)";
    10 Invlpg "INVLPG" "INVLPG of gva `addr`";
    11 Cr0 "CR0" "MOV of `value` to CR0";
    12 Cr3 "CR3" "MOV of `value` to CR3";
    13 Cr4 "CR4" "MOV of `value` to CR4";
    14 Efer "EFER" "WRMSR of `value` to EFER";
    15 Hlt "HLT" "HLT: an exit and a skip";
    16 Io "IO" "IN or OUT: an exit to user space";
    17 Page "PAGE" "the host writes page number `value` of the recording to gpa `addr`";
    18 Mark "MARK" "a mark of the recording, no effect";
    19 Intr "INTR" "an interrupt with vector `value` was delivered, no effect of its own";
    20 Clts "CLTS" "CLTS: does not exit, no effect";
    21 HostWrite "HOST_WRITE" "the host writes `size` bytes of `value` at gpa `addr`";
    22 GetDirtyLog "GET_DIRTY_LOG" "KVM_GET_DIRTY_LOG of slot `value`";
    23 SetDirtyLog "SET_DIRTY_LOG" "dirty logging of slot `addr` on (`value` 1) or off (0)";
    24 Unmap "UNMAP" "the host drops `value` bytes at gpa `addr` (MMU notifier)";
    25 Quota "QUOTA" "KVM_SET_NR_MMU_PAGES `value`";
    26 SlotAdd "SLOT_ADD" "memslot `size` of `value` bytes at gpa `addr`; flags bit 0 read-only, bit 1 dirty log";
    27 SlotDel "SLOT_DEL" "memslot `size` is deleted";
}

/// Flag: the access is made at CPL 3.
pub const FLAG_USER: u8 = 1;
/// Flag: EFLAGS.AC is set.
pub const FLAG_AC: u8 = 4;
/// Flag: the recording says that the access went to a device (information only).
pub const FLAG_MMIO: u8 = 8;
/// Flag: a supervisor access that the CPU makes by itself.
pub const FLAG_IMPLICIT: u8 = 16;
/// Flag: an access of event delivery; `FLAG_USER` is then the CPL before it.
pub const FLAG_DELIVERY: u8 = 32;
/// Flag: the store leaves memory as it is (its value is not known).
pub const FLAG_KEEP: u8 = 64;
/// Flag: in the recorded guest this access took a guest #PF; `value` is its error code.
pub const FLAG_FAULTS: u8 = 128;

/// Bytes of one row: op u1, size u1, flags u1, vcpu u1, site u4, addr u8, value u8, little-endian, packed.
pub const ROW_BYTES: usize = 24;

/// One row of a trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// What is done.
    pub op: OpCode,
    /// Operand size in bytes (slot operations: the slot number).
    pub size: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Which vCPU.
    pub vcpu: u8,
    /// Index into the table of instruction addresses, 0 = none.
    pub site: u32,
    /// Address.
    pub addr: u64,
    /// Value.
    pub value: u64,
}

impl Row {
    /// Decodes the bytes of a row.
    ///
    /// # Errors
    /// An operation code that does not exist; the error names `index`.
    #[inline]
    pub fn decode(bytes: &[u8; ROW_BYTES], index: u64) -> Result<Self, TraceError> {
        let [head, addr, value] = *bytes.as_chunks::<8>().0 else { unreachable!("24 bytes are three words") };
        let head = u64::from_le_bytes(head);
        let Some(op) = OpCode::from_code(head as u8) else {
            return Err(TraceError {
                index,
                reason: format!("op code {} does not exist (0 to {})", bytes[0], OPS.len() - 1),
            });
        };
        Ok(Self {
            op,
            size: (head >> 8) as u8,
            flags: (head >> 16) as u8,
            vcpu: (head >> 24) as u8,
            site: (head >> 32) as u32,
            addr: u64::from_le_bytes(addr),
            value: u64::from_le_bytes(value),
        })
    }

    /// The bytes of the row.
    #[must_use]
    pub fn encode(&self) -> [u8; ROW_BYTES] {
        let mut out = [0; ROW_BYTES];
        out[..4].copy_from_slice(&[self.op as u8, self.size, self.flags, self.vcpu]);
        out[4..8].copy_from_slice(&self.site.to_le_bytes());
        out[8..16].copy_from_slice(&self.addr.to_le_bytes());
        out[16..].copy_from_slice(&self.value.to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_rows_survive_a_round_trip() {
        for (i, (code, _, _)) in OPS.iter().enumerate() {
            assert_eq!(usize::from(*code), i);
            let row = Row {
                op: OpCode::from_code(*code).unwrap(),
                size: 8,
                flags: 5,
                vcpu: 2,
                site: 7,
                addr: 1 << 47,
                value: !0,
            };
            assert_eq!(Row::decode(&row.encode(), 0), Ok(row));
        }
        let err = Row::decode(&[200; ROW_BYTES], 41).unwrap_err();
        assert_eq!(err.index, 41);
    }
}
