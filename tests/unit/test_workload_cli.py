"""shadowkvm workload: what it prints, where, and with which exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shadowkvm as sk
from shadowkvm.workloads import Step, Workload, entries, get

Shell = Callable[..., tuple[int, str, str]]
NAMES = [entry.name for entry in entries() if entry.origin == "shadowkvm"]


def test_the_list_has_every_workload(shell: Shell) -> None:
    status, out, err = shell("workload", "list")
    assert (status, err) == (0, "")
    assert all(name in out for name in NAMES)
    listed = json.loads(shell("workload", "list", "--json")[1])
    assert listed["schema"] == "shadowkvm.workloads/1"
    assert [item["name"] for item in listed["workloads"]] == NAMES
    assert set(listed["workloads"][0]) == {"name", "unit", "from", "doc"}


@pytest.mark.parametrize("name", NAMES)
def test_show_says_what_it_is(shell: Shell, name: str) -> None:
    status, out, err = shell("workload", "show", name)
    assert (status, err) == (0, "")
    chosen = get(name)
    words = " ".join(out.split())
    for text in (chosen.summary, chosen.stresses, "What to look for", "Parameters"):
        assert " ".join(text.split()) in words
    assert all(parameter in out for parameter in chosen.all_parameters)
    shown = json.loads(shell("workload", "show", name, "--format", "json")[1])
    assert shown["schema"] == "shadowkvm.workload/1"
    assert [item["name"] for item in shown["parameters"]] == list(chosen.all_parameters)


def test_run_prints_a_report(shell: Shell) -> None:
    status, out, err = shell("workload", "run", "fork_exit", "--scale", "0.1", "--set", "pages=32", "--set", "cpus=2")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        "fork_exit: a process forks a child that touches a little and exits",
        "linux-6.1, policy kvm, profile zen",
        "pages=32, child_reads=16, child_writes=8, parent_writes=16, forks=5, cpus=2",
        "5 x fork, ",
        "per fork",
        "... by phase",
        "Guest's own faults: 120 as its tables say, 0 otherwise",
        "million rows/s",
    ):
        assert text in out, text
    assert [
        line.split()[0] for line in out.splitlines() if line.startswith(("start", "fork ", "child", "exit", "parent"))
    ]


def test_json_is_the_same_every_time_but_for_the_time(shell: Shell) -> None:
    arguments = ["workload", "run", "cow_storm", "--scale", "0.25", "--set", "pages=16", "--seed", "5", "--json"]
    first, second = (json.loads(shell(*arguments)[1]) for _ in range(2))
    assert set(first.pop("time")) == set(second.pop("time")) == {"seconds", "engine_seconds"}
    assert first == second
    assert (first["schema"], first["model_version"]) == ("shadowkvm.workload-run/1", sk.model_version)
    assert (first["workload"], first["seed"], first["scale"], first["unit"]) == ("cow_storm", 5, 0.25, "copy")
    assert first["parameters"]["pages"] == 16
    assert first["settings"] == {"policy": "kvm", "profile": "zen"}
    assert list(first["phases"]) == ["start", "fork", "copy", "reuse", "exit"]
    assert first["counters"]["invlpg"] == 32
    assert first["mismatches"] == 0


def test_csv_has_each_phase(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert shell("workload", "run", "jit_flip", "--scale", "0.05", "-o", path)[:2] == (0, "")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert {row["phase"] for row in rows} == {"all", "start", "write", "execute"}
    by = {(row["phase"], row["counter"]): row for row in rows}
    assert by["all", "invlpg"]["per_unit"] == "16"
    assert by["all", "mmu_unsync"]["per_unit"] == "", "an instant counter has no rate"


def test_policy_profile_quota_and_audit(shell: Shell) -> None:
    arguments = ["workload", "run", "context_switch", "--scale", "0.03", "--json"]
    chosen = ["--policy", "no_unsync", "--profile", "qemu-tcg", "--quota", "64", "--audit"]
    status, out, _ = shell(*arguments, *chosen)
    result = json.loads(out)
    assert status == 0
    assert result["settings"] == {"policy": "no_unsync", "profile": "qemu-tcg"}
    assert result["counters"]["mmu_recycled"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "fork_exits"], "workload 'fork_exits' is not known; did you mean 'fork_exit'"),
        (["show", "nonsense"], "workload 'nonsense' is not known"),
        (["run", "fork_exit", "--set", "pages"], "--set 'pages': name=value is expected"),
        (["run", "fork_exit", "--set", "pages=x"], "pages 'x' is no whole number"),
        (["run", "fork_exit", "--set", "pages=1", "--set", "pages=2"], "--set pages is there twice"),
        (["run", "fork_exit", "--set", "page=1"], "has no parameter 'page'; did you mean 'pages'"),
        (["run", "fork_exit", "--scale", "0"], "scale 0.0 is not from 0.001"),
        (["run", "fork_exit", "--scale", "many"], "scale"),
        (["run", "fork_exit", "--policy", "no_unsnc"], "policy 'no_unsnc' is not known; did you mean 'no_unsync'"),
        (["run", "fork_exit", "--json", "--format", "csv"], "--json and --format csv contradict each other"),
        (["show", "fork_exit", "--format", "csv"], "format csv is not there for this command"),
        (["run", "fork_exit", "-o", "/not/there/x.json"], "the folder of /not/there/x.json is not there"),
        (["run", "fork_exit", "--set", "pages=1000000"], "guest memory is used up"),
        (["record", "fork_exit", "-o", "x.npy"], "the name of a recording ends in .npz"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_bad_usage_is_exit_2_and_one_line(shell: Shell, arguments: list[str], message: str) -> None:
    status, out, err = shell("workload", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_record_then_run(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "fork.npz"
    status, out, err = shell("workload", "record", "fork_exit", "--scale", "0.1", "-o", path)
    assert (status, out) == (0, "")
    assert str(path) in err
    status, out, _ = shell("run", path)
    assert status == 0
    assert "workload fork_exit: a process forks a child" in out
    assert "... by kind of page" in out


def test_set_takes_hyphens(shell: Shell) -> None:
    out = json.loads(shell("workload", "run", "mmap_cycle", "--set", "reuse-gpa=no", "--set", "total=4M", "--json")[1])
    assert out["parameters"]["reuse_gpa"] is False


def broken(guest: Any, p: Any) -> Iterator[Step]:
    del p
    process = guest.spawn(guest.program())
    guest.switch(process)
    guest.start()
    guest.touch(process, [guest.layout.program], fetch=True)
    rows = guest.take()
    rows["flags"] &= 0xFF ^ int(sk.Flag.FAULTS)
    yield Step("round", rows, units=1)


def test_a_guest_that_sees_something_else_is_exit_1(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Workload(
        name="wrong", summary="s", stresses="s", look_for=(), body=broken, parameters=(), unit="u", work=lambda _: 1.0
    )
    monkeypatch.setattr("shadowkvm.scenario_options.get", lambda _: wrong)
    status, out, err = shell("workload", "run", "wrong")
    assert status == 1
    assert "0 as its tables say, 1 otherwise" in out
    assert "the guest saw something else than its own tables say in 1 accesses" in err


def test_a_broken_invariant_is_exit_4_and_says_how_to_see_it_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def audit(self: sk.Vm) -> None:
        del self
        raise sk.InvariantError("the count is off")

    monkeypatch.setattr(sk.Vm, "audit", audit)
    status, _, err = shell("workload", "run", "jit_flip", "--seed", "3", "--set", "pages=4", "--audit")
    assert status == 4
    assert "after a step of phase 'start': the count is off" in err
    assert "shadowkvm workload run jit_flip --scale 1 --seed 3 --set pages=4 --audit" in err


def test_without_a_terminal_there_is_no_colour_and_no_bar() -> None:
    command = [sys.executable, "-W", "error", "-m", "shadowkvm", "workload", "run", "mmio_poll", "--scale", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
