"""Page tables built in Python: rights, sizes, sharing, copies, and the stores that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.tables import image_of

import shadowkvm as sk
from shadowkvm.pagetables import MODES, AddressSpace, FramePool, GuestMemory, Weave, make_rows

MIB = 1 << 20
MODE = pytest.mark.parametrize("mode", list(MODES))


def ops(rows: Any) -> list[tuple[str, int, int, int]]:
    return [(sk.Op(int(r["op"])).name, int(r["addr"]), int(r["value"]), int(r["size"])) for r in rows]


def make(mode: str = "4-level", size: int = 64 * MIB, **settings: Any) -> AddressSpace:
    return AddressSpace(GuestMemory(size, mode), **settings)


# -- maps -------------------------------------------------------------------------------------------------------------


@MODE
def test_each_page_size_leads_to_its_memory(mode: str) -> None:
    space = make(mode)
    for number, size in enumerate(MODES[mode].page_sizes):
        gva, gpa = (number + 1) << 30, number << 30
        space.map(gva, gpa, 2 * size if size < 1 << 30 else size, page_size=size)
        found = image_of(space.memory).walk(mode, space.root, gva + size - 8)
        assert found is not None
        assert (found.gpa, found.page) == (gpa + size - 8, size)
        assert space.translate([gva + size - 8]).tolist() == [gpa + size - 8]


@MODE
def test_a_gibibyte_of_small_pages(mode: str) -> None:
    space = make(mode, 2 << 30)
    space.map(0x4000_0000, 0x4000_0000, 1 << 30)
    per_table = 1024 if mode == "32-bit" else 512
    assert len(space.leaves()) == 1 << 18
    assert len(space.tables()) == (1 << 18) // per_table + len(MODES[mode].levels) - 1
    assert [str(run) for run in space.mappings()] == ["0x0000000040000000 -> 0x0040000000 1,048,576 KiB  wxu  4K"]


def test_scattered_frames() -> None:
    space = make()
    gpas = np.array([7, 3, 5], np.uint64) << np.uint64(12)
    space.map(0x1000, gpas, 3 << 12)
    assert space.translate([0x1000, 0x2008, 0x3010]).tolist() == [0x7000, 0x3008, 0x5010]
    assert [run.gpa for run in space.mappings()] == [0x7000, 0x3000, 0x5000]


def test_a_small_page_inside_a_large_one_splits_it() -> None:
    space = make()
    space.map(4 * MIB, 8 * MIB, 2 * MIB, write=False, nx=True, page_size=2 * MIB)
    space.unmap(4 * MIB + 0x3000, 0x1000)
    assert [(run.gva, run.size, run.page_size, run.write, run.nx) for run in space.mappings()] == [
        (4 * MIB, 0x3000, 4096, False, True),
        (4 * MIB + 0x4000, 2 * MIB - 0x4000, 4096, False, True),
    ]


def test_a_gibibyte_page_is_split_twice() -> None:
    space = make()
    space.map(1 << 30, 1 << 30, 1 << 30, page_size=1 << 30)
    space.protect((1 << 30) + 0x1000, 0x1000, write=False)
    sizes = {run.page_size: run.size for run in space.mappings() if run.page_size > 4096}
    assert sizes == {2 * MIB: (1 << 30) - 2 * MIB}
    assert not space.walk([(1 << 30) + 0x1000]).write[0]
    assert space.walk([(1 << 30) + 0x2000]).write[0]


def test_a_large_page_replaces_tables_and_frees_them() -> None:
    space = make()
    space.map(2 * MIB, 0, 2 * MIB)
    free = space.memory.frames.free
    space.map(2 * MIB, 4 * MIB, 2 * MIB, page_size=2 * MIB)
    # The page table is given back, and with it the two above: they are made anew.
    assert space.memory.frames.free == free + 1
    assert space.translate([2 * MIB + 0x1234]).tolist() == [4 * MIB + 0x1234]


def test_pse_36_reaches_64_gib() -> None:
    space = make("32-bit", 4 * MIB)
    space.map(4 * MIB, 0xC_0040_0000, 4 * MIB, page_size=4 * MIB)
    assert space.translate([4 * MIB + 5]).tolist() == [0xC_0040_0005]
    with pytest.raises(sk.ConfigError, match="do not reach gpa 0xc00400000"):
        space.protect(4 * MIB, 4096, write=False)


@MODE
def test_unmap_gives_every_table_back(mode: str) -> None:
    space = make(mode)
    free = space.memory.frames.free
    space.map(0x1234_5000, 0, 4 * MIB)
    assert space.memory.frames.free < free
    space.unmap(0x1234_5000, 4 * MIB)
    assert space.memory.frames.free == free
    assert space.mappings() == []
    assert str(space) == "nothing is mapped"


def test_a_neighbour_keeps_the_table() -> None:
    space = make()
    space.map(0x1000, 0x1000, 0x1000)
    space.unmap(0x1000, 0x1000, tables=False)
    assert len(space.free_tables(0x1000, 0x2000, floor=0x1000)) == 0, "the table also serves addresses below the floor"
    assert len(space.free_tables(0x1000, 0x2000, highest=1)) == 1
    assert len(space.free_tables(0x1000, 0x2000)) == 2
    assert space.tables() == [space.root]


# -- stores -----------------------------------------------------------------------------------------------------------


def test_the_stores_of_a_first_page() -> None:
    """Tables from the top down, each zeroed before it is linked; then the entry."""
    space = make()
    root = space.root
    pdpt, pd, pt = (root + 0x1000 * n for n in (1, 2, 3))
    with space.memory.logging() as log:
        space.map(0x20_1000, 0x5000, 0x1000)
    assert ops(log.rows()) == [
        ("STORE", pdpt, 0, 8), ("WRITE", root, pdpt | 0x67, 8),
        ("STORE", pd, 0, 8), ("WRITE", pdpt, pd | 0x67, 8),
        ("STORE", pt, 0, 8), ("WRITE", pd + 8, pt | 0x67, 8),
        ("WRITE", pt + 8, 0x5067, 8),
    ]  # fmt: skip


def test_the_stores_of_unmap_protect_and_exit() -> None:
    space = make()
    space.map(0x1000, 0x5000, 0x2000)
    slots = space.leaves()["slot"].tolist()
    with space.memory.logging() as log:
        space.protect(0x1000, 0x2000, write=False, nx=True)
    new = [1 << 63 | gpa | 0x65 for gpa in (0x5000, 0x6000)]
    assert ops(log.take()) == [
        ("XCHG", slots[0], 0, 8), ("WRITE", slots[0], new[0], 8),
        ("XCHG", slots[1], 0, 8), ("WRITE", slots[1], new[1], 8),
    ]  # fmt: skip
    assert len(log.rows()) == 0
    with space.memory.logging() as log:
        space.unmap(0x1000, 0x2000, tables=False)
    assert ops(log.rows()) == [("XCHG", slot, 0, 8) for slot in slots]
    space.map(0x1000, 0x5000, 0x1000)
    with space.memory.logging() as log:
        space.unmap(0x1000, 0x1000, final=True)
    root = space.root
    assert ops(log.rows()) == [
        ("WRITE", slots[0], 0, 8), ("WRITE", root + 0x2000, 0, 8), ("WRITE", root + 0x1000, 0, 8), ("WRITE", root, 0, 8)
    ]  # fmt: skip


def test_a_pae_entry_is_stored_by_halves() -> None:
    """set_pte writes the high half first, pte_clear the low one; ptep_get_and_clear is one CMPXCHG8B."""
    space = make("pae")
    space.map(0x1000, 0x5000, 0x1000)
    slot = int(space.leaves()["slot"][0])
    with space.memory.logging() as log:
        space.map(0x1000, 0x6000, 0x1000, nx=True)
        space.unmap(0x1000, 0x1000, tables=False, final=True)
        space.map(0x1000, 0x6000, 0x1000)
        space.unmap(0x1000, 0x1000, tables=False)
    assert ops(log.rows()) == [
        ("WRITE", slot + 4, 0x8000_0000, 4), ("WRITE", slot, 0x6067, 4),
        ("WRITE", slot, 0, 4), ("WRITE", slot + 4, 0, 4),
        ("WRITE", slot + 4, 0, 4), ("WRITE", slot, 0x6067, 4),
        ("XCHG", slot, 0, 8),
    ]  # fmt: skip


def test_fork_protects_the_parent_first() -> None:
    parent = make()
    parent.map(0x1000, 0x5000, 0x1000)
    parent.map(0x2000, 0x6000, 0x1000, write=False)
    slots = parent.leaves()["slot"].tolist()
    with parent.memory.logging() as log:
        child = parent.clone()
    copies = child.leaves()["slot"].tolist()
    assert ops(log.rows())[-3:] == [
        ("AND", slots[0], 0xFD, 1), ("WRITE", copies[0], 0x5045, 8), ("WRITE", copies[1], 0x6005, 8)
    ]  # fmt: skip
    assert not parent.walk([0x1000]).write[0]
    assert str(parent) == str(child)


def test_shared_ranges_stay_writable() -> None:
    parent = make()
    parent.map(0x1000, 0x5000, 0x3000)
    child = parent.clone(shared=[(0x2000, 0x3000)], accessed=True)
    for space in (parent, child):
        assert space.walk([0x1000, 0x2000, 0x3000]).write.tolist() == [False, True, False]
    assert child.leaves()["bits"].tolist() == [0x65, 0x67, 0x65]
    assert parent.clone(cow=False).walk([0x2000]).write[0]


# -- halves, tops, copies ---------------------------------------------------------------------------------------------


@MODE
def test_the_kernel_half_is_shared_and_follows(mode: str) -> None:
    kernel = make(mode)
    base = MODES[mode].kernel_half
    kernel.map(base, 0, 4 * MIB, user=False)
    first = AddressSpace(kernel.memory, kernel=kernel)
    other = base + (0x100_0000_0000 if mode.endswith("level") else 32 * MIB)
    kernel.map(other, 0x40_0000, 4096, user=False, nx=MODES[mode].nx)
    second = AddressSpace(kernel.memory, kernel=kernel)
    for space in (first, second):
        assert space.mappings(kernel=True) == kernel.mappings(kernel=True)
        assert space.mappings() == []
        with pytest.raises(sk.ConfigError, match="belongs to the kernel's own space"):
            space.map(base, 0, 4096)
    first.destroy()
    second.destroy()


def test_large_pages_at_the_top_are_followed() -> None:
    """32-bit paging: an entry of the top table maps 4 MiB."""
    kernel = make("32-bit")
    kernel.map(0xC000_0000, 0, 8 * MIB, user=False, page_size=4 * MIB)
    process = AddressSpace(kernel.memory, kernel=kernel)
    kernel.protect(0xC000_0000, 4 * MIB, write=False)
    kernel.unmap(0xC040_0000, 4 * MIB)
    assert process.mappings(kernel=True) == kernel.mappings(kernel=True)
    assert len(process.mappings(kernel=True)) == 1
    assert not process.walk([0xC000_0000]).write[0]


def test_kpti_has_two_tops() -> None:
    memory = GuestMemory(64 * MIB)
    kernel, entry = AddressSpace(memory), AddressSpace(memory)
    kernel.map(0xFFFF_8880_0000_0000, 0, 64 * MIB, user=False, page_size=2 * MIB)
    kernel.map(0xFFFF_FE00_0000_0000, 0x1000, 0x1000, user=False)
    entry.map(0xFFFF_FE00_0000_0000, 0x1000, 0x1000, user=False)
    process = AddressSpace(memory, kernel=kernel, kpti=True, user_kernel=entry)
    assert process.user_root == process.root + 4096
    assert process.root % 8192 == 0
    with memory.logging() as log:
        process.map(0x40_0000, 0x20_0000, 0x1000)
    tops = [row for row in ops(log.rows()) if row[1] & ~0xFFF in {process.root, process.user_root}]
    table = tops[0][2]
    assert tops == [("WRITE", process.user_root, table, 8), ("WRITE", process.root, table | 1 << 63, 8)]
    gvas = [0x40_0000, 0xFFFF_8880_0000_0000, 0xFFFF_FE00_0000_0000]
    assert process.walk(gvas).present.tolist() == [True, True, True]
    assert process.walk(gvas, user_root=True).present.tolist() == [True, False, True]
    assert process.walk(gvas).execute[0] == False  # noqa: E712 -- a NumPy bool
    assert process.walk(gvas, user_root=True).execute[0]
    child = process.clone()
    assert child.kpti
    assert child.walk([0x40_0000], user_root=True).present[0]


def test_touch_sets_accessed_and_dirty() -> None:
    space = make()
    space.map(0x1000, 0x5000, 0x2000, accessed=False, dirty=False)
    with space.memory.logging() as log:
        space.touch([0x1000, 0x2000, 0x1000], write=np.array([False, False, True]))
    assert len(log.rows()) == 0, "the CPU does it, not a store"
    assert space.leaves()["bits"].tolist() == [0x67, 0x27]


def test_destroy_gives_all_back() -> None:
    memory = GuestMemory(64 * MIB)
    free = memory.frames.free
    space = AddressSpace(memory, kpti=True)
    space.map(0x1000, 0, 32 * MIB)
    space.destroy()
    # The pair of top tables may have left an odd frame behind, which is free, too.
    assert memory.frames.free == free


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "call", "message"),
    [
        ("4-level", lambda s: s.map(0x1001, 0, 4096), "gva 0x1001 is not a multiple of the page size 0x1000"),
        ("4-level", lambda s: s.map(0x1000, 0, 4097), "size 0x1001 is not a multiple"),
        ("4-level", lambda s: s.map(0x1000, 1, 4096), "gpa 0x1 is not a multiple of 0x1000"),
        ("4-level", lambda s: s.map(0x1000, 1 << 52, 4096), "gpa 0x10000000000000 is too high"),
        ("4-level", lambda s: s.map(0x1000, 0, 4096, page_size=8192), "page_size 0x2000: 4-level paging has 0x1000"),
        ("4-level", lambda s: s.map(0x7FFF_FFFF_F000, 0, 8192), "not inside one half of the 4-level address space"),
        ("4-level", lambda s: s.map(0x8000_0000_0000, 0, 4096), "not inside one half"),
        ("4-level", lambda s: s.map(-4096, 0, 4096), "gva -0x1000 is not from 0"),
        ("4-level", lambda s: s.map(0x1000, [0], 8192), r"gpa has shape \(1,\); \(2,\) is expected"),
        ("pae", lambda s: s.map(0xFFFF_F000, 0, 8192), "not inside one half"),
        ("pae", lambda s: s.map(0xBFFF_F000, 0, 8192), "0xbffff000 to 0xc0001000 is not inside one half"),
        ("32-bit", lambda s: s.map(0x1000, 0, 4096, nx=True), "nx: entries of 32-bit paging have no such bit"),
        ("32-bit", lambda s: s.protect(0x1000, 4096, nx=True), "nx: entries of 32-bit"),
        ("32-bit", lambda s: s.map(0x1000, 1 << 32, 4096), "gpa 0x100000000 is too high"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_reason(mode: str, call: Any, message: str) -> None:
    space = make(mode)
    before = image_of(space.memory).content()
    with pytest.raises(sk.ConfigError, match=message):
        call(space)
    assert image_of(space.memory).content() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GuestMemory(4097), "memory 0x1001 is not a multiple of 4096"),
        (lambda: GuestMemory(1 << 20), "first 0x100000 is not a page of the memory"),
        (lambda: GuestMemory(8 << 30, "32-bit"), "memory 0x200000000: 32-bit paging reaches 0x100000000"),
        (lambda: GuestMemory(64 * MIB, "3-level"), "paging mode '3-level' is not known; did you mean"),
        (lambda: FramePool(5, 5), "frames 0x5 to 0x5: none is left"),
        (lambda: FramePool(0, 5, reuse="random"), "reuse 'random' is not known"),  # type: ignore[arg-type]
        (lambda: FramePool(0, 5).give([3]), "frame 0x3 is given back, but was not in use"),
        (lambda: make("pae", kpti=True), "kpti: pae paging cannot have it"),
        (lambda: make("32-bit", kpti=True), "kpti: 32-bit paging cannot have it"),
    ],
)
def test_memories_and_pools_that_cannot_be(call: Any, message: str) -> None:
    with pytest.raises(sk.ConfigError, match=message):
        call()


def test_memory_that_is_used_up_says_so() -> None:
    memory = GuestMemory(2 * MIB)
    with pytest.raises(
        sk.GuestMemoryError, match="guest memory is used up: 300 frames are wanted, 256 of 256 are free"
    ):
        memory.frames.take(300)
    with pytest.raises(sk.GuestMemoryError, match="no 2 MiB page is left"):
        memory.frames.take_huge()


# -- frames, rows -----------------------------------------------------------------------------------------------------


def test_fifo_frames_rest_before_they_are_used_again() -> None:
    pool = FramePool(0, 4, reuse="fifo")
    assert pool.take(2).tolist() == [0, 1]
    pool.give([0])
    assert [int(pool.take()[0]) for _ in range(3)] == [2, 3, 0]


def test_huge_frames_are_aligned_and_come_back() -> None:
    pool = FramePool(0, 2000)
    first, second = pool.take_huge(), pool.take_huge()
    assert (first, second) == (1024, 512)
    pool.give_huge(first)
    assert pool.take_huge() == 1024
    assert pool.free == 512 + 2000 - 1536
    pair = pool.take_pair()
    assert pair % 2 == 0
    pool.give([pair, pair + 1])
    with pytest.raises(sk.ConfigError, match="not in use"):
        pool.give([pair])


def test_a_weave_keeps_the_order_within_an_event() -> None:
    weave = Weave(3)
    weave.add(make_rows(sk.Op.READ, [10, 20, 30]))
    weave.add_block(1, make_rows(sk.Op.WRITE, [21, 22, 23]))
    weave.add(make_rows(sk.Op.HLT, 99), at=np.array([0, 1]))
    weave.add(make_rows(sk.Op.READ, [31]), at=np.array([2]))
    assert weave.rows()["addr"].tolist() == [10, 99, 20, 21, 22, 23, 99, 30, 31]
    assert len(Weave(0).rows()) == 0


def test_cleared_pages_store_what_was_there() -> None:
    memory = GuestMemory(4 * MIB)
    memory.write(np.array([0x10_0008, 0x10_0100], np.uint64), np.array([1, 2], np.uint64))
    with memory.logging() as log:
        memory.clear(0x10_0000)
    assert [(row[0], row[1]) for row in ops(log.rows())] == [
        ("STORE", 0x10_0000), ("STORE", 0x10_0008), ("STORE", 0x10_0100)
    ]  # fmt: skip
    assert list(memory.pages()) == []
