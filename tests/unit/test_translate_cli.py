"""shadowkvm translate: what it prints, where, and with which exit status."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.test_image import ROOT, SMALL, elf, note, tables

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "guest.raw"
    path.write_bytes(tables(SMALL))
    return path


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "guest.elf"
    path.write_bytes(elf([(0, bytes(tables(SMALL)))], notes=note(0, 0, 0x20) + note(1 << 31, ROOT, 0x20)))
    return path


def test_a_table(shell: Shell, raw: Path) -> None:
    status, out, err = shell("translate", str(raw), "--cr3", "0x1000", "0x1234", "4096", "0x5000")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[3] == ["0x1234", "0x9234", "4K", "rwxu", "AD"]
    assert lines[4][:2] == ["0x1000", "0x9000"]
    assert "the entry of level 1 is not present" in out
    assert out.endswith("3 addresses, 1 without a translation\n")


def test_json_and_csv(shell: Shell, raw: Path, tmp_path: Path) -> None:
    arguments = ["translate", str(raw), "--cr3", "4096", "0x2000", "0x7000", "--access", "write", "--user"]
    said = json.loads(shell(*arguments, "--format", "json")[1])
    assert said["schema"] == "shadowkvm.translate/1"
    assert (said["cr3"], said["mode"], said["access"], said["user"]) == ("0x1000", "4-level", "write", True)
    rows = said["translations"]
    assert rows[0] == {
        "gva": "0x2000", "gpa": None, "level": 1, "size": None, "flags": "r--u", "fault": "forbidden",
    }  # fmt: skip
    assert rows[1]["fault"] == "not_present"
    file = tmp_path / "out.csv"
    assert shell(*arguments, "-o", str(file)) == (0, "", "")
    read = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["fault"] for row in read] == ["forbidden", "not_present"]


def test_the_tables_of_a_cpu(shell: Shell, dump: Path) -> None:
    status, out, _ = shell("translate", str(dump), "--cpu", "1", "0x1234")
    assert status == 0
    assert "CR3 0x1000, 4-level" in out
    assert "0x9234" in out
    assert "paging off" in shell("translate", str(dump), "0x1234")[2]
    assert "has CPUs 0 to 1" in shell("translate", str(dump), "--cpu", "2", "0x1234")[2]


def test_steps(shell: Shell, raw: Path) -> None:
    status, out, _ = shell("translate", str(raw), "--cr3", "0x1000", "--steps", "0x1234", "0x5000")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert out.endswith("no translation: the entry of level 1 is not present\n")


def test_addresses_from_stdin_and_file(
    shell: Shell, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("0x1000 4097\n\n# none\n0x1`002 # WinDbg's way\n"))
    status, out, _ = shell("translate", str(raw), "--cr3", "0x1000", "--from", "-", "--format", "csv")
    assert status == 0
    assert [line.partition(",")[0] for line in out.splitlines()[1:]] == ["0x1000", "0x1001", "0x1002"]
    listed = tmp_path / "list"
    listed.write_text("0x1000\n0xzz\n")
    status, _, err = shell("translate", str(raw), "--cr3", "0x1000", "--from", str(listed))
    assert status == 2
    assert f"{listed}, line 2: '0xzz' is no address" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{raw}", "0x1000"], 2, "says nothing of CPUs: name the page tables with --cr3"),
        (["{raw}", "--cr3", "0x1000"], 2, "no address"),
        (["{raw}", "--cr3", "zero", "0x1"], 2, "--cr3: 'zero' is no address"),
        (["{raw}", "--cr3", "0x1000", "0x1ffffffffffffffff"], 2, "not below 2**64"),
        (["{raw}", "--cr3", "0x9999000", "0x1000"], 3, "CR3 0x9999000 names a table that is not in the image"),
        (["{raw}", "--cr3", "0x1000", "0x1000", "--mode", "3-level"], 2, "4-level"),
        (["{raw}.not", "--cr3", "0x1000", "0x1000"], 3, "No such file"),
        (["{raw}", "--cr3", "0x1000", "0x1000", "--steps", "--format", "json"], 2, "format json is not there"),
        (["{raw}", "--cr3", "0x1000", "0x1000", "-o", "/nowhere/x"], 2, "folder"),
    ],
)
def test_refusals(shell: Shell, raw: Path, arguments: list[str], status: int, message: str) -> None:
    got, out, err = shell("translate", *(word.replace("{raw}", str(raw)) for word in arguments))
    assert (got, out) == (status, "")
    assert message in err
