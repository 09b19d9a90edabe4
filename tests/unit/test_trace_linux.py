"""The recordings in the repository, looked at by a second reader and a second page walker.

Nothing of shadowkvm's reader is used here: NumPy opens the file, and the walker below is forty lines that know only the
architecture manual. What they find must be what the recorder's own checks said when the recording was made.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shadowkvm.ops import NO_PAGE, Flag, Op
from shadowkvm.trace import Recording

FOLDER = Path(__file__).parents[2] / "examples" / "recordings"
RAW = {
    "fork20-demote64": {
        "FETCH": 53_083, "READ": 97_481, "WRITE": 17_499, "PTSTORE": 32_306, "CR0": 1, "CR3": 124, "CR4": 1, "EFER": 1,
        "INVLPG": 313, "PF": 1_362, "INTR": 4, "PTPAGE": 368, "MARK": 1,
    },
    "dyn10": {
        "FETCH": 302_376, "READ": 537_771, "WRITE": 103_046, "PTSTORE": 146_424, "CR0": 1, "CR3": 442, "CR4": 1,
        "EFER": 1, "INVLPG": 2_230, "PF": 7_384, "INTR": 34, "PTPAGE": 1_516, "MARK": 1,
    },
}  # fmt: skip
FAULTS = {
    "fork20-demote64": {0: 20, 2: 55, 3: 42, 4: 221, 6: 120, 7: 395, 0x14: 509},
    "dyn10": {0: 50, 2: 212, 3: 181, 4: 1_307, 6: 969, 7: 2_307, 0x14: 2_358},
}
INSTRUCTIONS = {"fork20-demote64": 17_696_288, "dyn10": 135_056_398}
NAMES = sorted(RAW)
ACCESSES = (Op.READ, Op.WRITE, Op.FETCH)


def load(name: str) -> tuple[dict[str, Any], NDArray[np.void], NDArray[np.uint8]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        meta: dict[str, Any] = json.loads(file["meta.json"])
        rows = np.concatenate([file[key] for key in sorted(file.files) if key.startswith("chunk-")])
        pages = np.concatenate([file[key] for key in sorted(file.files) if key.startswith("pages-")])
    return meta, rows, pages


def test_they_stay_small() -> None:
    assert sum((FOLDER / f"{name}.npz").stat().st_size for name in NAMES) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_names_every_key_and_field(name: str) -> None:
    meta, rows, _ = load(name)
    text = (FOLDER.parents[1] / "docs" / "recordings.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", "".join(line for line in text.splitlines() if line.startswith("|"))))
    assert set(meta) | set(rows.dtype.names or ()) <= words


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_raw_recording(name: str) -> None:
    meta, rows, pages = load(name)
    raw, flags = RAW[name], rows["flags"]
    faults = flags & Flag.FAULTS != 0
    kind = {op: int(np.count_nonzero((rows["op"] == op) & ~faults)) for op in Op}
    # The start state is meta, not rows: one CR3 load less, no CR0, CR4, EFER at all.
    assert len(rows) == meta["rows"] == sum(raw.values()) - 4
    assert meta["raw_counts"] == raw
    for op in (Op.FETCH, Op.READ, Op.INVLPG, Op.INTR, Op.MARK):
        assert kind[op] == raw[op.name]
    assert kind[Op.CR3] == raw["CR3"] - 1
    assert kind[Op.PAGE] == raw["PTPAGE"] == len(pages) == meta["pages"]
    keeps = flags & Flag.KEEP != 0
    assert np.count_nonzero(keeps & ~faults) == raw["WRITE"]
    assert kind[Op.WRITE] == raw["WRITE"] + raw["PTSTORE"]
    assert Counter(rows["value"][faults].tolist()) == FAULTS[name]
    assert meta["faults"] == raw["PF"]
    assert rows["dins"].sum(dtype=np.int64) == meta["instructions"] == INSTRUCTIONS[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_in_its_range(name: str) -> None:
    meta, rows, pages = load(name)
    op, flags, addr, size = rows["op"], rows["flags"], rows["addr"], rows["size"].astype(np.uint64)
    access = np.isin(op, ACCESSES)
    assert set(np.unique(op)) == {Op.READ, Op.WRITE, Op.FETCH, Op.INVLPG, Op.CR3, Op.PAGE, Op.MARK, Op.INTR}
    assert set(np.unique(size[access])) <= {1, 2, 4, 8}
    assert not size[~access].any()
    assert (addr[access] % 4096 + size[access] <= 4096).all()
    assert not rows["vcpu"].any()
    assert not rows["site"].any()
    assert not (flags & ~np.uint8(Flag.USER | Flag.AC | Flag.MMIO | Flag.IMPLICIT | Flag.KEEP | Flag.FAULTS)).any()
    assert not flags[~access].any()
    canonical = addr[access].astype(np.int64) >> 47
    assert set(np.unique(canonical)) == {-1, 0}
    # What RAM is, what a device is.
    checked = rows["gfn"] != NO_PAGE
    assert (checked == ((access & (flags & Flag.FAULTS == 0)) | (op == Op.PAGE))).all()
    mmio = flags & Flag.MMIO != 0
    assert (rows["gfn"][checked & ~mmio] < meta["memory"] // 4096).all()
    assert set(np.unique(rows["gfn"][mmio])) == {0xFEE00}
    assert meta["memory"] == 128 << 20
    assert (rows["value"][op == Op.PAGE] < len(pages)).all()
    assert (addr[op == Op.PAGE] >> 12 == rows["gfn"][op == Op.PAGE]).all()
    # Faults: the code agrees with the kind of access and the CPL.
    faults = rows[flags & Flag.FAULTS != 0]
    code = faults["value"]
    assert ((code & 16 != 0) == (faults["op"] == Op.FETCH)).all()
    assert ((code & 2 != 0) == (faults["op"] == Op.WRITE)).all()
    assert ((code & 4 != 0) == (faults["flags"] & Flag.USER != 0)).all()
    assert (op[-1], rows["value"][-1]) == (Op.MARK, 2)


class Walker:
    """64-bit guest, 4 levels, CR0.WP, SMEP, SMAP and NX on; memory holds the recorded table pages only."""

    def __init__(self, cr3: int) -> None:
        self.cr3 = cr3
        self.tables: dict[int, array[int]] = {}

    def walk(self, gva: int, op: int, flags: int) -> tuple[int, int]:
        """(gfn, -1), or (0, error code)."""
        user, write, fetch = flags & 1, op == Op.WRITE, op == Op.FETCH
        code = (2 if write else 0) | (4 if user else 0) | (16 if fetch else 0)
        gfn, writable, reachable, executable, shift = self.cr3 >> 12, True, True, True, 39
        while True:
            entry = self.tables[gfn][gva >> shift & 511]
            if not entry & 1:
                return 0, code
            writable, reachable = writable and bool(entry & 2), reachable and bool(entry & 4)
            executable = executable and not entry >> 63
            gfn = entry >> 12 & 0xFF_FFFF_FFFF
            if shift == 12 or entry & 128:
                break
            shift -= 9
        if user:
            allowed = reachable
        else:
            smap = reachable and not fetch and (flags & 16 or not flags & 4)
            allowed = not (smap or (reachable and fetch))
        if not allowed or (write and not writable) or (fetch and not executable):
            return 0, code | 1
        inside = (1 << shift - 12) - 1
        return gfn & ~inside | gva >> 12 & inside, -1

    def store(self, gfn: int, gva: int, value: int, size: int) -> None:
        table = self.tables.get(gfn)
        if table is not None:
            content = bytearray(table.tobytes())
            content[gva & 4095 : (gva & 4095) + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.tables[gfn] = array("Q", bytes(content))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_walker_agrees_with_every_row(name: str) -> None:
    meta, rows, pages = load(name)
    walker = Walker(meta["sregs"]["cr3"])
    good = faults = 0
    fields = (rows[field].tolist() for field in ("op", "size", "flags", "addr", "value", "gfn"))
    for index, (op, size, flags, addr, value, gfn) in enumerate(zip(*fields, strict=True)):
        if op == Op.CR3:
            walker.cr3 = value
        elif op == Op.PAGE:
            walker.tables[addr >> 12] = array("Q", pages[value].tobytes())
        elif op in ACCESSES:
            found = walker.walk(addr, op, flags)
            if flags & Flag.FAULTS:
                assert found == (0, value), index
                faults += 1
                continue
            assert found == (gfn, -1), index
            good += 1
            if op == Op.WRITE and not flags & Flag.KEEP:
                walker.store(gfn, addr, value, size)
    assert good == sum(RAW[name][op] for op in ("FETCH", "READ", "WRITE", "PTSTORE"))
    assert faults == RAW[name]["PF"]


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_sees_the_same(name: str) -> None:
    meta, rows, pages = load(name)
    with Recording.open(FOLDER / f"{name}.npz") as recording:
        recording.verify()
        found = recording.to_arrays()
        assert recording.meta == meta
        assert b"".join(recording.pages) == pages.tobytes()
    for field in found.rows.dtype.names or ():
        assert (found.rows[field] == rows[field]).all()
    assert (found.gfn == rows["gfn"]).all()
    assert (found.dins == rows["dins"]).all()
