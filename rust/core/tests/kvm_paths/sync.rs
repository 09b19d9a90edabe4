//! Unsync tables and what brings them into step: CR3 loads, INVLPG, guest faults, roots that come back.

use crate::{check, start, trace};

#[test]
fn a_table_goes_out_of_step_and_comes_back() {
    let mut guest = start("");
    let ops = "R 400000; R 464000; W 6320=464063; W 6320=500063; R 464000; INV 464000; R 464000; W 6328=501063; \
               CR3 1000; R 465000; W 6330=0; CR3 1000; R 466000";
    check(&mut guest, ops, "tk8 fx7 gu1 cm6 4k39 rf5 tf3 iv1 ie4");
    trace(
        &guest,
        3,
        &[
            "PF 6320 err 2 · walk 6320/2 · get 4/l1 wux new · req 6 L1 · UNSYNC 6/l1 wux · set 6:e63 0:e43 1:a01 2:a01 \
             3:a01 4:a01 5:a01 7:e43",
            "invlpg · walk 200128/10 · emu · set 500:e43",
            "write_cr3 · walk 20012d/10 · emu · SYNC 6/l1 wux",
            "PF 465000 err 0 · walk 465000/0 · req 501 L1 · set 501:e63",
            "PF 6330 err 3 · walk 6330/3 · req 6 L1 · UNSYNC 6/l1 wux · set 6:e63",
            "write_cr3 · walk 20012d/10 · emu · SYNC 6/l1 wux",
            "PF 466000 err 0 · walk 466000/0 · werr 0 · inj #PF (0x0)",
        ],
    );
}

#[test]
fn sync_keeps_drops_and_weakens_entry_by_entry() {
    let mut guest = start("");
    let ops = "R 400000 x8 +1000; W 6000=400061; W 6008=401003; W 6010=402023; W 6018=402063; \
               W 6020=8000000000404063; W 6028=405067; W 6030=0; W 6038=200000407063; CR3 1000; W 400000=0 x8 +1000";
    check(&mut guest, ops, "tk9 fx6 gu3 cm6 4k30 rf2 tf1 ie2 rm1");
    assert_eq!(guest.faults, [3, 2, 0xb]);
    trace(
        &guest,
        4,
        &[
            "PF 400000 err 3 · walk 400000/3 · werr 3 · inj #PF (0x3)",
            "PF 401000 err 2 · walk 401000/2 · setA 6008 · setD 6008 · req 401 L1 · set 401:e63 402:e43",
            "PF 402000 err 3 · walk 402000/3 · setD 6010 · req 402 L1 · set 402:e63",
            "PF 406000 err 2 · walk 406000/2 · werr 2 · inj #PF (0x2)",
        ],
    );
}

#[test]
fn twenty_unsync_tables_are_synced_in_batches_of_thirteen() {
    let mut guest = start("3320=100063 x20 +8 +1000; 100000=300063 x20 +1000");
    let ops = "R c800000 x20 +200000; W 100008=301063 x20 +1000; CR3 1000";
    check(&mut guest, ops, "tk42 fx42 cm25 4k60 rf3 tf1 ie2 rm19");
}

#[test]
fn thirteen_fit_in_one_batch() {
    let mut guest = start("3320=100063 x13 +8 +1000; 100000=300063 x13 +1000");
    let ops = "R c800000 x13 +200000; W 100008=301063 x13 +1000; CR3 1000; W 100008=301063 x12 +1000; CR3 1000";
    check(&mut guest, ops, "tk40 fx40 cm18 4k45 rf3 tf2 ie3 rm12");
}

#[test]
fn one_current_and_three_previous_roots_are_kept() {
    let mut guest = start("31000=2067; 32000=2067; 33000=2067; 34000=2067");
    let ops = "CR3 31000; CR3 32000; CR3 33000; CR3 34000; CR3 1000; CR3 34000; CR3 33000; W 400000=0; W 6048=409063; \
               CR3 34000; CR3 33000";
    check(&mut guest, ops, "tk8 fx5 sp3 cm10 4k32 rf3 tf10 ie10");
    trace(
        &guest,
        7,
        &[
            "write_cr3 · walk 20012d/10 · emu · get 34/l4 wux new",
            "PF 200130 err 10 · walk 200130/10 · get 2/l3 wux existing · req 200 L1",
            "write_cr3 · walk 20012d/10 · emu · get 1/l4 wux existing",
            "write_cr3 · walk 20012d/10 · emu",
            "write_cr3 · walk 20012d/10 · emu",
        ],
    );
}

#[test]
fn a_guest_fault_refreshes_the_entry_of_an_unsync_table() {
    let mut guest = start("6010=402061");
    let ops = "R 400000; W 6008=500063; W 402000=0; W 6010=402063; W 402000=1; W 6018=61; W 403000=1";
    check(&mut guest, ops, "tk6 fx5 gu1 cm6 un1 4k32 rf1 tf1 ie1");
    trace(
        &guest,
        3,
        &[
            "PF 402000 err 3 · walk 402000/3 · werr 3 · set 402:a01 · inj #PF (0x3)",
            "PF 402000 err 3 · walk 402000/3 · req 402 L1 · set 402:e63",
        ],
    );
}

#[test]
fn one_table_under_two_roles_goes_out_of_step_newest_first() {
    let mut guest = start("3040=6065; 3048=6067");
    let ops = "R 400000; R 1000000; R 1200000; W 6008=500063; R 1002000; INV 401000; R 401000; CR3 1000; R 401000; \
               R 1001000";
    check(&mut guest, ops, "tk7 fx7 cm7 4k40 rf4 tf3 iv1 ie3 rm1");
    trace(
        &guest,
        4,
        &["PF 6008 err 2 · walk 6008/2 · get 4/l1 wux new · req 6 L1 · UNSYNC 6/l1 -ux · UNSYNC 6/l1 wux · set 6:e63 \
           0:e43 1:a01 2:a01 3:a01 4:a01 5:a01 7:e43"],
    );
}

#[test]
fn toggling_pge_forgets_previous_roots_with_marks() {
    let ops = "R 400000; CR3 31000; W 6048=500063; CR4 a0; CR3 1000; W 6048=501063; CR3 31000; CR3 1000; CR4 20";
    check(&mut start("31000=2067"), ops, "tk6 fx6 cm7 4k32 rf4 tf8 ie7");
}

#[test]
fn two_vcpus_share_tables_and_their_being_out_of_step() {
    let mut guest = start("");
    guest.enter(0);
    guest.go_on(0, "R 400000");
    guest.enter(1);
    guest.go_on(1, "R 400000");
    guest.go_on(0, "W 6048=500063");
    guest.go_on(1, "R 409000");
    guest.go_on(0, "INV 409000");
    guest.go_on(1, "R 409000");
    guest.go_on(0, "CR3 1000");
    guest.go_on(1, "CR3 1000; R 409000");
    guest.leave(0);
    guest.leave(1);
    crate::compare(&guest, "cm6 4k40 rf3", true);
}
