"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.guest import reads

import shadowkvm as sk
from shadowkvm.trace import RAW_DTYPE

ROOT = Path(__file__).parents[2]
FORK = str(ROOT / "examples" / "recordings" / "fork20-demote64.npz")

Shell = Callable[..., tuple[int, str, str]]


def process(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "shadowkvm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **settings)


def save(path: Path, rows: Any) -> Path:
    np.save(path, rows)
    return path


# -- run --------------------------------------------------------------------------------------------------------------


def test_the_report(shell: Shell) -> None:
    status, out, err = shell("run", FORK)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert not any(line.endswith(" ") for line in out.splitlines())
    for text in (
        "fork20-demote64 under KVM's shadow MMU",
        "linux-6.1, policy kvm, profile zen",
        "202,540 rows, 17,696,288 instructions, 123 CR3 loads, 313 INVLPG, 128 MiB",
        "#PF exits by who and how",
        "... by kind of page",
        "What shadow paging did",
        "... by address space (CR3)",
        "Guest's own faults: 1,362 as recorded, 0 missed, 0 unexpected",
        ", 0 wrong",
        "million rows/s",
    ):
        assert text in out, text


def test_json_has_a_schema_and_is_the_same_every_time(shell: Shell) -> None:
    first, second = (json.loads(shell("run", FORK, "--format", "json")[1]) for _ in range(2))
    assert first["schema"] == "shadowkvm.run/1"
    assert first["version"] == sk.__version__
    assert first["model_version"] == sk.model_version
    assert set(first) == {
        "schema", "version", "model_version", "trace", "settings", "rows", "instructions", "ops", "status", "faults",
        "kinds", "rates", "address_spaces", "counters", "recorded", "checks", "time",
    }  # fmt: skip
    assert set(first.pop("time")) == set(second.pop("time")) == {"seconds", "engine_seconds", "rows_per_second"}
    assert first == second
    assert first["settings"] == {"policy": "kvm", "profile": "zen", "quota": None, "vcpus": 1}
    assert first["trace"]["name"] == "fork20-demote64"
    assert first["ops"]["CR3"] == 123
    assert first["checks"]["faults_matched"] == 1362
    assert first["counters"]["pf_guest"] == {"value": 1362, "kind": "cumulative", "scope": "vcpu"}
    assert sum(row["exits"] for row in first["faults"]) == sum(row["exits"] for row in first["kinds"])
    assert first["rates"]["pf_guest"]["per_1000_rows"] == pytest.approx(1362 / 202.540)
    assert first["address_spaces"][0]["cr3"].startswith("0x")


def test_csv_is_the_counters(shell: Shell) -> None:
    _, out, _ = shell("run", FORK, "--format", "csv")
    table = list(csv.DictReader(io.StringIO(out)))
    assert [row["counter"] for row in table] == list(sk.COUNTER_INFO)
    with sk.Recording.open(FORK) as recording:
        counters = sk.Vm(recording.meta["memory"]).run(recording).counters
    assert {row["counter"]: int(row["value"]) for row in table} == dict(counters)
    by_name = {row["counter"]: row for row in table}
    assert float(by_name["pf_taken"]["per_cr3_load"]) == pytest.approx(counters["pf_taken"] / 123, rel=1e-4)
    assert by_name["mmu_unsync"]["per_1000_rows"] == ""  # an instant counter has no rate


@pytest.mark.parametrize(("name", "begins"), [("a.json", "{"), ("a.csv", "counter,"), ("a.txt", "fork20")])
def test_the_suffix_of_the_file_says_the_format(shell: Shell, tmp_path: Path, name: str, begins: str) -> None:
    (tmp_path / name).write_text("old", encoding="utf-8")
    assert shell("run", FORK, "-o", tmp_path / name) == (0, "", "")
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_option_goes_before_the_suffix(shell: Shell, tmp_path: Path) -> None:
    shell("run", FORK, "-o", tmp_path / "a.csv", "--format", "json")
    assert json.loads((tmp_path / "a.csv").read_text(encoding="utf-8"))["schema"] == "shadowkvm.run/1"


def test_settings_reach_the_engine(shell: Shell) -> None:
    settings = ("--policy", "no_unsync", "--profile", "qemu-tcg", "--quota", "100", "--memory", "1GiB")
    status, out, _ = shell("run", FORK, "--format", "json", *settings)
    data = json.loads(out)
    assert status == 0
    assert data["settings"] == {"policy": "no_unsync", "profile": "qemu-tcg", "quota": 100, "vcpus": 1}
    assert data["trace"]["memory"] == 1 << 30
    assert data["rates"]["unsync"]["total"] == 0
    assert data["rates"]["mmu_recycled"]["total"] == data["counters"]["mmu_recycled"]["value"]
    assert (
        "policy no_unsync, profile zen, quota 100 shadow pages" in shell("run", FORK, *settings[:2], *settings[4:6])[1]
    )


@pytest.mark.parametrize(
    ("text", "size"), [("4M", 4 << 20), ("0x800000", 8 << 20), ("8192k", 8 << 20), ("16 MB", 16 << 20)]
)
def test_sizes(shell: Shell, tmp_path: Path, text: str, size: int) -> None:
    _, out, _ = shell("run", save(tmp_path / "a.npy", reads(3)), "--memory", text, "--format", "json")
    assert json.loads(out)["trace"]["memory"] == size


def test_a_plain_trace(shell: Shell, tmp_path: Path) -> None:
    rows = reads(3)
    rows["vcpu"] = [0, 2, 1]
    status, out, _ = shell("run", save(tmp_path / "mine.npy", rows), "--format", "json")
    data = json.loads(out)
    assert status == 0  # nothing is recorded that it could differ from
    assert (data["trace"]["name"], data["rows"], data["settings"]["vcpus"]) == ("mine", 3, 3)
    assert data["recorded"] is False
    assert data["status"]["page_fault"] == 3
    _, out, _ = shell("run", tmp_path / "mine.npy")
    assert "mine under KVM's shadow MMU" in out
    assert "as recorded" not in out


def test_an_empty_trace(shell: Shell, tmp_path: Path) -> None:
    status, out, _ = shell("run", save(tmp_path / "a.npy", reads(0)))
    assert status == 0
    assert "0 rows" in out


def test_a_difference_is_exit_status_1(shell: Shell, tmp_path: Path) -> None:
    rows = reads(3)
    rows["flags"], rows["value"] = [0, sk.Flag.FAULTS, sk.Flag.FAULTS], [0, 0, 2]
    sregs = {"cr0": 0x80050033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}
    sk.Recording.from_arrays(rows, memory=1 << 20, sregs=sregs).save(tmp_path / "a.npz")
    status, out, err = shell("run", tmp_path / "a.npz")
    assert status == 1
    assert "1 as recorded, 1 missed, 1 unexpected, first at row 0" in out
    assert err == "shadowkvm: the replay differs from the recording in 2 rows\n"


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_as_text(shell: Shell, tmp_path: Path) -> None:
    assert shell("run", FORK, "--events", tmp_path / "events.txt", "-o", tmp_path / "a.json")[0] == 0
    with sk.Recording.open(FORK) as recording:
        vm = sk.Vm(recording.meta["memory"], events=True)
        vm.run(recording)
    assert (tmp_path / "events.txt").read_text(encoding="utf-8").splitlines() == vm.event_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "events.txt"]


def test_events_as_parquet(shell: Shell, tmp_path: Path) -> None:
    assert shell("run", FORK, "--events", tmp_path / "events.parquet")[0] == 0
    with sk.Recording.open(FORK) as recording:
        vm = sk.Vm(recording.meta["memory"], events=True)
        vm.run(recording)
    events = vm.events
    table = pq.read_table(tmp_path / "events.parquet")
    assert table.num_rows == len(events)
    assert table.schema.metadata[b"schema"] == b"shadowkvm.events/1"
    assert (table["row"].to_numpy() == events["op"]).all()
    for name in ("vcpu", "level", "flag", "code", "a", "b", "c"):
        assert (table[name].to_numpy() == events[name]).all()
    names = list(sk.EVENT_INFO)
    assert table["event"].to_pylist() == [names[kind] for kind in events["kind"]]


def test_parquet_without_pyarrow_names_the_extra(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, out, err = shell("run", FORK, "--events", tmp_path / "events.parquet")
    assert (status, out) == (2, "")
    assert 'pip install "shadowkvm[parquet]"' in err
    assert not list(tmp_path.iterdir())


def test_other_suffixes_are_refused(shell: Shell, tmp_path: Path) -> None:
    status, _, err = shell("run", FORK, "--events", tmp_path / "events.xls")
    assert status == 2
    assert "must end in .parquet or .txt" in err


# -- the other verbs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [["counters"], ["policy", "list"]], ids=" ".join)
def test_lists(shell: Shell, verb: list[str]) -> None:
    policies = [f"{row.name}:N" if row.parameter else row.name for row in sk.POLICIES.values()]
    names = list(sk.COUNTER_INFO) if verb == ["counters"] else policies
    status, out, _ = shell(*verb)
    assert status == 0
    assert all(name in out for name in names)
    data = json.loads(shell(*verb, "--format", "json")[1])
    assert data["schema"] in {"shadowkvm.counters/1", "shadowkvm.policies/2"}
    (items,) = (value for value in data.values() if isinstance(value, list))
    assert [item["name"] for item in items] == names
    table = list(csv.DictReader(io.StringIO(shell(*verb, "--format", "csv")[1])))
    assert [row["name"] for row in table] == names
    assert all(row["doc"] for row in table)


def test_info(shell: Shell) -> None:
    status, out, _ = shell("trace", "info", FORK, "--verify")
    assert status == 0
    assert "busybox" in out
    assert "cr3 0x5dd2000" in out
    with sk.Recording.open(FORK) as recording:
        data = json.loads(shell("trace", "info", FORK, "--format", "json")[1])
        assert data["schema"] == "shadowkvm.trace/1"
        assert data["recording"]["counts"] == recording.meta["counts"]


def raw_files(folder: Path) -> Path:
    raw = np.zeros(6, RAW_DTYPE)
    raw["op"] = [4, 5, 6, 7, 1, 10]
    raw["x"][:4] = 1
    raw["val"] = [0x80050033, 0x1000, 0x20, 0xD01, 0, 4]
    raw["addr"][4:] = [0x5000, 0x7000]
    raw["gfn"][4] = 5
    (folder / "guest.rec").write_bytes(raw.tobytes())
    (folder / "guest.pages").write_bytes(b"")
    return folder / "guest.rec"


def test_import(shell: Shell, tmp_path: Path) -> None:
    rec = raw_files(tmp_path)
    out = tmp_path / "guest.npz"
    status, said, err = shell(
        "trace", "import", rec, "-o", out, "--guest", "a guest", "--name", "mine", "--made", "here"
    )
    assert (status, said) == (0, "")
    assert "2 rows, 0 pages" in err
    with sk.Recording.open(out) as recording:
        assert (recording.meta["name"], recording.meta["guest"], recording.meta["made"]) == ("mine", "a guest", "here")
        assert len(recording) == 2
    assert shell("trace", "import", rec, tmp_path / "guest.pages", "-o", out, "--compression", "none")[0] == 0


def test_import_of_damage(shell: Shell, tmp_path: Path) -> None:
    rec = raw_files(tmp_path)
    rec.write_bytes(rec.read_bytes()[:-5])
    status, _, err = shell("trace", "import", rec, "-o", tmp_path / "guest.npz")
    assert status == 3
    assert "guest.rec, row 5: cut off" in err
    assert not (tmp_path / "guest.npz").exists()
    assert shell("trace", "import", tmp_path / "none.rec", "-o", tmp_path / "guest.npz")[0] == 3


@pytest.mark.parametrize(
    "verb", ["", "run", "trace", "trace import", "trace info", "counters", "policy", "policy list"]
)
def test_help_teaches_by_example(shell: Shell, verb: str) -> None:
    status, out, err = shell(*verb.split(), "--help")
    assert (status, err) == (0, "")
    if verb not in {"trace", "policy"}:
        assert f"shadowkvm {verb}" in out


def test_version(shell: Shell) -> None:
    assert shell("--version")[1].strip() == f"shadowkvm {sk.__version__} (model {sk.model_version})"


# -- as a process -----------------------------------------------------------------------------------------------------


def test_as_a_process() -> None:
    done = process("policy", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no_unsync" in done.stdout
    assert process("run", "/nowhere.npz").returncode == 3
    assert process("run").returncode == 2


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_no_colour_where_none_is_wanted(variable: str) -> None:
    environment = {**os.environ, variable: "1" if variable == "NO_COLOR" else "dumb"}
    done = process("run", FORK, env=environment)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_has_enough() -> None:
    command = f"{sys.executable} -m shadowkvm counters --format csv | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[0] == "name,scope,kind,doc"
    assert done.stderr == ""
