//! The operand of an instruction in guest memory, once every page of it is there and allows the access.

use crate::fault::insn::{Action, Insn, mask, slice};
use crate::memory::Host;
use crate::types::{Gfn, Gpa};

/// The frames of an operand's one or two pages; `None` is the zero page.
type Frames = [Option<Gfn>; 2];

/// The load, store, or both. Returns what was loaded.
#[inline]
pub(crate) fn touch(host: &mut Host, insn: &Insn, frames: Frames) -> u64 {
    match insn.action {
        Action::Fetch | Action::Copy => 0,
        Action::Load => load(host, insn, frames),
        Action::Store if insn.keep => 0,
        Action::Store => {
            store(host, insn, frames, insn.wide(insn.value));
            0
        }
        Action::Rmw(_) => {
            let old = load(host, insn, frames);
            let (new, equal) = insn.compute(old);
            // What CMPXCHG16B compares with has a clear upper half; a failed exchange leaves memory alone.
            if insn.size <= 8 || equal && (insn.expected.is_none() || load_high(host, insn, frames) == 0) {
                store(host, insn, frames, u128::from(new));
            }
            old
        }
    }
}

#[inline]
pub(super) fn load(host: &Host, insn: &Insn, frames: Frames) -> u64 {
    let [(gva, size), (_, rest)] = insn.pieces();
    let at = |frame: Option<Gfn>, offset: u64, size: u8| {
        frame.map_or(0, |gfn| host.read(Gpa(gfn.gpa().0 | offset), size.min(8)))
    };
    let mut value = at(frames[0], gva.offset(), size);
    if rest != 0 && size < 8 {
        value |= at(frames[1], 0, rest) << (size * 8);
    }
    value & mask(insn.size)
}

/// The upper half of a 16-byte operand, which CMPXCHG16B wants aligned, hence on one page.
fn load_high(host: &Host, insn: &Insn, frames: Frames) -> u64 {
    let gpa = |gfn: Gfn| Gpa((gfn.gpa().0 | insn.gva.offset()) + 8);
    frames[0].map_or(0, |gfn| host.read(gpa(gfn), 8))
}

#[inline]
pub(super) fn store(host: &mut Host, insn: &Insn, frames: Frames, value: u128) {
    let [(gva, size), (_, rest)] = insn.pieces();
    store_piece(host, frames[0], gva.offset(), size, value, 0);
    if rest != 0 {
        store_piece(host, frames[1], 0, rest, value, size);
    }
}

/// Stores `size` bytes of the operand from its byte `from` on. A writable entry never maps the zero page.
fn store_piece(host: &mut Host, frame: Option<Gfn>, offset: u64, size: u8, value: u128, from: u8) {
    let Some(gfn) = frame else { return };
    host.write_wide(Gpa(gfn.gpa().0 | offset), size, slice(value, from, size));
}
