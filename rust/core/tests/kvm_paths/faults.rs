//! The fault path: results, prefetch, A and D bits, large pages, MMIO.

use crate::guest::Guest;
use crate::{check, start, trace};
use shadowkvm_core::memory::HostState;

#[test]
fn a_first_touch_maps_the_page_and_its_seven_neighbours() {
    let mut guest = start("");
    let ops = "R 400000; R 408000; W 403000=1; W 6320=464063; W 6328=465063; R 464000";
    check(&mut guest, ops, "tk6 fx6 cm6 un1 4k48 ie1");
}

#[test]
fn prefetch_stops_at_an_entry_that_is_not_present() {
    let mut guest = start("6008=0; 6010=402043; 6030=402023; 6058=0");
    check(&mut guest, "R 400000; R 403000; R 40c000", "tk5 fx5 cm5 4k22 ie1");
}

#[test]
fn a_and_d_bits_are_set_top_down_and_a_clean_page_is_read_only() {
    let mut guest = start("3010=6007; 6140=428003 x8 +8 +1000");
    check(&mut guest, "R 428000; R 429000; W 428000=1; W 42a000=1", "tk6 fx6 cm5 4k19 ie1");
    trace(
        &guest,
        1,
        &[
            "PF 428000 err 0 · walk 428000/0 · setA 3010 · setA 6140 · get 6/l1 wux new · req 428 L1 · set 428:a21",
            "PF 429000 err 0 · walk 429000/0 · setA 6148 · req 429 L1 · set 429:a21",
            "PF 428000 err 3 · walk 428000/3 · setD 6140 · req 428 L1 · set 428:e63",
            "PF 42a000 err 2 · walk 42a000/2 · setA 6150 · setD 6150 · req 42a L1 · set 42a:e63",
        ],
    );
}

#[test]
fn a_fault_that_the_guest_caused_goes_to_the_guest() {
    let mut guest = start("61e0=43c067");
    let ops = "UR 43c000; UW 43c000=0; UR 43d000; R 10000000; W 10000000=0";
    // As recorded, without its UEXEC op, which executes zero bytes of the user's page: one more fault and one more #PF.
    check(&mut guest, ops, "tk7 fx4 gu3 cm5 4k32 ie1");
    assert_eq!(guest.faults, [5, 0, 2]);
}

#[test]
fn a_large_guest_page_on_small_host_pages_gets_direct_pages_by_its_rights() {
    let mut guest = start("3040=10000e3; 3048=12000a3");
    let ops = "R 1000000; W 1001000=0; R 1200000; W 1200000=0; W 1300000=0; CALL 200840";
    check(&mut guest, ops, "tk6 fx6 cm7 4k48 rf1 tf1 ie1 rm1");
    trace(
        &guest,
        1,
        &[
            "PF 1000000 err 0 · walk 1000000/0 · req 1000 L1 · get 1000/l1d w-x new · set 1000:e63 1001:e43 1002:e43 \
             1003:e43 1004:e43 1005:e43 1006:e43 1007:e43",
            "PF 1200000 err 0 · walk 1200000/0 · req 1200 L1 · get 1200/l1d --x new · set 1200:a21 1201:a01 1202:a01 \
             1203:a01 1204:a01 1205:a01 1206:a01 1207:a01",
            "PF 1200000 err 3 · walk 1200000/3 · setD 3048 · req 1200 L1 · get 1200/l1d w-x new · set 1200:e63 1201:e43 \
             1202:e43 1203:e43 1204:e43 1205:e43 1206:e43 1207:e43",
            "PF 1300000 err 2 · walk 1300000/2 · req 1300 L1 · set 1300:e63 1301:e43 1302:e43 1303:e43 1304:e43 1305:e43 \
             1306:e43 1307:e43",
        ],
    );
}

#[test]
fn a_large_guest_page_on_a_large_host_page_is_one_leaf() {
    let mut guest = Guest::new("3040=10000e3; 3048=12000a3", HostState::Huge2m, |_| {});
    let ops = "R 1000000; W 1001000=0; R 1200000; W 1200000=0; W 1300000=0; CALL 200840";
    check(&mut guest, ops, "tk5 fx5 cm4 4k16 2m2 ie1");
}

#[test]
fn a_large_page_over_its_own_tables_is_mapped_small() {
    let mut guest = Guest::new("2008=e3; 2010=400000e3", HostState::Huge2m, |_| {});
    let ops = "R 40400000; W 40006048=409063; R 400000; W 40006050=40a063; R 80000000; R 80000000";
    check(&mut guest, ops, "tk7 fx6 em1 mm1 cm10 un1 4k40 rf1 tf1 ie3 rm1");
}

#[test]
fn mmio_is_remembered_by_the_vcpu_and_by_the_entry() {
    let mut guest = start("6080=fe000063; 6088=fe001063");
    let ops = "R 410000; R 410000; W 410000=0; R 411000; R 410000; CR3 1000; R 410000; INV 410000; R 410000";
    check(&mut guest, ops, "tk4 fx2 em2 mm2 cm5 4k16 tf1 iv1 ie10");
    trace(
        &guest,
        1,
        &[
            "PF 410000 err 0 · walk 410000/0 · get 6/l1 wux new · req fe000 L1 nopfn · mark_mmio fe000 a3 g2 · \
             walk 200111/10 · emu · match GVA · mmio unsatisfied-read",
            "PF 410000 err 8 · walk 200111/10 · emu · match GVA · mmio unsatisfied-read",
            "PF 410000 err a · walk 200116/10 · emu · match GVA · mmio write",
            "PF 411000 err 0 · walk 411000/0 · req fe001 L1 nopfn · mark_mmio fe001 a3 g2 · walk 200111/10 · emu · \
             match GVA · mmio unsatisfied-read",
            "PF 410000 err 8 · check 80000fe000013 g2/2 1 · hmmio 410000 fe000 a2 · walk 200111/10 · emu · match GVA · \
             mmio unsatisfied-read",
            "write_cr3 · walk 20012d/10 · emu",
        ],
    );
}

#[test]
fn a_zero_page_that_is_written_makes_the_fault_run_twice() {
    let mut guest = Guest::new("", HostState::Zero, |_| {});
    check(&mut guest, "R 400000; R 401000; W 400000=1; W 402000=1; R 403000", "tk9 fx7 cm5 4k9 rf1 tf1 ie1");
}

#[test]
fn a_full_rmap_is_emptied() {
    let memory = "3320=100063; 3328=101063; 3330=102063; 100000=300063 x1536 +8";
    check(&mut start(memory), "R c800000 x128 +8000", "tk131 fx131 cm6 4k40 rf1 tf1 ie1 rm1001");
}

#[test]
fn an_exception_is_delivered_through_the_shadow() {
    let mut guest = start("430030=20ee0000084000; 4300e0=208e0000080800");
    guest.idt = 0x430000;
    guest.int3_decodes = vec![2, 1];
    let ops = "INT3 0; CR3 1000; INT3 0; R 10000000; W8 3011=60; INT3 0";
    check(&mut guest, ops, "tk7 fx5 em1 gu1 zap1 pw1 fl1 cm7 4k32 rf3 tf4 ie6");
}
