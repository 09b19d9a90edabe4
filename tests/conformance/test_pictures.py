"""The engine's guest walk against QEMU's monitor: page tables of real kernels, leaf by leaf.

Each leaf of a picture is accessed once on a VM that holds its table pages; the walk's events say which entries were
read, on which level it ended, and for which frame an entry was asked for. So level, frame and flags are all compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from tests.conformance.pictures import FLAG_BITS, FLAGS, IMAGES, NOWHERE, Picture, load

import shadowkvm as sk

MACHINES = sorted(path.name.removesuffix(".npz.xz") for path in IMAGES.glob("*.npz.xz"))
EVENTS = ["kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_walker_error", "kvm_mmu_spte_requested"]
# In PAE mode the monitor shows bit 63 of the entry (not executable) as a part of the address.
PHYSICAL = np.uint64((1 << 52) - 1)
LEVELS = {4096: 1, 2 << 20: 2, 4 << 20: 2, 1 << 30: 3}


@cache
def pictures(machine: str) -> list[Picture]:
    return load(IMAGES / f"{machine}.npz.xz")


def machine_of(picture: Picture) -> sk.Vm:
    """A VM with the table pages where they were, and the picture's registers. All frames are memory."""
    registers = dict(picture.registers)
    features = {"maxphyaddr": registers.pop("maxphyaddr"), "pcid": True, "la57": True}
    top = 1 << (int((picture.leaves["pa"] & PHYSICAL).max()) | int(picture.frames.max()) << 12).bit_length()
    vm = sk.Vm(max(top, 1 << 30), policy="no_prefetch", features=features, events=EVENTS)
    for gpa, data in picture.segments():
        vm.write_memory(gpa, data)
    if picture.mode == "pae":  # TCG sets A in PDPTEs, where the architecture reserves the bit and KVM refuses it
        pdptes = np.frombuffer(vm.read_memory(registers["cr3"], 32), "<u8")
        vm.write_memory(registers["cr3"], (pdptes & ~np.uint64(0x20)).tobytes())
    # The monitor shows what the tables say: features of the CPU that KVM has no part in are left out.
    known = 0x7FF | 1 << 12 | 1 << 17 | 1 << 20 | 1 << 21
    lma = registers["efer"] & 0x400
    vm.vcpus[0].set_sregs(
        cr0=registers["cr0"],
        cr3=registers["cr3"],
        cr4=registers["cr4"] & known,
        efer=registers["efer"] & 0xD01,
        cs_l=bool(lma),
    )
    return vm


def walked(vm: sk.Vm, gva: int) -> tuple[list[int], int | None]:
    """The entries that a walk for the address reads, from the top down, and the frame that was asked for."""
    entries, frame = attempt(vm, gva)
    if frame is None and not entries:  # a table with several places: an alias was mapped before
        for on in (True, False):
            vm.set_nx_huge_pages(on)  # makes all shadow pages obsolete
        entries, frame = attempt(vm, gva)
    return entries, frame


def attempt(vm: sk.Vm, gva: int) -> tuple[list[int], int | None]:
    vm.clear_events()
    vm.vcpus[0].read(gva, 1, ac=True)
    entries: list[int] = []
    frame = None
    for line in vm.event_text():
        if line.startswith("kvm_mmu_pagetable_walk"):
            entries = []
        elif found := re.match(r"kvm_mmu_paging_element: pte (\w+) level \d", line):
            entries.append(int(found[1], 16))
        elif found := re.match(r"kvm_mmu_spte_requested: gfn (\w+)", line):
            frame = int(found[1], 16)
    return entries, frame


def sizes(picture: Picture) -> Iterator[int]:
    """How much each leaf maps, as its PS flag and the mode tell; 0: 2 MiB or 1 GiB."""
    ps = 1 << FLAGS.index("P")
    large = {"32-bit": 4 << 20, "pae": 2 << 20}
    for leaf in picture.leaves:
        if not int(leaf["flags"]) & ps:
            yield 4096
        elif picture.mode in large:
            yield large[picture.mode]
        else:
            yield 0  # the walk says which, and the alignment must allow it


@pytest.mark.parametrize("machine", MACHINES)
def test_every_leaf(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Level, frame and flags of every leaf that `info tlb` shows."""
    leaves = 0
    for picture in pictures(machine):
        vm = machine_of(picture)
        paged = {"32-bit": 2, "pae": 3, "4-level": 4, "5-level": 5}[picture.mode]
        for leaf, size in zip(picture.leaves, sizes(picture), strict=True):
            va, pa, flags = int(leaf["va"]), int(leaf["pa"] & PHYSICAL), int(leaf["flags"])
            entries, frame = walked(vm, va)
            level = paged - len(entries) + 1
            assert frame == pa >> 12, f"{va:#x}: frame {frame}, the monitor says {pa >> 12:#x}"
            assert size == 0 or level == LEVELS[size], f"{va:#x}: level {level}"
            assert pa % {1: 4096, 2: 2 << 20, 3: 1 << 30}[level] == 0 or picture.mode == "32-bit"
            shown = sum(1 << bit for bit, name in enumerate(FLAGS) if entries[-1] >> FLAG_BITS[name] & 1)
            # A was set by this very walk where the kernel had not used the page; PAT of a small page is no PS.
            ignored = 1 << FLAGS.index("A") | (1 << FLAGS.index("P") if level == 1 else 0)
            assert (shown ^ flags) & ~ignored == 0, f"{va:#x}: flags {shown:#x}, the monitor says {flags:#x}"
            leaves += 1
    with capsys.disabled():
        print(f"\n{machine}: {leaves:,} leaves of {len(pictures(machine))} address spaces agree")
    assert leaves > 1000


@pytest.mark.parametrize("machine", MACHINES)
def test_single_addresses(machine: str) -> None:
    """`gva2gpa`: where an address lies, and that nothing is there."""
    mapped = unmapped = 0
    for picture in pictures(machine):
        vm = machine_of(picture)
        for sample in picture.samples:
            va, pa = int(sample["va"]), int(sample["pa"])
            entries, frame = walked(vm, va)
            if pa == NOWHERE:
                unmapped += 1
                assert frame is None or not entries[-1] & 1, f"{va:#x} leads to {frame:#x}, the monitor says nowhere"
            elif frame is not None:  # else its page was touched before
                mapped += 1
                assert frame == pa >> 12, f"{va:#x}"
    assert mapped > 100
    assert unmapped > 100
