"""Import of the recorder's raw files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shadowkvm.errors import TraceError
from shadowkvm.ops import NO_PAGE, PAGE_SIZE, Flag, Op
from shadowkvm.trace import RAW_DTYPE, Chunk, Recording, import_raw
from shadowkvm.trace import stream as stream_module
from shadowkvm.trace.raw import RawOp

START: list[dict[str, int]] = [
    {"op": RawOp.CR0, "val": 0x8005_0033, "x": 1},
    {"op": RawOp.CR4, "val": 0x35_06F0, "x": 1},
    {"op": RawOp.EFER, "val": 0xD01, "x": 1},
    {"op": RawOp.CR3, "val": 0x1000, "x": 1},
]


def raw_array(records: list[dict[str, int]]) -> NDArray[np.void]:
    raw = np.zeros(len(records), RAW_DTYPE)
    for row, record in zip(raw, records, strict=True):
        for field, value in record.items():
            row[field] = value
    return raw


def pages_bytes(*gfns: int) -> bytes:
    return b"".join(gfn.to_bytes(4, "little") + bytes([gfn % 256]) * PAGE_SIZE for gfn in gfns)


class Raw:
    """A raw recording in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out.npz"

    def run(
        self, *records: dict[str, int], pages: bytes = b"", start: Any = START, cut: int = 0, **options: Any
    ) -> Any:
        data = raw_array([*start, *records]).tobytes()
        (self.folder / "a.rec").write_bytes(data[: len(data) - cut])
        (self.folder / "a.pages").write_bytes(pages)
        return import_raw(self.folder / "a.rec", self.folder / "a.pages", self.out, **options)

    def rows(self) -> Chunk:
        with Recording.open(self.out) as recording:
            recording.verify()
            return recording.to_arrays()


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path)


def test_each_raw_op(raw: Raw) -> None:
    gva = 0xFFFF_8880_0123_4568
    meta = raw.run(
        {"op": RawOp.PTPAGE, "gfn": 7, "x": 1, "dins": 3},
        {"op": RawOp.FETCH, "addr": gva + 1, "gfn": 5, "flags": 1, "dins": 4},
        {"op": RawOp.READ, "addr": gva, "gfn": 6, "flags": 16},
        {"op": RawOp.WRITE, "addr": gva + 4, "gfn": 6, "flags": 4},
        {"op": RawOp.PTSTORE, "addr": gva, "val": 2**64 - 1, "gfn": 7, "size": 8, "x": 0x568},
        {"op": RawOp.WRITE, "addr": gva, "gfn": 0xFEE00, "flags": 8},
        {"op": RawOp.CR3, "val": 0x2000},
        {"op": RawOp.INVLPG, "addr": gva},
        {"op": RawOp.INTR, "vec": 236},
        {"op": RawOp.CLTS},
        {"op": RawOp.MARK, "val": 2},
        pages=pages_bytes(9, 7),
        name="each",
        meta={"guest": "made up"},
    )
    rows, gfn, dins = raw.rows()
    assert rows["op"].tolist() == [
        Op.PAGE, Op.FETCH, Op.READ, Op.WRITE, Op.WRITE, Op.WRITE, Op.CR3, Op.INVLPG, Op.INTR, Op.CLTS, Op.MARK
    ]  # fmt: skip
    assert rows["addr"].tolist() == [0x7000, gva + 1, gva, gva + 4, gva, gva, 0, gva, 0, 0, 0]
    assert rows["value"].tolist() == [1, 0, 0, 0, 2**64 - 1, 0, 0x2000, 0, 236, 0, 2]
    assert rows["size"].tolist() == [0, 1, 8, 4, 8, 4, 0, 0, 0, 0, 0]
    assert rows["flags"].tolist() == [0, 1, 16, Flag.AC | Flag.KEEP, 0, Flag.MMIO | Flag.KEEP, 0, 0, 0, 0, 0]
    assert gfn.tolist() == [7, 5, 6, 6, 7, 0xFEE00, *[NO_PAGE] * 5]
    assert dins.tolist() == [3, 4, *[0] * 9]
    assert meta["sregs"] == {"cr0": 0x8005_0033, "cr3": 0x1000, "cr4": 0x35_06F0, "efer": 0xD01}
    assert (meta["name"], meta["guest"], meta["mode"]) == ("each", "made up", "64-bit, 4-level")
    assert meta["memory"] == 8 * PAGE_SIZE
    assert meta["instructions"] == 7
    assert meta["raw_counts"]["CR3"] == 2
    assert meta["counts"]["CR3"] == 1
    with Recording.open(raw.out) as recording:
        assert list(recording.pages) == [bytes([9]) * PAGE_SIZE, bytes([7]) * PAGE_SIZE]


@pytest.mark.parametrize(
    ("code", "op", "flags"),
    [
        (0, Op.READ, 0),
        (2, Op.WRITE, Flag.KEEP),
        (4, Op.READ, Flag.USER),
        (7, Op.WRITE, Flag.KEEP | Flag.USER),
        (0x14, Op.FETCH, Flag.USER),
        (0x11, Op.FETCH, 0),
    ],
)
def test_a_guest_fault_is_the_access_that_its_code_tells(raw: Raw, code: int, op: Op, flags: int) -> None:
    meta = raw.run({"op": RawOp.PF, "addr": 0x40_0FFF, "val": code, "flags": code >> 2 & 1, "vec": 14})
    row = raw.rows().rows[0]
    assert (row["op"], row["flags"], row["value"]) == (op, flags | Flag.FAULTS, code)
    assert (row["addr"], row["size"]) == (0x40_0FFF, 1)
    assert meta["faults"] == 1


@pytest.mark.parametrize(
    ("highest", "device", "pages"),
    [(0, 0xFEE00, 1), (1, 0xFEE00, 2), (0x7CDC, 0xFEE00, 0x8000), (0xBFFFF, 0xC0000, 0xC0000)],
)
def test_memory_covers_ram_and_no_device(raw: Raw, highest: int, device: int, pages: int) -> None:
    meta = raw.run({"op": RawOp.READ, "gfn": highest}, {"op": RawOp.READ, "gfn": device, "flags": 8})
    assert meta["memory"] == pages * PAGE_SIZE


def test_ram_above_a_device_is_refused(raw: Raw) -> None:
    with pytest.raises(TraceError, match="RAM above a device") as caught:
        raw.run({"op": RawOp.READ, "gfn": 0xFEE00, "flags": 8}, {"op": RawOp.READ, "gfn": 0x10_0000})
    assert caught.value.index == 5


def test_other_modes_are_imported_too(raw: Raw) -> None:
    start = [record | ({"val": 0} if record["op"] == RawOp.EFER else {}) for record in START]
    assert raw.run({"op": RawOp.READ, "addr": 8}, start=start)["mode"] == "32-bit PAE, 3-level"
    assert raw.rows().rows["size"].tolist() == [4]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"op": 15}, "op code 15 is unknown"),
        ({"op": RawOp.INVPCID}, "INVPCID is not modelled"),
        ({"op": RawOp.READ, "flags": 2}, "flags 0x2"),
        ({"op": RawOp.PTPAGE, "x": 1}, "page index 1 of 1"),
        ({"op": RawOp.PTPAGE, "x": 0, "gfn": 4}, "content of another frame"),
        ({"op": RawOp.PTSTORE, "size": 0}, "a table store of 0 bytes"),
        ({"op": RawOp.PTSTORE, "size": 8, "addr": 0xFFC, "x": 0xFFC}, "crosses a page"),
        ({"op": RawOp.PTSTORE, "size": 8, "addr": 0x10, "x": 8}, "offset 0x8"),
    ],
    ids=["op", "invpcid", "flags", "page index", "page frame", "no size", "crossing", "offset"],
)
def test_bad_records_are_named(raw: Raw, record: dict[str, int], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        raw.run({"op": RawOp.MARK}, record, pages=pages_bytes(3))
    assert caught.value.index == 5
    assert caught.value.place == "a.rec"
    assert "(offset 160)" in str(caught.value)
    assert sorted(entry.name for entry in raw.folder.iterdir()) == ["a.pages", "a.rec"]


def test_files_that_are_cut_off_or_empty(raw: Raw) -> None:
    with pytest.raises(TraceError, match=r"a\.rec, row 4: cut off: 31 of 32 bytes \(offset 128\)"):
        raw.run({"op": RawOp.MARK}, cut=1)
    with pytest.raises(TraceError, match=r"a\.pages, row 1: cut off"):
        raw.run({"op": RawOp.MARK}, pages=pages_bytes(1, 2)[:-1])
    with pytest.raises(TraceError, match="empty"):
        raw.run(start=[])
    for start in (START[:3], [record | {"x": 0} for record in START], START[1:]):
        with pytest.raises(TraceError, match="first four"):
            raw.run({"op": RawOp.MARK}, start=start)


def test_progress_is_told(raw: Raw) -> None:
    seen: list[tuple[int, float]] = []
    raw.run({"op": RawOp.MARK}, progress=lambda done, part: seen.append((done, part)))
    assert seen == [(5, 1.0)]


def packed_import(folder: Path, change: Any = None) -> dict[str, Any]:
    zstandard = pytest.importorskip("zstandard")
    data = raw_array([*START, *[{"op": RawOp.READ, "addr": 8 * n} for n in range(1000)]]).tobytes()
    # Two frames: what is appended by a second run of the compressor is read, too.
    packed = zstandard.compress(data[:3200]) + zstandard.compress(data[3200:])
    (folder / "b.rec.zst").write_bytes(packed if change is None else change(packed))
    (folder / "b.pages.zst").write_bytes(zstandard.compress(b""))
    return import_raw(folder / "b.rec.zst", folder / "b.pages.zst", folder / "b.npz")


@pytest.fixture(params=["package", "command"])
def unpacker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    if kind == "command":
        if shutil.which("zstd") is None:
            pytest.skip("no zstd command here")
        monkeypatch.setattr(stream_module, "_decompressor", lambda: (None, Exception))
    return kind


@pytest.mark.usefixtures("unpacker")
def test_zstd(tmp_path: Path) -> None:
    assert packed_import(tmp_path)["rows"] == 1000


@pytest.mark.usefixtures("unpacker")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-9], "cut off|damaged"),
        (lambda data: data[:40] + b"\xff\xff\xff\xff\xff" + data[45:], "damaged|cut off"),
        (lambda data: b"PK" + data, "not zstd"),
        (lambda _: b"", "not zstd"),
    ],
    ids=["cut", "changed", "other", "empty"],
)
def test_damaged_zstd(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        packed_import(tmp_path, change)
    assert caught.value.place == "b.rec.zst"
    assert not (tmp_path / "b.npz").exists()


def test_without_zstd_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "b.rec.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "b.pages").write_bytes(b"")
    with pytest.raises(ImportError, match=r"shadowkvm\[import\]"):
        import_raw(tmp_path / "b.rec.zst", tmp_path / "b.pages", tmp_path / "b.npz")
