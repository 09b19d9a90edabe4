"""Reader and writer of recordings: round trips, atomicity, damage."""

from __future__ import annotations

import doctest
import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shadowkvm.errors import ShadowKvmError, TraceError
from shadowkvm.ops import NO_PAGE, PAGE_SIZE, TRACE_DTYPE, Flag, Op
from shadowkvm.trace import CHUNK_ROWS, RECORD_DTYPE, SCHEMA, Recording, RecordingWriter

SREGS = {"cr0": 0x8005_0033, "cr3": 0x1000, "cr4": 0x35_06F0, "efer": 0xD01}
META = {"memory": 1 << 20, "sregs": SREGS}


def reads(count: int) -> NDArray[np.void]:
    rows = np.zeros(count, TRACE_DTYPE)
    rows["op"], rows["size"] = Op.READ, 8
    rows["addr"] = np.arange(count, dtype=np.uint64) * 8
    return rows


def write(path: Path, rows: NDArray[np.void], pages: bytes = b"", **options: Any) -> None:
    with RecordingWriter(path, META, **options) as writer:
        writer.add_pages(pages)
        writer.append(rows)


@st.composite
def row_arrays(draw: st.DrawFn, pages: int) -> NDArray[np.void]:
    ops = st.sampled_from([op for op in Op if pages or op != Op.PAGE])
    rows = np.zeros(draw(st.integers(0, 40)), TRACE_DTYPE)
    for row in rows:
        op = draw(ops)
        row["op"], row["size"] = op, draw(st.integers(1, 16))
        row["flags"] = draw(st.sampled_from([0, Flag.USER, Flag.AC | Flag.KEEP, Flag.FAULTS, int(sum(Flag))]))
        row["vcpu"], row["site"] = draw(st.integers(0, 3)), draw(st.integers(0, 2))
        row["addr"] = draw(st.integers(0, 2**64 - 1))
        row["value"] = draw(st.integers(0, 2**64 - 1))
        if op == Op.PAGE:
            row["addr"] -= row["addr"] % PAGE_SIZE
            row["value"] = draw(st.integers(0, pages - 1))
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    pages = data.draw(st.integers(0, 3))
    content = np.random.default_rng(pages).integers(0, 256, (pages, PAGE_SIZE), np.uint8)
    rows = data.draw(row_arrays(pages))
    gfn = np.arange(len(rows), dtype=np.uint32)
    dins = gfn * 3
    meta: dict[str, Any] = META | {"vcpus": 4, "sites": [0, 0x1000, 2**64 - 1], "extra": ["kept"]}
    path = tmp_path / "a.npz"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    method = data.draw(st.sampled_from(["lzma", "deflate", "none"]))
    with RecordingWriter(path, meta, chunk_rows=data.draw(st.integers(1, 50)), compression=method) as writer:
        assert writer.add_pages(content) == 0
        for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            writer.append(rows[low:high], gfn[low:high], dins[low:high])
    twin = Recording.from_arrays(rows, gfn=gfn, dins=dins, pages=content, **meta)
    with Recording.open(path) as recording:
        recording.verify()
        for each in (recording, twin):
            assert len(each) == len(rows)
            found = each.to_arrays()
            assert found.rows.tobytes() == rows.tobytes()
            assert found.gfn.tolist() == gfn.tolist()
            assert found.dins.tolist() == dins.tolist()
            assert b"".join(each.pages) == content.tobytes()
            assert each.meta["extra"] == ["kept"]
        for key in ("counts", "faults", "instructions", "mode", "sites"):
            assert recording.meta[key] == twin.meta[key]


def test_chunks_are_read_one_by_one_and_are_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(10), chunk_rows=4)
    with Recording.open(path) as recording:
        chunks = list(recording.chunks())
        assert [len(chunk.rows) for chunk in chunks] == [4, 4, 2]
        assert all(chunk.rows.dtype == TRACE_DTYPE for chunk in chunks)
        assert chunks[0].gfn.tolist() == [NO_PAGE] * 4
        with pytest.raises(ValueError, match="read-only"):
            chunks[0].rows["addr"] = 0


def test_a_chunk_in_memory_is_no_longer_than_one_in_a_file() -> None:
    recording = Recording.from_arrays(reads(CHUNK_ROWS + 5), memory=1 << 20)
    assert [len(chunk.rows) for chunk in recording.chunks()] == [CHUNK_ROWS, 5]


def test_from_arrays_copies() -> None:
    rows = reads(3)
    recording = Recording.from_arrays(rows, memory=1 << 20)
    rows["addr"] = 99
    assert recording.to_arrays().rows["addr"].tolist() == [0, 8, 16]


def test_numpy_and_json_read_the_file_without_us(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(5), bytes(PAGE_SIZE))
    with np.load(path) as loaded:
        assert loaded["chunk-00000"].dtype == RECORD_DTYPE
        assert loaded["pages-00000"].shape == (1, PAGE_SIZE)
        assert json.loads(loaded["meta.json"])["schema"] == SCHEMA


def test_the_same_recording_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        with RecordingWriter(tmp_path / name, META | {"name": "same"}) as writer:
            writer.append(reads(100))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_save_gives_back_what_was_opened(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", reads(9), bytes(3 * PAGE_SIZE))
    with Recording.open(tmp_path / "a.npz") as first:
        first.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    rows = reads(3)
    rows["op"][2] = 77
    with pytest.raises(TraceError, match="op code 77") as caught:
        write(path, rows)
    assert caught.value.index == 2
    with pytest.raises(TraceError, match="op code 77"), RecordingWriter(path, META) as writer:
        writer.append(rows)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def bad_rows(field: str, value: int, op: Op = Op.READ) -> NDArray[np.void]:
    rows = reads(8)
    rows["op"][5] = op
    rows[field][5] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bad_rows("op", 28), "op code 28 is unknown"),
        (bad_rows("flags", 2), "flags 0x2 has an unknown bit"),
        (bad_rows("vcpu", 1), "vcpu 1 of 1"),
        (bad_rows("site", 9), "site 9 of 1"),
        (bad_rows("size", 0), "an access of 0 bytes"),
        (bad_rows("size", 17), "an access of 17 bytes"),
        (bad_rows("value", 2, Op.PAGE), "2 of 2"),
        (bad_rows("addr", 5, Op.PAGE), "not page-aligned"),
    ],
    ids=["op", "flags", "vcpu", "site", "no size", "size", "page index", "page address"],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: NDArray[np.void], message: str) -> None:
    with pytest.raises(TraceError, match=message) as in_memory:
        Recording.from_arrays(rows, memory=1 << 20, pages=bytes(2 * PAGE_SIZE))
    with pytest.raises(TraceError) as written:
        write(tmp_path / "a.npz", rows, bytes(2 * PAGE_SIZE))
    assert in_memory.value.index == written.value.index == 5
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    "rows",
    [np.zeros(3), np.zeros((2, 2), TRACE_DTYPE), np.zeros(2, TRACE_DTYPE.newbyteorder(">")), [(0,) * 7]],
    ids=["dtype", "shape", "byte order", "no array"],
)
def test_wrong_arrays_are_refused(rows: Any) -> None:
    with pytest.raises(TraceError, match="array of TRACE_DTYPE"):
        Recording.from_arrays(rows, memory=1 << 20)


def test_wrong_columns_and_pages_are_refused() -> None:
    with pytest.raises(TraceError, match="gfn"):
        Recording.from_arrays(reads(3), memory=1 << 20, gfn=[1, 2])
    with pytest.raises(TraceError, match="dins: 32-bit"):
        Recording.from_arrays(reads(3), memory=1 << 20, dins=[1, 2, 1 << 32])
    with pytest.raises(TraceError, match="not pages of 4096"):
        Recording.from_arrays(reads(3), memory=1 << 20, pages=bytes(5))


@pytest.mark.parametrize("index", [-1, 2, 1 << 70])
def test_a_page_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(TraceError, match=f"page index {index} of 2"):
        Recording.from_arrays(reads(0), memory=1 << 20, pages=bytes(8192)).pages[index]


def rebuilt(path: Path, replace: dict[str, bytes | None]) -> None:
    """Write ``path`` again with some members replaced (None: left out)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            new = replace.get(name, data)
            if new is not None:
                archive.writestr(name, new)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("schema", "shadowkvm.recording/2", "meta.json"),
        ("memory", 5000, "meta.json: memory"),
        ("memory", "1 MiB", "meta.json: memory"),
        ("sregs", {"cr0": 1}, "meta.json: sregs"),
        ("sites", [], "meta.json: sites"),
        ("rows", -1, "meta.json: rows"),
        ("rows", 4, "chunk-00000.npy"),
        ("rows", 6, "chunk-00001.npy"),
        ("rows", 1 << 47, "chunk-00001.npy"),
        ("chunk_rows", 1 << 40, "meta.json: chunk_rows"),
        ("pages", 300, "pages-00001.npy"),
        ("pages", 2, "pages-00000.npy"),
        ("counts", {"READ": 4}, "meta.json: counts"),
        ("vcpus", True, "meta.json: vcpus"),
        ("name", None, "meta.json: name"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_meta_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: Any, place: str) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(5), bytes(PAGE_SIZE), chunk_rows=5)
    with Recording.open(path) as recording:
        meta = recording.meta | {key: value}
    rebuilt(path, {"meta.json": json.dumps(meta).encode()})
    with pytest.raises(TraceError) as caught, Recording.open(path) as recording:
        recording.verify()
    assert caught.value.place == place


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000], ids=["empty", "list", "cut", "utf", "deep"]
)
def test_meta_that_is_no_object_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(5))
    rebuilt(path, {"meta.json": text})
    with pytest.raises(TraceError, match=r"meta\.json"):
        Recording.open(path)


def huge_header() -> bytes:
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("meta.json", None),
        ("chunk-00000.npy", None),
        ("chunk-00000.npy", b""),
        ("chunk-00000.npy", b"\x93NUMPY\x01\x00\xff\xff{"),
        ("chunk-00000.npy", huge_header()),
        ("chunk-00000.npy", bytes(1 << 16)),
    ],
    ids=["no meta", "no chunk", "empty", "cut header", "huge header", "too long"],
)
def test_members_that_do_not_fit_are_refused(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(5))
    rebuilt(path, {name: data})
    with pytest.raises(TraceError, match=name), Recording.open(path) as recording:
        recording.verify()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, reads(50), bytes(PAGE_SIZE))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(TraceError):
            Recording.open(path)


@pytest.mark.parametrize("method", ["lzma", "deflate", "none"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_damage_never_raises_anything_else(tmp_path: Path, method: str, changes: list[tuple[int, int]]) -> None:
    bad = tmp_path / "bad.npz"
    write(bad, reads(50), bytes(PAGE_SIZE), compression=method)
    content = bytearray(bad.read_bytes())
    for where, value in changes:
        content[where % len(content)] = value
    bad.write_bytes(content)
    try:
        with Recording.open(bad) as recording:
            recording.verify()
            assert recording.to_arrays().rows.tobytes() == reads(50).tobytes()
    except ShadowKvmError:
        pass


def test_a_file_that_is_absent_or_closed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recording.open(tmp_path / "none.npz")
    write(tmp_path / "a.npz", reads(5))
    recording = Recording.open(tmp_path / "a.npz")
    recording.close()
    with pytest.raises(ValueError, match="closed"):
        recording.to_arrays()


@pytest.mark.parametrize("module", ["errors", "ops", "trace.format", "trace.read", "trace.write"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"shadowkvm.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
