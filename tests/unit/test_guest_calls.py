"""What each call of the guest's model does, in order: the stores, flushes and accesses that Linux 6.1 makes.

The orders were seen in examples/recordings (a real Linux) where that could be; the tests name what they show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shadowkvm as sk
from shadowkvm.guest import Linux, Process, Settings, Vma, pages
from shadowkvm.guest.cpu import NOFLUSH
from shadowkvm.pagetables.entries import NX, A, D, P, U, W

MIB, PAGE = 1 << 20, 4096
Rows = NDArray[Any]


def booted(**settings: Any) -> tuple[Linux, Process]:
    """A guest with one process whose stack and program are there."""
    guest = Linux(**{"memory": 64 * MIB, **settings})
    shell = guest.spawn(guest.program(text=32, data=4, bss=4))
    guest.switch(shell)
    guest.touch(shell, [shell.mm.stack_top - 64], write=True)
    guest.start()
    return guest, shell


def resident(guest: Linux, process: Process, count: int = 4, **options: Any) -> Vma:
    area = guest.mmap(process, count * PAGE, **options)
    guest.touch(process, pages(area.start, count), write=True)
    guest.take()
    return area


class Reader:
    """Names rows by what their address is to the guest."""

    def __init__(self, guest: Linux) -> None:
        self.guest = guest

    def place(self, row: Any) -> str:
        guest, gva = self.guest, int(row["addr"])
        layout = guest.layout
        if gva < guest.memory.mode.user_half:
            return "user"
        if layout.direct <= gva < layout.direct + guest.settings.memory:
            return "direct"
        regions = {
            "struct page": (layout.vmemmap, 1 << 30),
            "code": (layout.text, layout.image_size),
            "data": (layout.data, layout.image_size),
            "entry": (layout.entry, 1 << 20),
            "vmalloc": (layout.vmalloc, 1 << 30),
        }
        return next(name for name, (start, size) in regions.items() if start <= gva < start + size)

    def read(self, rows: Rows) -> list[str]:
        out = []
        for row in rows:
            op = sk.Op(int(row["op"])).name
            if op in {"CR3", "CR4", "IO", "INTR"}:
                out.append(op)
            else:
                fault = " faults" if row["flags"] & sk.Flag.FAULTS else ""
                out.append(f"{op} {self.place(row)}{fault}")
        return out


def table_stores(guest: Linux, rows: Rows, process: Process) -> list[tuple[str, int, int]]:
    """Stores to the tables of a process: op, level of the table, value."""
    from shadowkvm.pagetables.walk import table_pages

    level = {}
    for found in table_pages(guest.memory, process.space.root, 0, guest.memory.mode.user_half):
        level.update(dict.fromkeys(found.gpa.tolist(), found.level.number))
    out = []
    for row in rows:
        gpa = int(row["addr"]) - guest.layout.direct
        if row["op"] in {1, 4, 7} and gpa & ~0xFFF in level:
            out.append((sk.Op(int(row["op"])).name, level[gpa & ~0xFFF], int(row["value"])))
    return out


WAY_IN = ["READ entry", "WRITE entry", "FETCH code", "FETCH code", "WRITE vmalloc"]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_first_store_to_anonymous_memory() -> None:
    guest, shell = booted()
    area = resident(guest, shell, 1)
    other = guest.mmap(shell, 2 * PAGE, gva=area.start - 2 * PAGE)
    guest.take()
    guest.touch(shell, [other.start], write=True)
    rows = guest.take()
    assert Reader(guest).read(rows) == [
        "WRITE user faults", *WAY_IN, "READ direct", "STORE direct", "WRITE struct page", "WRITE direct", "WRITE user"
    ]  # fmt: skip
    assert rows["value"][0] == 6, "a user's store to what is not present"
    entry = int(rows["value"][-2])
    assert entry & 0xFFF == P | W | U | A | D
    assert entry & NX


def test_a_first_load_gets_the_zero_page_and_a_later_store_a_copy_of_it() -> None:
    guest, shell = booted()
    area = guest.mmap(shell, PAGE)
    guest.touch(shell, [area.start])
    guest.take()
    walk = shell.space.walk([area.start])
    assert (int(walk.gpa[0]) >> 12, bool(walk.write[0])) == (guest.zero, False)
    guest.touch(shell, [area.start], write=True)
    rows = guest.take()
    assert rows["value"][0] == 7, "a user's store to what is present"
    assert Reader(guest).read(rows)[-6:] == [
        "STORE direct", "WRITE struct page", "XCHG direct", "INVLPG user", "WRITE direct", "WRITE user"
    ]  # fmt: skip


def test_a_copy_on_write_clears_flushes_and_stores() -> None:
    """As at row 51009 of fork20-demote64: the entry cleared, INVLPG, the new entry."""
    guest, shell = booted()
    area = resident(guest, shell, 1)
    guest.fork(shell)
    guest.take()
    old = int(shell.space.walk([area.start]).gpa[0])
    guest.touch(shell, [area.start], write=True)
    rows = guest.take()
    assert Reader(guest).read(rows) == [
        "WRITE user faults", *WAY_IN, "READ direct", "READ direct", "STORE direct", "WRITE struct page", "XCHG direct",
        "INVLPG user", "WRITE direct", "WRITE user",
    ]  # fmt: skip
    assert int(rows["addr"][7]) == guest.layout.direct + old
    assert int(shell.space.walk([area.start]).gpa[0]) != old


def test_the_last_owner_only_gets_its_right_back() -> None:
    """As at row 49720 of fork20-demote64: one store, no flush."""
    guest, shell = booted()
    area = resident(guest, shell, 1)
    guest.exit(guest.fork(shell), shell)
    guest.take()
    guest.touch(shell, [area.start], write=True)
    assert Reader(guest).read(guest.take()) == [
        "WRITE user faults", *WAY_IN, "READ direct", "WRITE direct", "WRITE user"
    ]  # fmt: skip


def test_a_read_of_a_file_maps_sixteen_pages_around() -> None:
    """As at row 52159 of fork20-demote64: sixteen entries, A set, D not."""
    guest, shell = booted()
    guest.touch(shell, [guest.layout.program + 5 * PAGE], fetch=True)
    entries = shell.space.leaves(guest.layout.program, guest.layout.program + 32 * PAGE)
    assert len(entries) == 16
    assert set(entries["bits"].tolist()) == {P | U | A}
    assert int(guest.take()["value"][0]) == 4 + 16, "a user's fetch"


def test_new_tables_are_zeroed_before_they_are_linked_from_the_top_down() -> None:
    guest, shell = booted()
    area = guest.mmap(shell, PAGE, gva=0x12_3456_7000)
    guest.take()
    guest.touch(shell, [area.start], write=True)
    rows = guest.take()
    stores = table_stores(guest, rows, shell)
    assert [(op, level) for op, level, _ in stores] == [("WRITE", 4), ("WRITE", 3), ("WRITE", 2), ("WRITE", 1)]
    words = Reader(guest).read(rows)
    first = words.index("STORE direct")
    assert words[first : first + 6] == ["STORE direct", "WRITE direct"] * 3


def test_pages_that_were_aged_are_read_anew_after_reclaim() -> None:
    guest, shell = booted()
    file = guest.file(64)
    area = guest.mmap(shell, 64 * PAGE, file=file, shared=True)
    guest.touch(shell, pages(area.start, 64), write=True)
    guest.take()
    assert guest.age(file) == 64
    rows = guest.take()
    ands = rows[rows["op"] == sk.Op.AND]
    assert (len(ands), set(ands["value"].tolist()), set(ands["size"].tolist())) == (64, {0xFF ^ A}, {1})
    assert "INVLPG user" not in Reader(guest).read(rows), "x86 clears A without a flush"
    assert "CR3" not in Reader(guest).read(rows)
    assert guest.reclaim(file, np.arange(40)) == 40
    words = Reader(guest).read(guest.take())
    assert words.count("XCHG direct") == 40
    assert words.count("CR3") == 2, "one flush for each batch of 32"
    guest.touch(shell, [area.start])
    assert "IO" in Reader(guest).read(guest.take())


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_munmap_clears_unlinks_flushes_and_then_frees() -> None:
    guest, shell = booted()
    area = guest.mmap(shell, 3 * PAGE, gva=0x12_3456_7000)
    guest.touch(shell, pages(area.start, 3), write=True)
    guest.take()
    free = guest.memory.frames.free
    guest.munmap(shell, area.start, 3 * PAGE)
    words = Reader(guest).read(guest.take())
    assert words == [
        "FETCH code", "FETCH code", "WRITE vmalloc",
        *["XCHG direct", "WRITE struct page"] * 3,
        # The page table and its directory; the table above serves the program, too.
        *["WRITE direct"] * 2,
        *["INVLPG user"] * 3,
    ]  # fmt: skip
    assert guest.memory.frames.free == free + 3 + 2


@pytest.mark.parametrize(("count", "flush"), [(33, ["INVLPG user"] * 33), (34, ["CR3"])])
def test_the_flush_ceiling(count: int, flush: list[str]) -> None:
    guest, shell = booted()
    area = resident(guest, shell, count)
    guest.madvise_dontneed(shell, area.start, count * PAGE)
    words = Reader(guest).read(guest.take())
    assert words[-len(flush) :] == flush
    assert words[-len(flush) - 1] == "WRITE struct page"


def test_mprotect_flushes_only_if_a_right_went() -> None:
    guest, shell = booted()
    area = resident(guest, shell, 2)
    guest.mprotect(shell, area.start, 2 * PAGE)
    words = Reader(guest).read(guest.take())
    assert words[3:] == [*["XCHG direct", "WRITE direct"] * 2, *["INVLPG user"] * 2]
    guest.mprotect(shell, area.start, 2 * PAGE, write=True)
    words = Reader(guest).read(guest.take())
    assert words[3:] == ["XCHG direct", "WRITE direct"] * 2
    assert shell.space.walk(pages(area.start, 2)).write.all(), "dirty pages that nobody else has are writable at once"


def test_no_rights_at_all_is_an_entry_that_is_not_present() -> None:
    guest, shell = booted()
    area = resident(guest, shell, 2)
    before = shell.space.leaves(area.start, area.end)
    guest.mprotect(shell, area.start, 2 * PAGE, read=False)
    assert len(shell.space.leaves(area.start, area.end)) == 0
    hidden = shell.space.leaves(area.start, area.end, hidden=True)
    assert hidden["gpa"].tolist() == before["gpa"].tolist()
    guest.take()
    guest.trap(shell, [area.start])
    assert int(guest.take()["value"][0]) == 4
    guest.mprotect(shell, area.start, 2 * PAGE, write=True)
    assert shell.space.leaves(area.start, area.end)["bits"].tolist() == before["bits"].tolist()
    assert len(shell.mm.vmas) == len({vma.start for vma in shell.mm.vmas})


def test_mprotect_of_a_part_splits_and_joins_mappings() -> None:
    guest, shell = booted()
    area = resident(guest, shell, 6)
    count = len(shell.mm.vmas)
    guest.mprotect(shell, area.start + 2 * PAGE, PAGE)
    assert len(shell.mm.vmas) == count + 2
    guest.mprotect(shell, area.start + 2 * PAGE, PAGE, write=True)
    assert len(shell.mm.vmas) == count


def test_mremap_moves_page_tables_where_it_can() -> None:
    guest, shell = booted()
    area = guest.mmap(shell, 4 * MIB, gva=0x40_0000_0000)
    guest.touch(shell, pages(area.start, 1024), write=True)
    guest.take()
    where = shell.space.walk([area.start + 5 * PAGE]).gpa
    guest.mremap(shell, area, 0x50_0000_0000)
    stores = table_stores(guest, guest.take(), shell)
    assert not [store for store in stores if store[1] == 1], "no entry of a page table is touched"
    assert (shell.space.walk([0x50_0000_0000 + 5 * PAGE]).gpa == where).all()
    moved = shell.vma(0x50_0000_0000)
    guest.mremap(shell, moved, 0x60_0000_1000)
    rows = guest.take()
    assert np.count_nonzero(rows["op"] == sk.Op.XCHG) == 1024, "at an odd address each entry moves"


def test_huge_pages_are_zeroed_mapped_and_split() -> None:
    guest, shell = booted()
    area = guest.mmap(shell, 2 * MIB, huge=True)
    guest.take()
    guest.touch(shell, pages(area.start, 512), write=True)
    rows = guest.take()
    assert np.count_nonzero(rows["flags"] & sk.Flag.FAULTS) == 1
    assert np.count_nonzero(rows["op"] == sk.Op.STORE) >= 512
    assert [int(leaf["size"]) for leaf in shell.space.leaves(area.start, area.end)] == [2 * MIB]
    start, end = area.start, area.end
    guest.munmap(shell, start, PAGE)
    assert len(shell.space.leaves(start, end)) == 511


# -- processes --------------------------------------------------------------------------------------------------------


def test_fork_protects_and_copies_entry_by_entry_then_flushes() -> None:
    """As from row 50203 of fork20-demote64: a byte of each of the parent's entries, the child's entry, at last CR3."""
    guest, shell = booted()
    area = resident(guest, shell, 3)
    child = guest.fork(shell)
    rows = guest.take()
    parent_stores = [store for store in table_stores(guest, rows, shell) if store[0] == "AND"]
    # Three pages, and the one of the stack.
    assert parent_stores == [("AND", 1, 0xFF ^ W)] * 4
    copies = child.space.leaves(area.start, area.end)["bits"].tolist()
    assert [bits & 0xFFF for bits in copies] == [P | U | D] * 3, "not writable, not accessed, dirty as before"
    words = Reader(guest).read(rows)
    assert words[-1] == "CR3"
    assert int(rows["value"][-1]) == shell.space.root
    at = np.flatnonzero(rows["op"] == sk.Op.AND)
    assert set(rows["op"][at + 1].tolist()) == {int(sk.Op.WRITE)}


def test_fork_does_not_copy_what_can_be_faulted_in_again() -> None:
    guest, shell = booted()
    guest.touch(shell, pages(guest.layout.program, 32), fetch=True)
    child = guest.fork(shell)
    assert len(child.space.leaves(guest.layout.program, guest.layout.program + 32 * PAGE)) == 0


def test_exit_clears_by_plain_stores_and_leaves_before_it_frees() -> None:
    """As from row 57751 of fork20-demote64: MOV for each entry, the tables unlinked, CR3 of the kernel itself."""
    guest, shell = booted()
    child = guest.fork(shell)
    guest.switch(child)
    guest.touch(child, [child.mm.stack_top - 64], write=True)
    guest.take()
    tables = len(child.space.tables())
    guest.exit(child, shell)
    rows = guest.take()
    assert np.count_nonzero(rows["op"] == sk.Op.XCHG) == 0
    loads = rows[rows["op"] == sk.Op.CR3]["value"].tolist()
    assert loads == [guest.kernel.root, shell.space.root]
    zeros = np.flatnonzero((rows["op"] == sk.Op.WRITE) & (rows["value"] == 0) & (rows["flags"] == 0))
    assert len(zeros) == 1 + tables - 1, "the stack's page, and an entry for each table but the top one"
    assert zeros.max() < np.flatnonzero(rows["op"] == sk.Op.CR3)[0]


def test_exec_loads_the_new_space_before_it_clears_the_old() -> None:
    guest, shell = booted()
    old = shell.space.root
    guest.exec(shell, guest.program(text=4, data=1, bss=0))
    rows = guest.take()
    loads = rows[rows["op"] == sk.Op.CR3]["value"].tolist()
    assert loads[0] == shell.space.root != old
    assert len(loads) == 2, "the second one flushes the tables that the moved stack left"
    first = int(np.flatnonzero(rows["op"] == sk.Op.CR3)[0])
    cleared = np.flatnonzero((rows["op"] == sk.Op.WRITE) & (rows["value"] == 0) & (rows["flags"] == 0))
    assert cleared.min() > first


def test_a_kernel_stack_is_used_again() -> None:
    guest, shell = booted()
    before = guest.memory.frames.free
    for _ in range(5):
        guest.exit(guest.fork(shell), shell)
    # One stack of four pages stays cached.
    assert before - guest.memory.frames.free == 4


# -- CR3, PCID, KPTI --------------------------------------------------------------------------------------------------


def test_kpti_loads_cr3_at_each_way_in_and_out() -> None:
    guest, shell = booted(kpti=True)
    with guest.syscall(shell, "read"):
        pass
    rows = guest.take()
    assert Reader(guest).read(rows) == ["FETCH code", "CR3", "FETCH code", "WRITE vmalloc", "FETCH code", "CR3"]
    assert rows[rows["op"] == sk.Op.CR3]["value"].tolist() == [shell.space.root, shell.space.user_root]
    assert guest.start_sregs[0]["cr3"] == shell.space.user_root


def test_pcid_keeps_what_was_not_flushed() -> None:
    guest, shell = booted(kpti=True, pcid=True)
    with guest.syscall(shell, "read"):
        pass
    guest.take()
    with guest.syscall(shell, "read"):
        pass
    loads = guest.take()
    loads = loads[loads["op"] == sk.Op.CR3]["value"].tolist()
    assert loads == [shell.space.root | 1 | NOFLUSH, shell.space.user_root | 1 | 1 << 11 | NOFLUSH]
    area = resident(guest, shell, 1)
    guest.madvise_dontneed(shell, area.start, PAGE)
    loads = guest.take()
    loads = loads[loads["op"] == sk.Op.CR3]["value"].tolist()
    assert loads[-1] == shell.space.user_root | 1 | 1 << 11, "user code's own entries are flushed on the way out"


def test_six_address_spaces_keep_their_pcid() -> None:
    guest, first = booted(pcid=True)
    others = [guest.spawn() for _ in range(5)]
    for process in [*others, first]:
        guest.switch(process)
    guest.take()
    for process in [*others, first]:
        guest.switch(process)
    loads = guest.take()
    values = loads[loads["op"] == sk.Op.CR3]["value"]
    assert [value >> 63 for value in values.tolist()] == [1] * 6
    assert sorted(int(value) & 0xFFF for value in values) == [1, 2, 3, 4, 5, 6]
    guest.switch(guest.spawn())
    assert int(guest.take()["value"][-2]) >> 63 == 0, "the seventh takes the place of the oldest"


def test_a_flush_elsewhere_makes_a_pcid_stale() -> None:
    guest, first = booted(pcid=True, cpus=2)
    thread = guest.thread(first)
    other = guest.spawn()
    guest.switch(thread, 1)
    guest.switch(other, 1)
    area = resident(guest, first, 1)
    guest.madvise_dontneed(first, area.start, PAGE)
    guest.take()
    guest.switch(thread, 1)
    loads = guest.take()
    assert int(loads[loads["op"] == sk.Op.CR3]["value"][0]) >> 63 == 0


def test_a_shootdown_interrupts_who_runs_it() -> None:
    guest, first = booted(cpus=3)
    thread = guest.thread(first)
    guest.switch(thread, 1)
    area = resident(guest, first, 1)
    guest.run(first)
    guest.take()
    guest.madvise_dontneed(first, area.start, PAGE)
    rows = guest.take()
    read = list(zip(rows["vcpu"].tolist(), Reader(guest).read(rows), strict=True))
    at = read.index((0, "INVLPG user"))
    assert read[at + 1] == (0, "IO")
    assert [what for cpu, what in read[at + 2 :] if cpu == 1] == ["INTR", *WAY_IN, "INVLPG user"]
    assert not [what for cpu, what in read if cpu == 2], "nobody runs it there"


def test_a_pae_guest_has_its_directories_from_the_start() -> None:
    """The CPU reads PDPTEs only when CR3 is loaded: a new one later would not be seen."""
    guest, shell = booted(mode="pae")
    tops = guest.memory.table(shell.space.root)[:4]
    assert (tops & np.uint64(P) != 0).all()
    area = resident(guest, shell, 8)
    guest.munmap(shell, area.start, 8 * PAGE)
    assert (guest.memory.table(shell.space.root)[:4] == tops).all()


# -- the kernel's own half --------------------------------------------------------------------------------------------


def test_vfree_waits_for_company() -> None:
    guest, _ = booted(lazy_vfree=8)
    first, second = guest.vmalloc(4), guest.vmalloc(8)
    guest.take()
    guest.vfree(first, 4)
    words = Reader(guest).read(guest.take())
    assert words.count("XCHG direct") == 4
    assert "INVLPG vmalloc" not in words
    guest.vfree(second, 8)
    assert Reader(guest).read(guest.take()).count("INVLPG vmalloc") == 4 + 1 + 8
    assert guest.vmalloc(4) == first


def test_many_kernel_pages_are_flushed_by_cr4() -> None:
    guest, _ = booted(lazy_vfree=0, cpus=2)
    gva = guest.vmalloc(40)
    guest.take()
    guest.vfree(gva, 40)
    rows = guest.take()
    loads = rows[rows["op"] == sk.Op.CR4]
    assert loads["vcpu"].tolist() == [0, 0, 1, 1]
    assert [int(value) & 1 << 7 for value in loads["value"]] == [0, 1 << 7] * 2


def test_set_memory_splits_the_direct_map() -> None:
    guest, _ = booted()
    guest.set_memory(0, 1, write=False)
    found = guest.kernel.walk([guest.layout.direct, guest.layout.direct + PAGE])
    assert found.write.tolist() == [False, True]
    assert found.level.tolist() == [1, 1]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, p: g.mmap(p, 100), "mmap: size 0x64 is not a multiple of 0x1000"),
        (lambda g, p: g.mmap(p, PAGE, gva=g.layout.program), r"<Vma 0x400000-0x401000 rw-p> overlaps"),
        (lambda g, p: g.mmap(p, PAGE, gva=1 << 47), "mmap: 0x800000000000 is no place"),
        (lambda g, p: g.mmap(p, PAGE, huge=True), "mmap: size 0x1000 is not a multiple of 0x200000"),
        (lambda g, p: g.mmap(p, 2 * MIB, huge=True, shared=True), "huge pages are for private anonymous memory"),
        (lambda g, p: g.mmap(p, 3 * PAGE, file=g.file(2)), "mmap: pages 0 to 3 of a file of 2"),
        (lambda g, p: g.munmap(p, 1, PAGE), "munmap: 0x1 and 0x1000 bytes are not multiples"),
        (lambda g, p: g.touch(p, [0x1000]), "process 1 has nothing mapped at 0x1000"),
        (
            lambda g, p: g.touch(p, [g.layout.program], write=True),
            "process 1: store at 0x400000, which <Vma",
        ),
        (lambda g, p: g.touch(p, [p.mm.stack_top - 8], fetch=True), "process 1: fetch at"),
        (lambda g, p: g.touch(p, [1], write=True, fetch=True), "a fetch does not write"),
        (lambda g, p: g.trap(p, [p.mm.stack_top - 8]), "trap: process 1 may do so"),
        (lambda g, p: g.switch(p, 3), "cpu 3: the guest has 1"),
        (lambda g, p: g.exit(p, p), "cannot run then"),
        (lambda g, p: (g.thread(p), g.exec(p, g.program())), "exec: 2 tasks share the address space"),
        (lambda g, _: g.file(0), "file 'file': 0 pages"),
        (lambda g, _: g.vfree(g.layout.vmalloc, 5), "vfree: 5 pages at"),
        (lambda g, _: g.ioremap(0x1000), "ioremap: 0x1000 is not a page beyond memory"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    guest, shell = booted()
    with pytest.raises(sk.ConfigError, match=message):
        call(guest, shell)


def test_settings_that_are_not_there() -> None:
    with pytest.raises(sk.ConfigError, match="Linux has no setting 'cpu'; did you mean 'cpus'"):
        Linux(cpu=2)
    with pytest.raises(sk.ConfigError, match="mode '3-level': there are"):
        Linux(mode="3-level")
    with pytest.raises(sk.ConfigError, match="seed -1 is below 0"):
        Settings(seed=-1).check()
    guest, shell = booted()
    guest.exit(guest.fork(shell), shell)
    assert "1 processes" in repr(guest)
    assert "on CPU 0" in repr(shell)
