"""Who is asked: detection of the backends, what the doctor says, and how differences are judged and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shadowkvm import cli, verify
from shadowkvm.errors import ShadowKvmError
from shadowkvm.kvm import Answer, Case, generate, save
from shadowkvm.kvm.agreement import compare, engine_answers
from shadowkvm.kvm.doctor import Check, command, examine, is_static, ready
from shadowkvm.kvm.initramfs import MODULES
from shadowkvm.kvm.model import is_modelled, model_of
from shadowkvm.kvm.native import Native, shadow_paging
from shadowkvm.kvm.qemu import Qemu, installed_kernels
from shadowkvm.kvm.record import record, record_random
from shadowkvm.kvm.referee import judge
from shadowkvm.kvm.tracetext import Normaliser, comparable, same_event


class Oracle:
    """Answers like the engine; `whims` (run number, operation) get one #PF more, like a host that reschedules."""

    name, profile, batch, kernel = "fake", "qemu-tcg", 4, "6.1.0-fake"

    def __init__(self, whims: Sequence[tuple[int, int]] = (), wrong: int | None = None) -> None:
        self.whims, self.wrong, self.runs = set(whims), wrong, 0

    def about(self) -> dict[str, str]:
        return {"kernel": self.kernel}

    def ask(self, cases: Sequence[Case], *, trace: bool = False) -> list[tuple[list[Answer], list[list[str]]]]:
        del trace
        out: list[tuple[list[Answer], list[list[str]]]] = []
        for case in cases:
            answers = engine_answers(case)
            for i, a in enumerate(answers):
                if (self.runs, i) in self.whims or i == self.wrong:
                    a.counters = {**a.counters, "pf_taken": a.counters.get("pf_taken", 0) + 1}
            out.append((answers, []))
            self.runs += 1
        return out


def module(sysfs: Path, name: str, parameter: str, value: str) -> Path:
    folder = sysfs / "module" / name / "parameters"
    folder.mkdir(parents=True)
    (folder / parameter).write_text(value + "\n")
    return sysfs


# -- backends and doctor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "value"), [("kvm_amd", "npt", "N"), ("kvm_amd", "npt", "0"), ("kvm_intel", "ept", "N")]
)
def test_shadow_paging_is_recognised(tmp_path: Path, name: str, parameter: str, value: str) -> None:
    sysfs, device = module(tmp_path / "sys", name, parameter, value), tmp_path / "kvm"
    device.touch()
    assert shadow_paging(sysfs, device) == name
    backend = Native(sysfs, device)
    assert (backend.module, backend.profile) == (name, "zen")
    assert backend.about()["module"] == name


@pytest.mark.parametrize(
    ("name", "parameter", "value"), [("kvm_amd", "npt", "Y"), ("kvm_amd", "npt", "1"), ("kvm_intel", "ept", "Y")]
)
def test_nested_paging_is_refused_with_the_command_that_helps(
    tmp_path: Path, name: str, parameter: str, value: str
) -> None:
    sysfs, device = module(tmp_path / "sys", name, parameter, value), tmp_path / "kvm"
    device.touch()
    with pytest.raises(ShadowKvmError, match=f"sudo modprobe -r {name} && sudo modprobe {name} {parameter}=0"):
        Native(sysfs, device)


def test_no_module_and_no_device(tmp_path: Path) -> None:
    with pytest.raises(ShadowKvmError, match=r"neither kvm_amd nor kvm_intel is loaded .*--backend qemu"):
        shadow_paging(tmp_path, tmp_path / "kvm")
    module(tmp_path, "kvm_amd", "npt", "N")
    with pytest.raises(ShadowKvmError, match=r"kvm: No such file or directory; are you in the group kvm\?"):
        shadow_paging(tmp_path, tmp_path / "kvm")


def test_the_modelled_kernel_comes_first(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    for version in ("6.12.9-amd64", "6.1.0-9-amd64", "6.1.0-56-amd64", "6.13.0-amd64", "5.10.0-1-amd64"):
        (tmp_path / "boot" / f"vmlinuz-{version}").touch()
    versions = [version for version, _ in installed_kernels(tmp_path)]
    assert versions == ["6.1.0-56-amd64", "6.1.0-9-amd64", "6.12.9-amd64", "6.13.0-amd64", "5.10.0-1-amd64"]


def test_a_folder_without_a_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qemu-system-x86_64").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShadowKvmError, match=f"no {tmp_path}/boot/vmlinuz-\\*; see: shadowkvm doctor"):
        Qemu(kernel_root=tmp_path)


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = examine(tmp_path, tmp_path / "kvm", tmp_path)
    assert not ready(checks)
    packages = "qemu-system-x86 linux-image-amd64 busybox-static gcc libc6-dev"
    assert command(checks) == f"sudo apt-get install {packages}"
    assert all(not check.good and check.found for check in checks)


def test_doctor_wants_the_modules_of_that_kernel(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    other = tmp_path / "boot/vmlinuz-6.7.1"
    other.touch()
    found = {check.what: check for check in examine(tmp_path, tmp_path / "kvm", tmp_path)}
    assert "the engine models 6.1 and 6.12: differences" in found["kernel image"].found
    other.rename(tmp_path / "boot/vmlinuz-6.12.1")
    found = {check.what: check for check in examine(tmp_path, tmp_path / "kvm", tmp_path)}
    assert found["kernel image"].found.endswith("vmlinuz-6.12.1")
    assert not found["modules of KVM"].good
    for number, name in enumerate(MODULES):
        path = tmp_path / "lib/modules/6.12.1/kernel" / f"{name}.ko{'.xz' * (number % 2)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {check.what: check.good for check in examine(tmp_path, root=tmp_path)}["modules of KVM"]


def test_ready_backends() -> None:
    def all_good(*backends: str) -> list[Check]:
        return [Check(b, "", b in backends, "") for b in ("qemu", "kvm", "qemu, kvm")]

    assert ready(all_good("qemu", "kvm", "qemu, kvm")) == ["qemu", "kvm"]
    assert ready(all_good("qemu", "qemu, kvm")) == ["qemu"]
    assert ready(all_good("qemu", "kvm")) == []


def test_a_dynamic_program_is_not_static(tmp_path: Path) -> None:
    for kinds, static in (((1, 3, 2), False), ((1, 1, 4), True)):
        head = bytearray(64)
        head[:4] = b"\x7fELF"
        head[32:40] = (64).to_bytes(8, "little")
        head[54:56], head[56:58] = (56).to_bytes(2, "little"), len(kinds).to_bytes(2, "little")
        (tmp_path / "a").write_bytes(head + b"".join(k.to_bytes(4, "little") + bytes(52) for k in kinds))
        assert is_static(tmp_path / "a") == static
    (tmp_path / "a").write_bytes(b"#!/bin/sh" + bytes(99))
    assert not is_static(tmp_path / "a")


# -- judging ----------------------------------------------------------------------------------------------------------


def test_agreement() -> None:
    cases = [generate(seed, 40) for seed in range(6)]
    verdicts = list(judge(Oracle(), cases))
    assert [(v.agreement.whole, v.agreement.agreed, v.runs, v.note) for v in verdicts] == [(True, 40, 1, "")] * 6
    assert [v.agreement.case for v in verdicts] == [replace(case, kernel=Oracle.kernel) for case in cases]
    assert {v.agreement.model for v in verdicts} == {"linux-6.1"}


@pytest.mark.parametrize(("kernel", "model"), [("6.12.95+deb12-amd64", "linux-6.12"), ("6.1.0-56-amd64", "linux-6.1")])
def test_the_rules_are_those_of_the_kernel_that_answers(kernel: str, model: str) -> None:
    oracle = Oracle()
    oracle.kernel = kernel
    (verdict,) = judge(oracle, [replace(generate(1, 10), kernel="6.1.0-of-old")])
    assert (verdict.agreement.case.kernel, verdict.agreement.model) == (kernel, model)
    (other,) = judge(oracle, [generate(1, 10)], model="linux-6.1")
    assert other.agreement.model == "linux-6.1"


def test_a_kernel_of_no_modelled_series_is_compared_with_the_one_before_it() -> None:
    versions = ("6.1.0-56-amd64", "6.6.9", "6.12.95+deb12-amd64", "6.19-rc3", "5.10.0-1-amd64", "")
    assert [model_of(v).removeprefix("linux-") for v in versions] == ["6.1", "6.1", "6.12", "6.12", "6.1", "6.1"]
    assert [is_modelled(v) for v in versions] == [True, False, True, False, False, False]


def test_what_the_host_does_once_is_not_held_against_the_engine() -> None:
    (verdict,) = judge(Oracle(whims=[(0, 7), (1, 9)]), [generate(1, 40)])
    assert verdict.agreement.whole
    assert (verdict.runs, verdict.note) == (2, "the host rescheduled in 1 operations")


def test_what_kvm_does_every_time_is() -> None:
    (verdict,) = judge(Oracle(whims=[(0, 3)], wrong=7), [generate(1, 40)])
    assert not verdict.agreement.whole
    assert (verdict.agreement.agreed, verdict.agreement.disagreed) == (39, (7,))
    assert verdict.agreement.first is not None
    assert verdict.agreement.first.what == ("pf_taken",)


def test_an_error_of_the_engine_is_a_difference() -> None:
    case = generate(1, 10)
    answers = engine_answers(case)
    broken = replace(case, ops=[*case.ops[:4], replace(case.ops[4], op="slot_del", slot=77), *case.ops[5:]])
    agreement = compare(broken, answers)
    assert agreement.first is not None
    assert agreement.first.index == 4
    assert agreement.first.what[0].startswith("ConfigError: ")


def test_recording_cuts_where_two_runs_differ_and_replaces_short_cases() -> None:
    told: list[str] = []
    (case,) = record(Oracle(whims=[(1, 25)]), [generate(1, 40)], told.append)
    assert (len(case.ops), len(case.answers or []), case.kernel) == (25, 25, "6.1.0-fake")
    assert "25 of 40 operations; two runs differ" in told[0]
    kept = record_random(Oracle(whims=[(1, 2)]), 3, 20, seed=50)
    assert [(c.seed, len(c.ops)) for c in kept] == [(51, 20), (52, 20), (53, 20)]


def test_addresses_of_the_host_are_not_compared() -> None:
    def side(pfn: int, table: int) -> list[str]:
        return [
            f"kvm_mmu_spte_requested: gfn 400 pfn {pfn:x} level 1",
            f"kvm_mmu_set_spte: gfn 400 spte {pfn << 12 | 0xE63:x} (rwx-) level 1 at {table:x}",
            "kvm_exit: vcpu 0 reason interrupt rip 0x1",
            "kvm_entry: vcpu 0",
        ]

    one, other = (Normaliser().lines(side(*x)) for x in ((0x1234, 0x5555_0010), (0x777, 0x9999_0010)))
    assert one == other == ["kvm_mmu_spte_requested: gfn 400 pfn #0 level 1", one[1]]
    assert one != Normaliser().lines(side(0x777, 0x9999_0018))
    assert not comparable("kvm_entry: vcpu 0")
    assert same_event("kvm_page_fault: vcpu 0 rip 0x7018 address 0x1", "kvm_page_fault: vcpu 0 rip 0x0 address 0x1")


# -- the command ------------------------------------------------------------------------------------------------------


def recorded(tmp_path: Path, *, wrong: bool = False) -> Path:
    cases = [generate(seed, 30) for seed in range(3)]
    for case in cases:
        case.answers = engine_answers(case)
    if wrong:
        assert cases[1].answers
        cases[1].answers[12].counters["mmu_flooded"] = 5
    save(tmp_path / "cases.json.xz", cases)
    return tmp_path / "cases.json.xz"


def test_verify_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(recorded(tmp_path))]) == 0
    said = capsys.readouterr()
    assert "3 of 3" in said.out
    assert "100.000 %" in said.out
    assert said.err == ""


def test_verify_shows_the_first_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded(tmp_path, wrong=True)
    assert cli.main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "First difference: seed 1 unsync, operation 12" in out
    assert "mmu_flooded" in out
    assert "Events of the engine" in out
    assert cli.main(["verify", str(path), "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "shadowkvm.verify/1"
    assert (told["model_version"], told["cases"][0]["model_version"]) == ("linux-6.1", "linux-6.1")
    assert [c["agreed"] for c in told["cases"]] == [30, 29, 30]
    assert told["cases"][1]["first"]["what"] == ["mmu_flooded"]
    assert told["events"]["kvm"] is None


def test_events_stand_side_by_side() -> None:
    case = generate(0, 5)
    table = verify.side_by_side(case, ["kvm_mmu_zap_all_fast: x"], ["kvm_mmu_zap_all_fast: x", "kvm_mmu_sync_page: y"])
    _, shown = table.renderables  # type: ignore[union-attr]
    assert [[str(cell) for cell in column.cells] for column in shown.columns] == [
        ["", "->"],
        ["kvm_mmu_zap_all_fast: x", ""],
        ["kvm_mmu_zap_all_fast: x", "kvm_mmu_sync_page: y"],
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "name a file of cases"),
        (["--random", "2", "--backend", "recorded"], 2, "--backend qemu"),
        (["--random", "2", "--ops", "0"], 2, "--ops must be at least 1"),
        (["FILE", "--events"], 2, "only --backend qemu records events"),
        (["FILE", "--backend", "vbox"], 2, "vbox"),
        (["FILE", "--kernel-root", "/"], 2, "only --backend qemu boots a kernel"),
        (["FILE", "--model-version", "linux-6.2"], 2, "did you mean 'linux-6.12' or 'linux-6.1'?"),
        (["FILE", "--save", "no/such/folder/x.json"], 2, "folder"),
        (["nothing.json"], 3, "nothing.json"),
        (["BAD"], 3, "schema None"),
        (["UNASKED"], 3, "no recorded answers"),
    ],
)
def test_verify_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    save(tmp_path / "unasked.json", [generate(1, 5)])
    names = {"FILE": recorded(tmp_path), "BAD": tmp_path / "bad.json", "UNASKED": tmp_path / "unasked.json"}
    assert cli.main(["verify", *(str(names.get(a, a)) for a in arguments)]) == status
    assert message in capsys.readouterr().err


def test_save_keeps_cases_with_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(recorded(tmp_path)), "--save", str(tmp_path / "kept.json")]) == 0
    assert "3 cases with answers" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "kept.json")]) == 0


def test_doctor_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = [Check("qemu", "emulator", good=True, found="here"), Check("kvm", "shadow paging", good=False, found="no")]
    bad = [replace(good[0], good=False, packages=("qemu-system-x86",)), good[1]]
    monkeypatch.setattr(verify, "examine", lambda root: bad if root else good)
    assert cli.main(["doctor"]) == 0
    assert "Ready: --backend qemu" in capsys.readouterr().out
    assert cli.main(["doctor", "--kernel-root", "/nowhere"]) == 1
    assert "Ready: no backend" in capsys.readouterr().out
    monkeypatch.setattr(verify, "examine", lambda root=None: bad if root is None else good)
    assert cli.main(["doctor"]) == 1
    assert "sudo apt-get install qemu-system-x86" in capsys.readouterr().out
    assert cli.main(["doctor", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["install"] == "sudo apt-get install qemu-system-x86"
