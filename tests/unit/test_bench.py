"""shadowkvm bench: every section gives its rows, in tables and as JSON. What they measure is nobody's business here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import shadowkvm as sk
from shadowkvm import bench
from shadowkvm.bench import walkers
from shadowkvm.bench.guests import build, rows

Shell = Callable[..., tuple[int, str, str]]
QUICK = [name for name in bench.SECTIONS if name != "events"]


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(QUICK, quick=True)


@pytest.mark.parametrize("name", QUICK)
def test_each_section_measures(report: bench.Report, name: str) -> None:
    assert len(report.rows[name]) > 4
    for row in report.rows[name]:
        assert row.value > 0, row
        assert row.unit in {"M/s", "ns", "bytes", "x"}
        assert (row.met is None) == (row.asked is None)
    assert len({row.name for row in report.rows[name]}) == len(report.rows[name])


def test_json(report: bench.Report) -> None:
    said = json.loads(json.dumps(report.to_dict()))
    assert said["schema"] == "shadowkvm.bench/1"
    assert list(said["sections"]) == QUICK
    assert {"name", "value", "unit", "other", "asked", "at_least", "note", "ratio", "met"} == set(
        said["sections"]["calls"][0]
    )


def test_the_verb(shell: Shell, tmp_path: Path) -> None:
    status, out, err = shell("bench", "calls", "switches", "--quick")
    assert (status, err) == (0, "")
    assert "One call from Python" in out
    assert "--quick: not to be quoted" in out
    file = tmp_path / "bench.json"
    assert shell("bench", "calls", "--quick", "-o", str(file)) == (0, "", "")
    assert json.loads(file.read_text())["sections"]["calls"][0]["unit"] == "ns"


def test_refusals(shell: Shell) -> None:
    status, out, err = shell("bench", "replays")
    assert (status, out) == (2, "")
    assert "did you mean 'replay'?" in err
    assert shell("bench", "calls", "--format", "csv")[0] == 2


def test_what_cannot_be_measured_is_said(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowkvm.bench.events.shutil.which", lambda _: None)
    status, out, _ = shell("bench", "events")
    assert status == 0
    assert "not measured. cargo was not found on PATH" in " ".join(out.split())


def test_the_walkers_that_are_compared_agree() -> None:
    for image in (walkers.ordinary(32 << 20, 2_000), walkers.heavy(32 << 20, 4 << 20, 2_000)):
        gvas = np.concatenate([image.addresses, np.arange(0, 1 << 48, 1 << 40, dtype=np.uint64), [np.uint64(1 << 47)]])
        gpa, found = walkers.numpy_walk(image.words, image.cr3, gvas)
        slow = walkers.python_walk(memoryview(image.words.tobytes()), image.cr3, gvas.tolist())
        assert [None if answer is None else answer for answer in slow] == [
            int(address) if ok else None for address, ok in zip(gpa, found, strict=True)
        ]
        ours = sk.translate(image.words, image.cr3, gvas)
        assert np.array_equal(ours.ok, found)
        assert np.array_equal(ours.gpa, gpa)


def test_the_guests_are_what_they_say() -> None:
    """All pages can be read one to one, and the tables are where the alias shows them."""
    guest = build(np.array([0, 3, 700], np.uint64), lone=True)
    regions = np.array([0, 3, 700])
    where = ((regions[:, None] << 21) + (np.arange(64)[None, :] << 15)).reshape(-1)
    result = guest.vm.run(rows(sk.Op.READ, where))
    assert result.status["done"] == len(where)
    assert guest.vm.counters["pages_4k"] == len(where)
    guest.vm.audit()
    seen = guest.vm.vcpus[0].read((1 << 39) + 2 * 4096)
    assert seen.value == 0 | 0x67  # behind two directories: the first entry of the first table
