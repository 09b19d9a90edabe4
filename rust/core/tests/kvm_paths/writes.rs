//! Stores to page tables: emulation, flooding, misaligned and odd ones, retry, zapping.

use crate::guest::Guest;
use crate::{check, start, trace};
use shadowkvm_core::memory::HostState;

const D2: &str = "2008=20063; 20000=6063";

#[test]
fn writes_to_a_directory_through_itself_never_flood() {
    let mut guest = start("");
    let ops = "R 400000; W 3040=c063; W 3048=d063; W 3050=d063; W 3058=d063; W 3060=d063; R 400000";
    check(&mut guest, ops, "tk8 fx3 em5 pw5 pd5 cm6 4k32 ie6");
    trace(
        &guest,
        1,
        &[
            "PF 400000 err 0 · walk 400000/0 · get 6/l1 wux new · req 400 L1 · set 400:e63 401:e43 402:e43 403:e43 \
             404:e43 405:e43 406:e43 407:e43",
            "PF 3040 err 2 · walk 3040/2 · get 4/l1 wux new · req 3 L1 · set 3:a21 0:e43 1:a01 2:a01 4:a01 5:a01 6:a01 \
             7:e43 · walk 200116/10 · emu · walk 3040/2",
            "PF 3048 err 3 · walk 3048/3 · walk 200116/10 · emu · walk 3048/2",
        ],
    );
}

#[test]
fn the_third_write_without_a_use_floods() {
    let mut guest = start(D2);
    let ops = "R 40000000; W 20020=7063 x5 +8; R 40000000";
    check(&mut guest, ops, "tk8 fx5 em3 zap1 pw3 pd2 fl1 cm8 4k32 rf3 tf2 ie4");
    trace(
        &guest,
        3,
        &[
            "PF 20028 err 3 · walk 20028/3 · walk 200116/10 · emu · walk 20028/2",
            "PF 20030 err 3 · walk 20030/3 · walk 200116/10 · emu · walk 20030/2 · ZAP 20/l2 w-x",
            "PF 20038 err 3 · walk 20038/3 · req 20 L1 · set 20:e63",
            "PF 40000000 err 0 · walk 40000000/0 · get 20/l2 w-x new · get 6/l1 w-x existing · req 400 L1 · set 400:e23",
        ],
    );
}

#[test]
fn a_use_in_between_starts_the_count_again() {
    let ops =
        "R 40000000; W 20020=7063; W 20028=7063; R 40008000; W 20030=7063; W 20038=7063; W 20040=7063; R 40000000";
    check(&mut start(D2), ops, "tk10 fx5 em5 zap1 pw5 pd4 fl1 cm8 4k40 rf2 tf2 ie6");
}

#[test]
fn a_misaligned_write_zaps_and_half_an_entry_does_not() {
    let ops = "R 400000; W8 30a0=0; R 400000; W8 30a1=0; R 400000; W32 30a0=0; R 400000; W32 30a4=0; R 400000; \
               W16 30a8=0; R 400000; W 30b4=0; R 400000";
    check(&mut start(""), ops, "tk15 fx5 em6 sp4 zap3 pw6 fl3 cm9 4k32 rf5 tf5 ie7");
}

#[test]
fn what_does_not_write_page_tables_is_tried_again_first() {
    let mut guest = start("");
    let ops = "R 400000; XCHG 30a0=0; R 401000; LCMPXCHG 30a0=f063,0; R 408000; LCMPXCHG 30a0=f063,5; R 410000; \
               LOR 30a0=200; R 418000; ADDM 30a0=1000; R 420000";
    check(&mut guest, ops, "tk16 fx9 em6 sp1 zap1 pw5 pd4 cm7 4k64 rf2 tf2 ie7");
    trace(
        &guest,
        10,
        &[
            "PF 30a0 err 3 · walk 30a0/3 · walk 200166/10 · emu · walk 30a0/2 · ZAP 3/l2 wux",
            "PF 200166 err 10 · walk 200166/10 · get 3/l2 wux new · get 5/l1 wux existing · req 200 L1 · set 200:e23",
            "PF 30a0 err 0 · walk 30a0/0 · get 4/l1 wux existing · req 3 L1",
            "PF 30a0 err 3 · walk 30a0/3 · walk 200166/10 · emu · walk 30a0/0 · walk 30a0/2",
        ],
    );
}

#[test]
fn push_sse_and_rep_stos_are_tried_again_and_a_rep_floods() {
    let mut guest = Guest::new("", HostState::Writable, |regs| regs.cr4 = 0x220);
    let ops = "R 400000; PUSH 30a0=0; R 400000; MOVAPS 30b0; R 400000; REPSTOS 30c0=0,4; R 400000";
    check(&mut guest, ops, "tk17 fx5 em6 sp6 zap5 pw6 fl2 cm11 4k32 rf7 tf7 ie7");
}

#[test]
fn zapping_a_directory_takes_its_unsync_tables_along() {
    let mut guest = start("");
    check(
        &mut guest,
        "R 400000; W 6008=500063; W8 30a1=0; R 402000; W 6018=500063; R 403000",
        "tk8 fx7 em1 zap2 pw1 fl1 cm8 un1 4k32 rf3 tf3 ie2",
    );
    trace(
        &guest,
        3,
        &["PF 30a1 err 3 · walk 30a1/3 · walk 20011f/10 · emu · walk 30a1/2 · ZAP 3/l2 wux · ZAP 6/l1 wux uns · \
           SYNC 6/l1 wux"],
    );
}

#[test]
fn a_root_is_zapped_twice() {
    let mut guest = start("");
    check(
        &mut guest,
        "R 400000; W8 1049=0; R 400000; W 1048=0; R 400000",
        "tk6 fx4 em2 zap2 pw2 fl1 cm7 4k32 rf2 tf2 ie3",
    );
    trace(
        &guest,
        2,
        &["PF 1049 err 2 · walk 1049/2 · get 4/l1 wux new · req 1 L1 · set 1:a21 0:e43 2:a01 3:a01 4:a01 5:a01 6:a01 \
           7:e43 · walk 20011f/10 · emu · walk 1049/2 · ZAP 1/l4 wux root1 · ZAP 1/l4 wux inv · get 1/l4 wux new"],
    );
}

#[test]
fn an_unsync_table_that_becomes_a_directory_is_zapped() {
    let ops = "R 400000; W 6008=500063; W 2008=6063; R 40000000; R 403000; W 6008=401063; R 404000; CR3 1000";
    check(&mut start("400000=500063"), ops, "tk8 fx6 em2 zap1 pw2 pd2 cm9 4k32 rf3 tf3 ie4 rm1");
}
