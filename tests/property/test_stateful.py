"""The package against a second, independent implementation of x86's TLB rules, written in plain Python.

Hypothesis drives a VM: a guest that edits its tables, flushes or forgets to, and uses what it maps. The model walks the
guest's tables and remembers every value of every entry. Whatever the VM lets the guest do must follow from values that
were there at some time since the last flush that covers the address; a guest fault must be the one that the tables give
now; and the audit must hold after each step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import shadowkvm as sk

PAGE = 4096
ADDRESS = 0x000F_FFFF_FFFF_F000
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
WP, PG_PE = 1 << 16, 0x8000_0033
SMEP, SMAP = 1 << 20, 1 << 21

# Frames: 1 to 5 the identity map of 4 MiB, 6 and 7 roots, 8 a PDPT, 9 and 10 directories, 11 to 14 page tables,
# 32 to 39 data.
ROOTS, TABLES, DATA = (6, 7), (11, 12, 13, 14), tuple(range(32, 40))
FLAGS = (0x67, 0x67, 0x67, 0x63, 0x65, 0x61, 0x27, 0x07, 0x47, NX | 0x67, 0x66)
BASE = 1 << 39


def first_image() -> dict[int, int]:
    """The guest's tables: address -> entry."""
    words = {0x1000: 0x2067, 0x2000: 0x3067, 0x3000: 0x4067, 0x3008: 0x5067}
    words |= {0x4000 + 8 * gfn: gfn << 12 | (0x67 if gfn >= 32 else 0x63) for gfn in range(1024)}
    for root in ROOTS:
        words |= {root << 12: 0x2067, (root << 12) + 8: 0x8067}
    words |= {0x8000: 0x9067, 0x8008: 0xA067}
    for i in range(4):
        words |= {0x9000 + 8 * i: (11 + i) << 12 | 0x67, 0xA000 + 8 * i: (11 + (i + 1) % 4) << 12 | 0x65}
    words |= {0x9020: 0x20_00E7, 0xA020: 0x20_00A5}
    for table in TABLES:
        words |= {(table << 12) + 8 * i: DATA[(table + i) % 8] << 12 | FLAGS[(table + i) % 7] for i in range(6)}
    return words


@dataclass(frozen=True)
class Access:
    """One access: what the guest does there, and who."""

    address: int
    kind: str
    user: bool
    ac: bool = False


@dataclass
class Translation:
    """What the entries on the way to a page say together."""

    gfn: int = 0
    rights: int = W | U
    execute: bool = True
    accessed: bool = True
    dirty: bool = True

    def through(self, entry: int) -> Translation:
        """With one more entry on the way."""
        return Translation(
            gfn=(entry & ADDRESS) >> 12,
            rights=self.rights & entry,
            execute=self.execute and not entry & NX,
            accessed=self.accessed and bool(entry & A),
            dirty=bool(entry & D),
        )


class Model:
    """Plain walks, the history of each entry, and when each vCPU last flushed what."""

    def __init__(self, vcpus: int) -> None:
        self.now = 0
        self.words = defaultdict(int, first_image())
        # Address of the entry -> (value, from, to).
        self.past: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.since: dict[int, int] = defaultdict(int)
        self.root = [ROOTS[0]] * vcpus
        self.wp, self.smep, self.smap = [True] * vcpus, [False] * vcpus, [False] * vcpus
        self.flushed = [0] * vcpus
        self.flushed_pages: list[dict[int, int]] = [{} for _ in range(vcpus)]

    # -- memory ---------------------------------------------------------------------------------------------------

    def change(self, address: int, value: int) -> None:
        old = self.words[address]
        self.past[address].append((old, self.since[address], self.now))
        # For a moment, while the operation used the entry, it may have had A and D.
        self.past[address].append((old | A | D, self.now, self.now))
        self.since[address] = self.now
        self.words[address] = value

    def versions(self, address: int, since: int) -> list[tuple[int, int]]:
        """Values of an entry at some time since then, each with the time when it came to be."""
        found = [(value, start) for value, start, end in self.past[address] if end >= since]
        return [*found, (self.words[address], self.since[address])]

    # -- walks ----------------------------------------------------------------------------------------------------

    def permits(self, vcpu: int, access: Access, page: Translation) -> bool:
        write = page.rights & W or not (access.user or self.wp[vcpu])
        if (access.kind == "write" and not write) or (access.kind == "fetch" and not page.execute):
            return False
        if access.user:
            return bool(page.rights & U)
        guard = self.smep[vcpu] if access.kind == "fetch" else self.smap[vcpu] and not access.ac
        return not (page.rights & U and guard)

    def fault(self, vcpu: int, access: Access) -> int | None:
        """The error code that the tables of now give, or None."""
        table, page, present = self.root[vcpu], Translation(), 0
        for level in (4, 3, 2, 1):
            entry = self.words[(table << 12) + 8 * (access.address >> (3 + 9 * level) & 511)]
            if not entry & P:
                break
            page, table = page.through(entry), (entry & ADDRESS) >> 12
            if level == 1 or (level == 2 and entry & PS):
                if self.permits(vcpu, access, page):
                    return None
                present = 1
                break
        return present | {"read": 0, "write": 2, "fetch": 16}[access.kind] | (4 if access.user else 0)

    def leaf_entry(self, vcpu: int, address: int) -> int | None:
        """Where the last-level entry for an address stands now."""
        table = self.root[vcpu]
        for level in (4, 3, 2):
            entry = self.words[(table << 12) + 8 * (address >> (3 + 9 * level) & 511)]
            if not entry & P or (level == 2 and entry & PS):
                return None
            table = (entry & ADDRESS) >> 12
        return (table << 12) + 8 * (address >> 12 & 511)

    def frames(self, vcpu: int, access: Access) -> set[int]:
        """The frames to which the access may go by any walk since the last flush that covers it."""
        since = max(self.flushed[vcpu], self.flushed_pages[vcpu].get(access.address >> 12, 0))
        found: set[int] = set()
        self._below(vcpu, access, (4, self.root[vcpu], since, Translation()), found)
        return found

    def _below(self, vcpu: int, access: Access, at: tuple[int, int, int, Translation], found: set[int]) -> None:
        level, table, since, page = at
        # An upper entry may be remembered; the entry below it is then read later, never earlier.
        for entry, start in self.versions((table << 12) + 8 * (access.address >> (3 + 9 * level) & 511), since):
            if not entry & P:
                continue
            here = page.through(entry)
            if level == 1 or (level == 2 and entry & PS):
                offset = access.address >> 12 & 511 if level == 2 else 0
                if self.permits(vcpu, access, here):
                    found.add(here.gfn + offset)
            else:
                self._below(vcpu, access, (level - 1, here.gfn, max(since, start), here), found)


vcpus = st.integers(0, 1)
indexes = st.integers(0, 5)
pages = st.builds(
    lambda l3, l2, l1: BASE | l3 << 30 | l2 << 21 | l1 << 12, st.integers(0, 1), st.integers(0, 4), indexes
)
offsets = st.sampled_from([0, 8, 64, 0xFF8])
leaf_entries = st.builds(
    lambda gfn, flags: gfn << 12 | flags, st.sampled_from([*DATA, *TABLES]), st.sampled_from(FLAGS)
)
upper_entries = st.builds(lambda gfn, flags: gfn << 12 | flags, st.sampled_from(TABLES), st.sampled_from(FLAGS))


class Guest(RuleBasedStateMachine):
    """A VM with two vCPUs, and the model beside it."""

    @initialize(profile=st.sampled_from(["zen", "qemu-tcg"]), policy=st.sampled_from([None, "no_unsync"]))
    def start(self, profile: str, policy: str | None) -> None:
        self.vm = sk.Vm(memory=4 << 20, vcpus=2, profile=profile, policy=policy)
        self.model = Model(vcpus=2)
        for address, entry in self.model.words.items():
            self.vm.write_memory(address, entry.to_bytes(8, "little"))
        for frame in DATA:
            # Each word of each page is one of its own; loads tell where they went.
            words = b"".join((frame << 40 | word << 20).to_bytes(8, "little") for word in range(512))
            self.vm.write_memory(frame << 12, words)
            self.model.words.update({(frame << 12) + 8 * i: frame << 40 | i << 20 for i in range(512)})
        self.cr0, self.cr4 = [WP | PG_PE] * 2, [0x20] * 2
        for cpu in self.vm.vcpus:
            cpu.set_sregs(cr3=ROOTS[0] << 12)

    def word(self, address: int) -> int:
        return int.from_bytes(self.vm.read_memory(address, 8), "little")

    def observe(self) -> None:
        """Take over what changed in the tables: stores, and A and D."""
        for frame in range(1, 15):
            memory = self.vm.read_memory(frame << 12, PAGE)
            for offset in range(0, PAGE, 8):
                value = int.from_bytes(memory[offset : offset + 8], "little")
                if value != self.model.words[(frame << 12) + offset]:
                    self.model.change((frame << 12) + offset, value)

    # -- what the guest does ----------------------------------------------------------------------------------------

    def finish(self, vcpu: int, access: Access, outcome: sk.Outcome, expected: int | None) -> set[int]:
        """Hold an outcome to the model; return the frames to which the access may have gone."""
        model = self.model
        before = model.frames(vcpu, access)
        model.now += 1
        self.observe()
        if outcome.status == "page_fault":
            assert outcome.address >> 12 == access.address >> 12
            assert outcome.error_code in {expected, model.fault(vcpu, access)}, "the tables of now give another fault"
            if outcome.error_code & P:
                model.flushed_pages[vcpu][access.address >> 12] = model.now
            return set()
        assert outcome.status == "done"
        allowed = before | model.frames(vcpu, access)
        assert allowed, "no walk since the last flush allows this"
        return allowed

    @rule(vcpu=vcpus, page=pages, offset=offsets, user=st.booleans(), ac=st.booleans())
    def read(self, vcpu: int, page: int, offset: int, user: bool, ac: bool) -> None:
        access = Access(page | offset, "read", user, ac)
        expected = self.model.fault(vcpu, access)
        outcome = self.vm.vcpus[vcpu].read(page | offset, user=user, ac=ac)
        allowed = self.finish(vcpu, access, outcome, expected)
        if allowed:
            values = {self.word(gfn << 12 | offset) & ~(A | D) for gfn in allowed}
            assert outcome.value & ~(A | D) in values

    @rule(vcpu=vcpus, page=pages, offset=offsets, user=st.booleans(), kind=st.sampled_from(["mov", "push"]))
    def write(self, vcpu: int, page: int, offset: int, user: bool, kind: str) -> None:
        access = Access(page | offset, "write", user)
        expected = self.model.fault(vcpu, access)
        value = 0x77 << 52 | self.model.now << 8
        outcome = self.vm.vcpus[vcpu].write(page | offset, value, user=user, kind=kind)
        allowed = self.finish(vcpu, access, outcome, expected)
        if allowed:
            gone_to = [gfn for gfn in allowed if self.word(gfn << 12 | offset) == value]
            assert gone_to
            self.model.words[gone_to[0] << 12 | offset] = value

    @rule(vcpu=vcpus, page=pages, user=st.booleans())
    def fetch(self, vcpu: int, page: int, user: bool) -> None:
        access = Access(page, "fetch", user)
        expected = self.model.fault(vcpu, access)
        self.finish(vcpu, access, self.vm.vcpus[vcpu].fetch(page, user=user), expected)

    def edit(self, vcpu: int, address: int, entry: int) -> None:
        """A store to a table through the identity map, which nobody edits."""
        assert self.vm.vcpus[vcpu].write(address, entry).status == "done"
        self.model.now += 1
        self.observe()

    # Under SMAP and AC=0 the identity map of the tables, a supervisor's, works as before.
    @rule(vcpu=vcpus, table=st.sampled_from(TABLES), index=indexes, entry=leaf_entries)
    def map_page(self, vcpu: int, table: int, index: int, entry: int) -> None:
        self.edit(vcpu, (table << 12) + 8 * index, entry)

    @rule(
        vcpu=vcpus,
        editor=vcpus,
        page=pages,
        entry=st.one_of(leaf_entries, st.just(0)),
        flush=st.sampled_from(["", "", "invlpg", "cr3"]),
        store=st.booleans(),
    )
    def remap(self, *, vcpu: int, editor: int, page: int, entry: int, flush: str, store: bool) -> None:
        """Use a page, change its entry, flush or forget it, use the page again."""
        address = self.model.leaf_entry(vcpu, page)
        if address is None or address >> 12 not in TABLES:
            return
        self.read(vcpu, page, 8, user=False, ac=True)
        self.edit(editor, address, entry)
        if flush == "invlpg":
            self.invlpg(vcpu, page)
        elif flush == "cr3":
            self.load_cr3(vcpu, self.model.root[vcpu])
        if store:
            self.write(vcpu, page, 8, user=False, kind="mov")
        self.read(vcpu, page, 8, user=False, ac=True)

    @rule(vcpu=vcpus, table=st.sampled_from(TABLES), index=indexes)
    def unmap_page(self, vcpu: int, table: int, index: int) -> None:
        self.edit(vcpu, (table << 12) + 8 * index, 0)

    @rule(vcpu=vcpus, directory=st.sampled_from([9, 10]), index=st.integers(0, 3), entry=upper_entries)
    def link_table(self, vcpu: int, directory: int, index: int, entry: int) -> None:
        self.edit(vcpu, (directory << 12) + 8 * index, entry)

    @rule(vcpu=vcpus, page=pages)
    def invlpg(self, vcpu: int, page: int) -> None:
        self.vm.vcpus[vcpu].invlpg(page)
        self.model.now += 1
        self.model.flushed_pages[vcpu][page >> 12] = self.model.now

    @rule(vcpu=vcpus, root=st.sampled_from(ROOTS))
    def load_cr3(self, vcpu: int, root: int) -> None:
        self.vm.vcpus[vcpu].load_cr3(root << 12)
        self.model.now += 1
        self.model.root[vcpu], self.model.flushed[vcpu] = root, self.model.now

    @rule(vcpu=vcpus, bit=st.sampled_from([SMEP, SMAP]))
    def toggle_cr4(self, vcpu: int, bit: int) -> None:
        self.cr4[vcpu] ^= bit
        self.vm.vcpus[vcpu].load_cr4(self.cr4[vcpu])
        self.model.now += 1
        if bit == SMEP and self.cr4[vcpu] & SMEP:
            self.model.flushed[vcpu] = self.model.now
        self.model.smep[vcpu], self.model.smap[vcpu] = bool(self.cr4[vcpu] & SMEP), bool(self.cr4[vcpu] & SMAP)

    @precondition(lambda self: not any(self.model.smap))
    @rule(vcpu=vcpus)
    def toggle_wp(self, vcpu: int) -> None:
        self.cr0[vcpu] ^= WP
        self.vm.vcpus[vcpu].load_cr0(self.cr0[vcpu])
        self.model.now += 1
        self.model.wp[vcpu] = bool(self.cr0[vcpu] & WP)

    # -- after each -------------------------------------------------------------------------------------------------

    @invariant()
    def the_audit_holds(self) -> None:
        if hasattr(self, "vm"):
            self.vm.audit()


TestGuest = Guest.TestCase
TestGuest.settings = settings(max_examples=100, stateful_step_count=50)
