//! What the host does: slots, dirty log, notifiers, the page quota.

use crate::{check, golden, start, trace};
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::outcome::Status;

#[test]
fn the_dirty_log_protects_pages_and_notes_them_again() {
    let ops = "W 400000=1; W 408000=1; HOST 1; W 400000=2; R 401000; W 401000=2; W 6048=409063; HOST 2; W 400000=3; \
               R 414000; W 414000=3; HOST 2; HOST 3; W 400000=3";
    check(&mut start(""), ops, "tk10 fx10 cm6 un1 4k34 rf3 tf3 ie1");
}

#[test]
fn a_new_slot_makes_mmio_entries_stale_and_a_deleted_one_zaps_everything() {
    let mut guest = start("6080=10000063");
    check(
        &mut guest,
        "R 410000; R 410000; HOST 4; R 410000; HOST 5; R 410000",
        "tk7 fx5 em2 mm2 zap6 cm10 4k23 rf2 tf1 ie4",
    );
    trace(
        &guest,
        4,
        &[
            "PF 410000 err 8 · check 8000010000013 g4/2 0 · walk 410000/0 · req 10000 L1 · set 10000:821",
            "io · host · zap_all_fast kvm-mmu-valid-gen 0 used_pages 5 · ZAP 1/l4 wux root1 · ZAP 2/l3 wux · ZAP 3/l2 wux · \
             ZAP 5/l1 wux · ZAP 6/l1 wux · ZAP 1/l4 wux inv · get 1/l4 wux new",
        ],
    );
}

#[test]
fn sync_keeps_a_stale_mmio_entry_although_a_slot_is_there() {
    let mut guest = start("6080=10000063");
    let ops = "R 410000; HOST 4; W 60c0=500063; CR3 1000; R 410000; INV 410000; R 410000";
    check(&mut guest, ops, "tk4 fx3 em1 mm1 cm6 4k31 rf2 tf1 iv1 ie6");
}

#[test]
fn a_store_to_a_read_only_slot_goes_to_user_space() {
    let mut guest = start("6080=10000063; 6088=10001063");
    guest.add_readonly_slot();
    check(&mut guest, "R 410000; W 410000=5; W 410000=5; R 411000", "tk6 fx4 em2 cm5 4k24 ie3");
    assert_eq!(guest.vm.execute(0, &Insn::new(Action::Store, 0x410000, 8)).status, Status::Mmio);
}

#[test]
fn the_quota_takes_the_oldest_pages_first() {
    let mut guest = start("3320=100063 x70 +8 +1000; 100000=300063 x70 +1000");
    guest.vm.set_page_quota(64).expect("a legal quota");
    let ops = "R c800000 x66 +200000; R 400000; R c800000";
    check(&mut guest, ops, "tk72 fx72 zap21 rec21 cm75 4k73 rf1 tf1 ie1 rm55");
    let zaps = golden::lines(&guest.vm).into_iter().find(|line| line.contains("ZAP")).expect("pages were recycled");
    let order: Vec<_> = zaps.split(" · ").filter_map(|word| word.strip_prefix("ZAP ")).collect();
    assert_eq!(&order[..5], ["2/l3 wux", "3/l2 wux", "5/l1 wux", "100/l1 w-x", "101/l1 w-x"], "all but the root");
}

#[test]
fn a_dropped_page_loses_its_entries_and_a_dropped_table_keeps_its_page() {
    let ops = "R 400000; W 401000=0; HOST 6; R 400000; W 6048=409063; HOST 7; R 400000; W 6048=409063";
    check(&mut start(""), ops, "tk6 fx6 cm6 un1 4k31 rf2 tf2 ie1");
}

#[test]
fn sync_marks_kept_pages_dirty_again() {
    let ops = "R 400000; W 6048=500063; HOST 1; W 6048=501063; HOST 2; CR3 1000; W 400000=1; HOST 2; W 6048=501063; \
               HOST 2";
    check(&mut start(""), ops, "tk6 fx6 cm6 un1 4k32 rf6 tf5 ie2");
}
