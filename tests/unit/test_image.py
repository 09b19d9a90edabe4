"""PhysicalMemory, open_image, translate and walk: what they take, what they refuse, and what a second reader says."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import SHAPES, Image

import shadowkvm as sk
from shadowkvm import PageFlag, WalkFault

PAGES = 64
ROOT = 0x1000


def tables(entries: dict[int, int], size: int = 0x6000) -> bytearray:
    memory = bytearray(size)
    for gpa, entry in entries.items():
        memory[gpa : gpa + 8] = entry.to_bytes(8, "little")
    return memory


SMALL = {ROOT: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4008: 0x9067, 0x4010: 0x8000_0000_0000_A005}


@given(data=st.data(), mode=st.sampled_from(list(SHAPES)))
def test_random_tables_as_a_second_reader_sees_them(data: st.DataObject, mode: str) -> None:
    """Tables full of wild entries, pointing at each other and at themselves: all that manuals say is compared."""
    width = SHAPES[mode][2]
    seed = data.draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    frames = random.integers(0, PAGES + 4, (PAGES, 4096 // width), np.uint64)
    low = random.choice(np.array([0, 1, 3, 5, 7, 7, 7, 0x67, 0x87, 0x1E7], np.uint64), frames.shape)
    if mode == "pae":
        low[1, :4] = 1  # PDPTEs: rights are reserved
    raw = (frames << np.uint64(12) | low).astype(f"<u{width}")
    if width == 8:
        high = random.random(frames.shape) < 0.2
        if mode == "pae":
            high[1, :4] = False
        raw |= high.astype("<u8") << np.uint64(63)
    blob = raw.tobytes()
    gvas = random.integers(0, 1 << (32 if mode in {"pae", "32-bit"} else 64), 300, np.uint64)
    if mode.endswith("level"):
        span = np.uint64(SHAPES[mode][0] * 9 + 12)
        gvas[20:] &= np.uint64((1 << int(span) - 1) - 1)
    found = sk.translate(blob, ROOT, gvas, mode=mode)
    second = Image((page << 12, blob[page << 12 : (page + 1) << 12]) for page in range(PAGES))
    for gva, gpa, level, flags, fault in zip(gvas.tolist(), *(array.tolist() for array in found), strict=True):
        told = sk.walk(blob, ROOT, gva, mode=mode)
        assert (told.gpa or 0, told.level, told.flags, told.fault) == (gpa, level, flags, fault)
        if fault in {WalkFault.RESERVED, WalkFault.NOT_IN_IMAGE}:
            continue  # the second reader knows of neither
        expected = second.walk(mode, ROOT, gva)
        assert (fault == WalkFault.NONE) == (expected is not None)
        if expected is not None:
            assert gpa == expected.gpa
            rights = (expected.write, expected.user, expected.execute)
            assert tuple(bool(flags & bit) for bit in (PageFlag.WRITE, PageFlag.USER, PageFlag.EXECUTE)) == rights


@pytest.mark.parametrize("threads", [1, 2, 7, None])
def test_threads_give_the_same(threads: int | None) -> None:
    memory = tables(SMALL)
    gvas = np.random.default_rng(1).integers(0, 0x4000, 10_000, np.uint64)
    one, many = sk.translate(memory, ROOT, gvas), sk.translate(memory, ROOT, gvas, threads=threads)
    for field in sk.Translations._fields:
        assert np.array_equal(getattr(one, field), getattr(many, field)), field
    assert 0 < one.ok.sum() < len(gvas)


def test_every_fault() -> None:
    entries = {
        **SMALL,
        ROOT + 8: 0x2007 | 1 << 51,
        0x4018: 0x9067 | 1 << 51,
        ROOT + 16: 0x70_0000_0007,
    }
    memory = tables(entries)
    gvas = [0x1000, 0x3000, 0x2000, 0x5000, 2 << 39, 1 << 47, 1 << 39]
    found = sk.translate(memory, ROOT, gvas, access="write", user=True, maxphyaddr=40)
    assert [WalkFault(fault).name for fault in found.fault] == [
        "NONE", "RESERVED", "FORBIDDEN", "NOT_PRESENT", "NOT_IN_IMAGE", "NOT_CANONICAL", "RESERVED",
    ]  # fmt: skip
    assert found.level.tolist() == [1, 1, 1, 1, 3, 0, 4]
    assert found.gpa.tolist() == [0x9000, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("gva", "rules", "fault"),
    [
        (0x2000, {"access": "write"}, "FORBIDDEN"),
        (0x2000, {"access": "write", "wp": False}, "NONE"),
        (0x2000, {"access": "execute"}, "FORBIDDEN"),
        (0x2000, {"nx": False}, "RESERVED"),
        (0x1000, {"access": "execute", "smep": True}, "FORBIDDEN"),
        (0x1000, {"access": "execute", "smep": True, "user": True}, "NONE"),
        (0x1000, {"smap": True}, "FORBIDDEN"),
    ],
)
def test_rules(gva: int, rules: dict[str, Any], fault: str) -> None:
    assert WalkFault(sk.translate(tables(SMALL), ROOT, [gva], **rules).fault[0]).name == fault
    assert sk.walk(tables(SMALL), ROOT, gva, **rules).fault.name == fault


def test_shapes_and_kinds_of_addresses() -> None:
    memory = tables(SMALL)
    for addresses in (0x1234, [[0x1234]], np.array([0x1234], ">i8"), np.arange(0x1234, 0x2234, 2, dtype=np.int32)[::7]):
        found = sk.translate(memory, ROOT, addresses)
        assert all(array.shape == np.shape(addresses) for array in found)
        assert found.gpa.reshape(-1)[0] == 0x9234
    assert sk.translate(memory, ROOT, []).gpa.shape == (0,)
    top = sk.translate(memory, ROOT, [0xFFFF_FFFF_FFFF_FFFF, 1])
    assert top.fault.tolist() == [WalkFault.NOT_PRESENT, WalkFault.NOT_PRESENT]


def test_kinds_of_memory(tmp_path: Path) -> None:
    memory = tables(SMALL)
    path = tmp_path / "memory.raw"
    path.write_bytes(memory)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        array = np.memmap(path, "<u8", "r")
        pieces = [(0x3000, memory[0x3000:]), (0, memory[:0x3000])]
        kinds = [bytes(memory), memory, memoryview(memory), array, pieces, sk.PhysicalMemory(pieces)]
        for kind in [*kinds, sk.open_image(path)]:
            assert sk.translate(kind, ROOT, [0x1234]).gpa[0] == 0x9234
        assert sk.translate(mapped, ROOT, [0x1234]).gpa[0] == 0x9234


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sk.translate("text", 0, [1]), TypeError, "a buffer, .gpa, buffer. pairs or a PhysicalMemory"),
        (lambda: sk.translate([(0, 5)], 0, [1]), TypeError, "piece 0: .gpa, buffer. is expected"),
        (lambda: sk.translate([5], 0, [1]), TypeError, "piece 0"),
        (lambda: sk.translate(np.zeros((8, 8), "u1")[:, ::2], 0, [1]), TypeError, "contiguous"),
        (lambda: sk.translate(b"", 0, [1.5]), TypeError, "not float64"),
        (lambda: sk.translate(b"", 0, [3, -1]), sk.ConfigError, "address 1: -1 is negative"),
        (lambda: sk.translate(b"", 0, [1 << 63, -1]), sk.ConfigError, "address 1"),
        (lambda: sk.translate(b"", 0, [1 << 64]), sk.ConfigError, "address 0"),
        (lambda: sk.translate(b"", 1 << 64, [1]), sk.ConfigError, "cr3"),
        (lambda: sk.translate(b"", 0, [1], mode="4level"), sk.ConfigError, "did you mean '4-level'"),
        (lambda: sk.translate(b"", 0, [1], access="exec"), sk.ConfigError, "access 'exec'"),
        (lambda: sk.translate(b"", 0, [1], maxphyaddr=20), sk.ConfigError, "maxphyaddr 20 is not from 32 to 52"),
        (lambda: sk.translate(b"", 0, [1], threads=0), sk.ConfigError, "threads 0"),
        (lambda: sk.translate([(0, b"ab"), (1, b"c")], 0, [1]), sk.ConfigError, "0x1 overlaps"),
        (lambda: sk.translate([(2**64 - 1, b"ab")], 0, [1]), sk.ConfigError, "go beyond"),
        (lambda: sk.walk(b"", 0, -1), sk.ConfigError, "gva"),
        (lambda: sk.PhysicalMemory([(0, b"abc")]).read(2, 2), sk.GuestMemoryError, "0x3"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# -- files ----------------------------------------------------------------------------------------------------------


def elf(loads: list[tuple[int, bytes]], *, kind: int = 4, machine: int = 62, notes: bytes = b"") -> bytes:
    """An ELF core file of 64 bits: a PT_NOTE, and a PT_LOAD for each (gpa, content)."""
    count = len(loads) + 1
    at = 64 + 56 * count
    out = b"\x7fELF\x02\x01\x01" + bytes(9)
    out += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    out += struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 0)
    at += len(notes)
    for gpa, content in loads:
        out += struct.pack("<IIQQQQQQ", 1, 0, at, 0, gpa, len(content), len(content), 0)
        at += len(content)
    return out + notes + b"".join(content for _, content in loads)


def note(cr0: int, cr3: int, cr4: int, name: bytes = b"QEMU\0\0\0\0", version: int = 1) -> bytes:
    state = struct.pack("<II18Q", version, 432, *range(18)) + bytes(240) + struct.pack("<5Q", cr0, 0, 0, cr3, cr4)
    state += bytes(8)
    return struct.pack("<III", 5, len(state), 0) + name + state


@pytest.mark.parametrize(
    ("machine", "cr4", "mode"), [(62, 0x20, "4-level"), (62, 0x1020, "5-level"), (3, 0x20, "pae"), (3, 0x10, "32-bit")]
)
def test_the_mode_of_a_dump(tmp_path: Path, machine: int, cr4: int, mode: str) -> None:
    path = tmp_path / "dump.elf"
    notes = note(1 << 31, 0x5000, cr4) + note(0, 0, cr4) + note(0, 1, 0, b"CORE\0\0\0\0") + note(0, 1, 0, version=7)
    path.write_bytes(elf([(0x10_0000, b"x" * 4096), (0, b"y" * 8192)], machine=machine, notes=notes))
    image = sk.open_image(path)
    assert [(base, len(data)) for base, data in image.segments] == [(0, 8192), (0x10_0000, 4096)]
    assert image.read(8190, 2) == b"yy"
    assert image.cpus == ((1 << 31, 0x5000, cr4, mode, 16), (0, 0, cr4, "", 16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x7fELF" + bytes(60), "broken"),
        (b"\x7fELF\x02\x01\x01" + bytes(9), "broken"),
        (elf([(0, b"x" * 4096)])[:-1], "cut off"),
        (elf([(0, b"x" * 4096)], kind=2), "ET_EXEC"),
        (elf([(0, b"x" * 4096)], machine=183), "EM_AARCH64"),
        (elf([]), "no memory"),
        (elf([(0, b"x")], notes=struct.pack("<IIII", 0xFFFF_FFFF, 0xFFFF_FFFF, 0, ~0 & 0xFFFF_FFFF)), "broken"),
        (b"KDUMP   " + bytes(100), "compressed kdump"),
        (b"EMiL" + bytes(100), "LiME"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    with pytest.raises(sk.TraceError, match=message) as refused:
        sk.open_image(path)
    assert str(path) in str(refused.value)


@given(st.data())
def test_broken_elf_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any byte of the headers changed, and any cut: an image, or a refusal."""
    whole = bytearray(elf([(0, b"x" * 64), (4096, b"y" * 64)], notes=note(1 << 31, 0, 0x20)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.elf"
    path.write_bytes(whole[: data.draw(st.integers(64, len(whole)))])
    try:
        image = sk.open_image(path)
    except (sk.TraceError, sk.ConfigError):
        return
    assert image.size <= len(whole)
