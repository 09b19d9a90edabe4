"""translate and walk against QEMU's monitor: page tables of real kernels, leaf by leaf, and a real dump's registers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conformance.pictures import FLAG_BITS, FLAGS, IMAGES, NOWHERE, load

import shadowkvm as sk
from shadowkvm import PageFlag, WalkFault

MACHINES = sorted(path.name.removesuffix(".npz.xz") for path in IMAGES.glob("*.npz.xz"))
PHYSICAL = np.uint64((1 << 52) - 1)
BITS = {"A": PageFlag.ACCESSED, "D": PageFlag.DIRTY, "G": PageFlag.GLOBAL}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_leaf(machine: str) -> None:
    """Where each leaf of `info tlb` leads, its A, D and G bits, and by walk() the entry itself."""
    for number, picture in enumerate(load(IMAGES / f"{machine}.npz.xz")):
        image = sk.PhysicalMemory(picture.segments())
        cr3, nx = picture.registers["cr3"], bool(picture.registers["efer"] & 0x800)
        found = sk.translate(image, cr3, picture.leaves["va"], mode=picture.mode, nx=nx)
        assert len(found.gpa) > 1000
        assert found.ok.all()
        assert (found.gpa == picture.leaves["pa"] & PHYSICAL).all()
        for name, bit in BITS.items():
            said = (picture.leaves["flags"] >> FLAGS.index(name) & 1).astype(bool)
            assert ((found.flags & bit != 0) == said).all(), name
        for leaf in picture.leaves[:: 400 + number]:
            walk = sk.walk(image, cr3, int(leaf["va"]), mode=picture.mode, nx=nx)
            entry = walk.steps[-1].entry
            assert entry is not None
            shown = sum(1 << bit for bit, name in enumerate(FLAGS) if entry >> FLAG_BITS[name] & 1)
            # PAT of a small page stands where PS stands above.
            ignored = 1 << FLAGS.index("P") if walk.level == 1 else 0
            assert (shown ^ int(leaf["flags"])) & ~ignored == 0


@pytest.mark.parametrize("machine", MACHINES)
def test_single_addresses(machine: str) -> None:
    """`gva2gpa`, of addresses that lead somewhere and that do not."""
    for picture in load(IMAGES / f"{machine}.npz.xz"):
        nx = bool(picture.registers["efer"] & 0x800)
        va, pa = picture.samples["va"], picture.samples["pa"]
        found = sk.translate(picture.segments(), picture.registers["cr3"], va, mode=picture.mode, nx=nx)
        assert (found.ok == (pa != NOWHERE)).all()
        assert (found.gpa[found.ok] == pa[found.ok]).all()
        assert 100 < found.ok.sum() < len(va) - 100


@pytest.mark.parametrize("machine", MACHINES)
def test_rights(machine: str) -> None:
    """`info mem`: user and write over all levels, at the ends and in the middle of each range."""
    for picture in load(IMAGES / f"{machine}.npz.xz"):
        ranges = picture.ranges
        span = ranges["end"] - ranges["start"]
        at = np.stack([ranges["start"], ranges["start"] + (span // 2 & ~np.uint64(4095)), ranges["end"] - np.uint64(1)])
        nx = bool(picture.registers["efer"] & 0x800)
        found = sk.translate(picture.segments(), picture.registers["cr3"], at, mode=picture.mode, nx=nx)
        assert found.ok.all()
        assert found.gpa.shape == at.shape
        assert ((found.flags & PageFlag.USER != 0) == ranges["user"]).all()
        assert ((found.flags & PageFlag.WRITE != 0) == ranges["write"]).all()


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of a guest of 256 MiB as QEMU 7.2 wrote it: its own first bytes, then the memory, all zeros (a hole)."""
    path = tmp_path_factory.mktemp("dump") / "guest.elf"
    with path.open("wb") as file:
        file.write((IMAGES / "qemu-dump-head.elf").read_bytes())
        file.truncate(285_345_848)
    return path


def test_a_dump_of_qemu(dump: Path) -> None:
    """Ranges as the machine has them; registers as `info registers -a` showed them when it was made."""
    image = sk.open_image(dump)
    assert [(base, len(data)) for base, data in image.segments] == [
        (0, 0xA0000), (0xC0000, 0xFF40000), (0xFD000000, 0x1000000), (0xFFFC0000, 0x40000),
    ]  # fmt: skip
    assert [cpu[:4] for cpu in image.cpus] == [
        (0x80050033, 0x2A10000, 0x3506F0, "4-level"),
        (0x80050033, 0x2A10000, 0x3506E0, "4-level"),
    ]
    assert image.cpus[0].rip == 0xFFFF_FFFF_8103_FC9B


def test_tables_in_a_dump_of_qemu(dump: Path) -> None:
    """Table entries are found where the program headers put them."""
    offset = 657_464 - 0xC0000
    with dump.open("r+b") as file:
        for gpa, entry in {0x2A10000 + 8 * 273: 0x4401067, 0x4401000: 0x4402067, 0x4402048: 0x80000000012001E3}.items():
            file.seek(offset + gpa)
            file.write(entry.to_bytes(8, "little"))
    image = sk.open_image(dump)
    found = sk.walk(image, image.cpus[0].cr3, 0xFFFF_8880_0123_4567)
    assert (found.gpa, found.level, found.fault) == (0x1234567, 2, WalkFault.NONE)
    assert [step.table for step in found.steps] == [0x2A10000, 0x4401000, 0x4402000]
