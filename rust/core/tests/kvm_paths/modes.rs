//! CR0.WP, SMEP, SMAP, NX: rights that the guest's tables alone do not decide.

use crate::guest::Guest;
use crate::{check, start, trace};
use shadowkvm_core::memory::HostState;

#[test]
fn without_write_protect_a_page_alternates_between_supervisor_and_user() {
    let mut guest = start("6190=432065; 6198=433065");
    let ops = "W 432000=1; CR0 80000033; W 432000=1; UR 432000; W 432000=1; UW 432000=0; CR0 80010033; W 432000=1";
    check(&mut guest, ops, "tk11 fx8 gu3 cm9 4k48 rf1 tf1 ie3 rm1");
    assert_eq!(guest.faults, [3, 7, 3]);
    trace(
        &guest,
        5,
        &[
            "PF 432000 err 2 · walk 432000/2 · get 6/l1 wux new · req 432 L1 · set 432:e63 430:e43 431:e43 433:a05 434:e43 \
             435:e43 436:e43 437:e43",
            "PF 220000 err 14 · walk 220000/14 · req 220 L1 · set 220:e67 221:e43 222:e43 223:e43 224:e43 225:e43 226:e43 \
             227:e43",
            "PF 432000 err 5 · walk 432000/5 · req 432 L1 · set 432:a25",
            "PF 432000 err 3 · walk 432000/3 · req 432 L1 · set 432:e63",
            "PF 432000 err 7 · walk 432000/7 · werr 7 · inj #PF (0x7)",
            "write_cr0 · walk 200136/10 · emu · get 1/l4 wux existing",
        ],
    );
}

#[test]
fn smep_and_smap_guard_user_pages() {
    let mut guest = Guest::new("6190=432065", HostState::Writable, |regs| {
        regs.cr0 = 0x8000_0033;
        regs.cr4 = 0x10_0020;
    });
    let ops = "W 432000=1; CALL 432000; CR0 80010033; R 432000; CR4 20; R 432000; CR4 200020; R 432000; RAC 432000";
    check(&mut guest, ops, "tk8 fx6 gu2 cm10 4k48 ie4 rm1");
    assert_eq!(guest.faults, [0x11, 1]);
}

#[test]
fn a_page_that_must_not_be_executed_is_not() {
    let mut guest = start("6190=8000000000432063; 432000=c3; 433000=c3");
    check(&mut guest, "R 432000; CALL 432000; CALL 433000", "tk4 fx3 gu1 cm5 4k24 ie1");
    assert_eq!(guest.faults, [0x11]);
}

#[test]
fn role_bits_reload_roots_and_others_do_not() {
    let ops = "R 400000; W 6048=409063; CR4 a0; CR4 20; R 400000; CR4 100020; R 400000; EFER 500; R 400000; \
               CR0 80010013; CR4 30";
    check(&mut start(""), ops, "tk4 fx4 cm6 4k32 rf2 tf4 ie7");
}
